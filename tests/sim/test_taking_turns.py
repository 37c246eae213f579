"""Room that goes while thinker, talker and sound are at it together: from there on they take turns, each inside what
the new plan says, and the answer does not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from sim.harness import PLENTY_BYTES, SPEECH, Answer, Host, Question, furnished_card

from lowvram.room import Room

QUESTION = Question([{"role": "user", "content": "hello green river " * 200}], SPEECH)
"""So long that no two KV caches have room beside each other in the least that will do."""

ANSWERING = ("thinker", "talker", "token2wav")


@pytest.fixture(scope="module")
def host(demo: Path) -> Iterator[Host]:
    with furnished_card() as card, Host(card, demo) as host:
        yield host


@pytest.fixture(scope="module")
def expected(host: Host) -> Answer:
    """What it answers with all in one phase; after this its voice is known."""
    said = QUESTION.answer(host.omni)
    (phase,) = QUESTION.plan(host.omni).phases
    assert phase.stages == ANSWERING
    return said


@pytest.fixture(autouse=True)
def as_before(host: Host, expected: Answer) -> Iterator[None]:
    """Its voice is known, whichever test comes first."""
    yield
    host.set_capacity(PLENTY_BYTES)
    host.omni.set_budget(PLENTY_BYTES)


class Watch:
    """Of a turn's steps, in order: whose they were, the stages of the phase that they found, and what they held beyond
    its plan. `act` is called before each, with its number."""

    def __init__(self, host: Host, act: Callable[[int], Any]) -> None:
        self.stages: list[str] = []
        self.phases: list[tuple[str, ...]] = []
        self.excess_bytes: list[int] = []
        self._host = host
        self._act = act

    @contextmanager
    def watching(self) -> Iterator[None]:
        attempt, card = Room.attempt, self._host.card

        def watched(room: Room, step: Callable[[], Any], undo: Any = lambda: None, stage: str = "") -> Any:
            self._act(len(self.stages))
            self.stages.append(stage)

            def measured() -> Any:
                card.peak_bytes = card.live_bytes
                made = step()
                planned_bytes = room._present.peak_bytes + self._host.tables_bytes
                self.excess_bytes.append(card.peak_bytes - planned_bytes)
                self.phases.append(room._present.stages)
                return made

            return attempt(room, measured, undo, stage)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Room, "attempt", watched)
            yield


def watched(host: Host, act: Callable[[int], Any] = lambda n: None) -> tuple[Answer, Watch]:
    watch = Watch(host, act)
    with watch.watching():
        return QUESTION.answer(host.omni), watch


def shrink(host: Host, *, asked: bool) -> None:
    """To the least that will do; the card has no byte more. Without asking, some other program takes it."""
    least_bytes = host.least_bytes_left()
    if asked:
        host.omni.set_budget(least_bytes)
    host.set_capacity(least_bytes)


@pytest.mark.parametrize("nth", [4, 9, 13, 26, 47])
@pytest.mark.parametrize("asked", [True, False], ids=["by its owner", "by a game"])
def test_a_card_that_shrinks_to_the_least_is_enough_whatever_has_begun(
    host: Host, expected: Answer, nth: int, asked: bool
):
    refusals = host.card.refusals
    said, watch = watched(host, lambda n: n == nth and shrink(host, asked=asked))
    assert said.says(expected)
    assert max(watch.excess_bytes) <= 0
    assert asked is (host.card.refusals == refusals)
    assert host.leaked_bytes == 0


def test_the_least_is_what_the_turn_could_have_been_planned_for_and_small_states(host: Host):
    fresh_bytes, kept = QUESTION.plan(host.omni).smallest_budget_bytes, []
    assert fresh_bytes is not None
    watched(host, lambda n: kept.append(host.least_bytes_left() - fresh_bytes))
    assert max(kept) < 0.03 * fresh_bytes


def test_stages_that_take_turns_change_places_a_few_times_only(host: Host, expected: Answer):
    """Each gets done what it is at; then the text is written to its end, all of it spoken, all of that made sound."""
    _, undisturbed = watched(host)
    nth = undisturbed.stages.index("thinker", undisturbed.stages.index("talker"))
    said, watch = watched(host, lambda n: n == nth and shrink(host, asked=True))
    assert said.says(expected)
    turns = [stage for stage, _ in groupby(watch.stages[nth:])]
    assert turns == ["thinker", "talker", "thinker", "talker", "token2wav"]
    assert watch.phases[nth:] == [(stage,) for stage in watch.stages[nth:]]


@pytest.mark.parametrize("every", [2, 4, 5, 9])
def test_room_that_comes_and_goes_between_steps_changes_nothing(host: Host, expected: Answer, every: int):
    def change(n: int) -> None:
        if n % every == 0:
            shrink(host, asked=True)
        elif n % every == every // 2:
            host.set_capacity(PLENTY_BYTES)
            host.omni.set_budget(PLENTY_BYTES)

    refusals = host.card.refusals
    said, watch = watched(host, change)
    assert said.says(expected)
    assert max(watch.excess_bytes) <= 0
    assert host.card.refusals == refusals


def test_a_game_may_take_its_room_in_the_middle_of_any_computation(host: Host, expected: Answer):
    outcomes = {}
    for nth in host.moments(QUESTION, 4):
        host.card.at(nth, lambda: shrink(host, asked=False))
        outcomes[nth] = QUESTION.answer(host.omni).says(expected)
        host.set_capacity(PLENTY_BYTES)
        host.omni.set_budget(PLENTY_BYTES)
    assert set(outcomes.values()) == {True}, outcomes
