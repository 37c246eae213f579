"""Memory that runs out, files that cannot be read, interruptions in the middle of a step: the right answer or an error
of ours, nothing left behind, and a runtime that answers the next question.

The runtimes here stay within the smallest budget for their question, so that every turn loads, streams and cuts all it
can. They are asked one question after another: a fault that spoiled more than its own turn is seen in the next.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import BinaryIO, NoReturn

import pytest
from sim.harness import PLENTY_BYTES, QUESTIONS, Answer, Host, furnished_card

from lowvram.checkpoint import TensorReader
from lowvram.errors import BudgetExceededError, CheckpointError, LowVRAMError

RIGHT = "right"


class Examined:
    """A host that is asked the same question again and again, within `least_bytes` unless a test says otherwise."""

    def __init__(self, host: Host, name: str, on_cpu: Mapping[str, Answer]) -> None:
        self.host = host
        self.question = QUESTIONS[name]
        self.expected = on_cpu[name]
        host.set_capacity(PLENTY_BYTES)
        host.omni.set_budget(PLENTY_BYTES)
        least_bytes = self.question.plan(host.omni).smallest_budget_bytes
        assert least_bytes is not None
        self.least_bytes = least_bytes
        host.omni.set_budget(least_bytes)

    def moments(self, count: int) -> list[int]:
        return self.host.moments(self.question, count)

    def answer(self) -> Answer:
        return self.question.answer(self.host.omni)

    def outcome(self) -> str:
        """How one turn went: right, wrong or the name of an error of ours, and whether anything was left behind."""
        try:
            verdict = RIGHT if self.answer().says(self.expected) else "wrong"
        except LowVRAMError as error:
            verdict = type(error).__name__
        return verdict if not self.host.leaked_bytes else f"{verdict}, with a leak"


@pytest.fixture(scope="module")
def host(demo: Path) -> Iterator[Host]:
    with furnished_card() as card, Host(card, demo) as host:
        yield host


@pytest.fixture
def in_text(host: Host, on_cpu: Mapping[str, Answer]) -> Examined:
    return Examined(host, "in text alone", on_cpu)


@pytest.fixture
def spoken(host: Host, on_cpu: Mapping[str, Answer]) -> Examined:
    return Examined(host, "spoken", on_cpu)


def raise_(error: BaseException) -> NoReturn:
    raise error


@pytest.mark.parametrize(("question", "turns"), [("in_text", 4), ("spoken", 3)])
def test_any_allocation_may_fail(question: str, turns: int, request: pytest.FixtureRequest):
    """Half a dozen in each turn, so that what a step had done before it failed would add up."""
    examined: Examined = request.getfixturevalue(question)
    moments, outcomes = examined.moments(6 * turns), []
    for turn in range(turns):
        for nth in moments[turn::turns]:
            examined.host.card.fail(nth)
        outcomes.append(examined.outcome())
        examined.host.set_capacity(PLENTY_BYTES)
    assert outcomes == [RIGHT] * turns


def test_a_card_without_room_is_an_error_of_ours_whenever_it_happens(in_text: Examined):
    outcomes = {}
    for nth in in_text.moments(3):
        in_text.host.card.shrink(nth, in_text.host.tables_bytes + 1000)
        outcomes[nth] = in_text.outcome()
        in_text.host.set_capacity(PLENTY_BYTES)
    assert set(outcomes.values()) == {BudgetExceededError.__name__}, outcomes
    assert in_text.outcome() == RIGHT


def test_who_keeps_the_error_keeps_nothing_on_the_card(spoken: Examined):
    """Neither caches nor what was computed when the room was gone, and without waiting for a garbage collector."""
    kept, left = [], []
    gc.disable()
    try:
        for nth in spoken.moments(3):
            spoken.host.card.shrink(nth, spoken.host.tables_bytes + 1000)
            try:
                spoken.answer()
            except BudgetExceededError as error:
                kept.append(error)
            left.append(spoken.host.held_bytes)
            spoken.host.set_capacity(PLENTY_BYTES)
    finally:
        gc.enable()
    assert (len(kept), left) == (3, [0, 0, 0])


def test_a_card_that_shrinks_to_the_least_a_turn_needs_is_enough(in_text: Examined):
    """Whenever it happens to a turn that had everything resident."""
    host, outcomes = in_text.host, {}
    for nth in in_text.moments(3):
        host.omni.set_budget(PLENTY_BYTES)
        host.card.shrink(nth, host.tables_bytes + in_text.least_bytes)
        outcomes[nth] = in_text.outcome()
        host.set_capacity(PLENTY_BYTES)
        host.omni.set_budget(in_text.least_bytes)
    assert set(outcomes.values()) == {RIGHT}, outcomes


READ_FAULTS: dict[str, Callable[[], int]] = {
    "a file that ends too soon": lambda: 0,
    "a disk that fails": lambda: raise_(OSError(errno.EIO, "Input/output error")),
}


@pytest.mark.parametrize("fault", READ_FAULTS.values(), ids=READ_FAULTS)
def test_a_weight_that_cannot_be_read_is_a_checkpoint_error(
    in_text: Examined, fault: Callable[[], int], monkeypatch: pytest.MonkeyPatch
):
    read, reads, failing = TensorReader._read_some, count(), set()

    def sometimes(reader: TensorReader, file: BinaryIO, view: memoryview, offset: int) -> int:
        return fault() if next(reads) in failing else read(reader, file, view, offset)

    monkeypatch.setattr(TensorReader, "_read_some", sometimes)
    assert in_text.outcome() == RIGHT
    reads_of_a_turn, outcomes = next(reads), {}
    for nth in range(0, reads_of_a_turn, -(-reads_of_a_turn // 3)):
        reads, failing = count(), {nth}
        outcomes[nth] = in_text.outcome()
    assert set(outcomes.values()) == {CheckpointError.__name__}, outcomes
    failing = set()
    assert in_text.outcome() == RIGHT


def test_an_interruption_in_the_middle_of_a_step_leaves_nothing_behind(spoken: Examined):
    for nth in spoken.moments(3):
        spoken.host.card.at(nth, lambda: raise_(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            spoken.answer()
        assert spoken.host.leaked_bytes == 0, nth
    assert spoken.outcome() == RIGHT


def test_cancelling_in_the_middle_of_a_step_ends_the_turn_and_leaves_nothing_behind(in_text: Examined):
    for nth in in_text.moments(3):
        in_text.host.card.at(nth, in_text.host.omni.cancel)
        assert in_text.answer().finished.finish_reason == "cancelled", nth
        assert in_text.host.leaked_bytes == 0, nth
    assert in_text.outcome() == RIGHT


def test_closing_the_iterator_at_any_time_leaves_nothing_behind(in_text: Examined):
    total = len(list(in_text.question.ask(in_text.host.omni)))
    for stop in range(1, total, -(-total // 5)):
        events = in_text.question.ask(in_text.host.omni)
        for _ in range(stop):
            next(events)
        events.close()
        assert in_text.host.leaked_bytes == 0, stop
    assert in_text.outcome() == RIGHT
