"""Another program wants the device: how much is really gone, and how soon, and that the answer does not notice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count, cycle
from pathlib import Path
from typing import Any

import pytest
from sim.harness import PLENTY_BYTES, QUESTIONS, Answer, Host, furnished_card

from lowvram.errors import InfeasibleBudgetError
from lowvram.events import Event, Finished, Progress

PATIENCE_S = 30.0
"""For another thread to see what it waits for; only a failure takes so long."""

SMALL_SHARE = 0.1
"""Of what an answer held, at most so much stays while it is released: the voice's state between two chunks."""


@pytest.fixture(scope="module")
def host(demo: Path) -> Iterator[Host]:
    with furnished_card() as card, Host(card, demo) as host:
        QUESTIONS["spoken"].answer(host.omni)  # its voice is known from here on, whichever test comes first
        yield host


@pytest.fixture(autouse=True)
def as_before(host: Host) -> Iterator[None]:
    yield
    host.set_capacity(PLENTY_BYTES)
    host.omni.resume()
    host.omni.set_budget(PLENTY_BYTES)


def disturbed(events: Iterator[Event], disturb: Callable[[Event], Any]) -> Answer:
    """The answer, when after each of its events somebody disturbs."""
    seen = []
    for event in events:
        seen.append(event)
        disturb(event)
    return Answer.of(seen)


def is_loading(event: Event) -> bool:
    return isinstance(event, Progress) and event.stage == "load"


@pytest.mark.parametrize(("name", "every"), [("in text alone", 1), ("spoken", 4)])
def test_releasing_frees_all_but_small_states_and_changes_nothing(
    host: Host, on_cpu: Mapping[str, Answer], name: str, every: int
):
    shares, events = [], count()

    def release(event: Event) -> None:
        if next(events) % every == 0 and host.held_bytes:
            held_bytes = host.held_bytes
            host.omni.release()
            shares.append(host.held_bytes / held_bytes)
            host.omni.resume()

    assert disturbed(QUESTIONS[name].ask(host.omni), release).says(on_cpu[name])
    assert max(shares) < SMALL_SHARE


def test_phases_that_a_larger_budget_joins_are_told_of_under_their_name(host: Host, on_cpu: Mapping[str, Answer]):
    question = QUESTIONS["spoken"]
    with pytest.raises(InfeasibleBudgetError) as refused:
        host.omni.set_budget(1)
        question.plan(host.omni)
    host.omni.set_budget(refused.value.needed_bytes)
    first, *_, last = (phase.name for phase in question.plan(host.omni).phases)
    assert last == "sound"
    answer = disturbed(question.ask(host.omni), lambda event: host.omni.set_budget(PLENTY_BYTES))
    assert answer.says(on_cpu["spoken"])
    told = list(answer.finished.memory["peak_bytes"])
    assert (told[0], told[-1]) == (first, "see+think+talk+sound")


def test_releasing_in_the_middle_of_a_step_frees_the_card_after_it(host: Host, on_cpu: Mapping[str, Answer]):
    question, left = QUESTIONS["in text alone"], []

    def visit() -> None:
        host.omni.release()
        latest_s = time.monotonic() + PATIENCE_S
        while host.held_bytes > 10_000 and time.monotonic() < latest_s:
            time.sleep(0.001)
        left.append(host.held_bytes)
        host.omni.resume()

    for nth in host.moments(question, 3):
        visitor = threading.Thread(target=visit)
        host.card.at(nth, visitor.start)
        assert question.answer(host.omni).says(on_cpu["in text alone"]), nth
        visitor.join()
    assert max(left) < 10_000


@pytest.mark.parametrize("name", ["in text alone", "spoken"])
def test_budgets_that_come_and_go_are_kept_from_the_next_step_on(host: Host, on_cpu: Mapping[str, Answer], name: str):
    """The card has as much room as the budget says, so a byte more would be refused."""
    question = QUESTIONS[name]
    plan = question.plan(host.omni)
    least, most = plan.smallest_budget_bytes, plan.peak_bytes
    assert least is not None
    budgets = cycle([most, least, (least + most) // 2, (2 * least + most) // 3])
    refusals = host.card.refusals

    def change(event: Event) -> None:
        if isinstance(event, Finished):
            return
        budget_bytes = max(next(budgets), host.least_bytes_left())
        host.omni.set_budget(budget_bytes)
        host.set_capacity(budget_bytes)

    assert disturbed(question.ask(host.omni), change).says(on_cpu[name])
    assert host.card.refusals == refusals


def test_the_least_budget_named_in_the_middle_of_a_step_is_kept_after_it(host: Host, on_cpu: Mapping[str, Answer]):
    question, verdicts = QUESTIONS["spoken"], {}
    for nth in host.moments(question, 3):
        host.card.at(nth, lambda: host.omni.set_budget(host.least_bytes_left()))
        verdicts[nth] = question.answer(host.omni).says(on_cpu["spoken"])
        host.omni.set_budget(PLENTY_BYTES)
    assert set(verdicts.values()) == {True}, verdicts


def test_a_budget_accepted_in_the_last_step_of_a_phase_is_kept_in_the_next(host: Host, on_cpu: Mapping[str, Answer]):
    """The next phase was planned for the old one, but nothing of it has begun."""
    question, omni = QUESTIONS["spoken"], host.omni
    roomy = question.plan(omni)
    assert roomy.smallest_budget_bytes is not None
    omni.set_budget((roomy.smallest_budget_bytes + 4 * roomy.peak_bytes) // 5)
    encoding, answering = question.plan(omni).phases
    assert answering.stages == ("thinker", "talker", "token2wav")
    question.answer(omni)
    host.card.at(host.meter.ends[encoding.name], lambda: omni.set_budget(roomy.smallest_budget_bytes))
    assert question.answer(omni).says(on_cpu["spoken"])


def is_encoding(event: Event) -> bool:
    return isinstance(event, Progress) and event.stage in ("hear", "see")


@pytest.mark.parametrize("asked", [True, False], ids=["by its owner", "by a game"])
@pytest.mark.parametrize("nth", [0, 1])
def test_a_turn_planned_as_one_phase_is_cut_as_long_as_it_encodes(
    host: Host, on_cpu: Mapping[str, Answer], asked: bool, nth: int
):
    """To the least that the turn could have been planned for: what has not begun need not share the card."""
    question, omni, encoded = QUESTIONS["spoken"], host.omni, count()
    plan, refusals = question.plan(omni), host.card.refusals
    least_bytes = plan.smallest_budget_bytes
    assert least_bytes is not None and len(plan.phases) == 1

    def shrink(event: Event) -> None:
        if is_encoding(event) and next(encoded) == nth:
            if asked:
                omni.set_budget(least_bytes)
            host.set_capacity(least_bytes)

    assert disturbed(question.ask(omni), shrink).says(on_cpu["spoken"])
    assert next(encoded) > nth
    assert asked is (host.card.refusals == refusals)


def test_releasing_and_resuming_twice_is_once(host: Host, on_cpu: Mapping[str, Answer]):
    question = QUESTIONS["in text alone"]

    def twice(event: Event) -> None:
        if not is_loading(event):
            for verb in (host.omni.release, host.omni.release, host.omni.resume, host.omni.resume):
                verb()

    assert disturbed(question.ask(host.omni), twice).says(on_cpu["in text alone"])
    host.omni.release()
    host.omni.release()
    assert host.held_bytes == 0
