"""Weights that come in a thread of their own while an answer is computed: the answer does not notice, the card does not
overflow, and whatever happens nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from sim.harness import PLENTY_BYTES, QUESTIONS, Answer, Host, furnished_card

from lowvram.events import Finished
from lowvram.offload.plan import Plan
from lowvram.offload.streams import InOrder, in_a_thread

QUESTION = QUESTIONS["spoken"]


@pytest.fixture(scope="module")
def roomy(demo: Path) -> Iterator[tuple[Host, Plan]]:
    """A host that brings weights in a thread and knows its voice, and the plan it follows: of several phases, with room
    left in one."""
    with pytest.MonkeyPatch.context() as patch, furnished_card() as card, Host(card, demo) as host:
        patch.setattr(InOrder, "beside", lambda _, work: in_a_thread(work))
        QUESTION.answer(host.omni)
        whole = QUESTION.plan(host.omni)
        assert whole.smallest_budget_bytes is not None
        host.omni.set_budget((whole.smallest_budget_bytes + whole.peak_bytes) // 2)
        plan = QUESTION.plan(host.omni)
        assert any(phase.prefetch_bytes for phase in plan.phases)
        yield host, plan


@pytest.fixture(autouse=True)
def as_before(roomy: tuple[Host, Plan]) -> Iterator[None]:
    yield
    host, plan = roomy
    host.set_capacity(PLENTY_BYTES)
    host.omni.set_budget(plan.budget_bytes)


def test_the_answer_is_the_cpus_and_stays_inside_the_plan(roomy: tuple[Host, Plan], on_cpu: Mapping[str, Answer]):
    host, plan = roomy
    refusals, come_bytes = host.card.refusals, host.omni._machine.residency.prefetched_bytes
    for _ in range(3):
        host.set_capacity(plan.peak_bytes)
        assert QUESTION.answer(host.omni).says(on_cpu["spoken"])
        assert host.leaked_bytes == 0
    assert host.card.refusals == refusals
    assert host.omni._machine.residency.prefetched_bytes > come_bytes


def test_cancelling_at_any_moment_leaves_nothing_behind(roomy: tuple[Host, Plan], on_cpu: Mapping[str, Answer]):
    host, _ = roomy
    for nth in host.moments(QUESTION, 6):
        host.card.at(nth, host.omni.cancel)
        QUESTION.answer(host.omni)
        assert host.leaked_bytes == 0, nth
    assert QUESTION.answer(host.omni).says(on_cpu["spoken"])


def test_what_came_ahead_goes_first_when_the_room_goes(roomy: tuple[Host, Plan], on_cpu: Mapping[str, Answer]):
    """A game leaves the first phase what it needs without the next one's weights: what else was planned is kept."""
    host, plan = roomy
    QUESTION.answer(host.omni)
    encoding, refusals, seen = plan.phases[0], host.card.refusals, []
    held_bytes = host.meter.peaks[encoding.name] - host.tables_bytes
    assert encoding.prefetch_bytes
    for event in QUESTION.ask(host.omni):
        seen.append(event)
        if isinstance(event, Finished):
            break
        room = host.omni._turn.room
        assert room.plan == plan
        host.set_capacity(held_bytes - encoding.prefetch_bytes if room.phase == encoding else plan.peak_bytes)
    assert Answer.of(seen).says(on_cpu["spoken"])
    assert host.card.refusals == refusals + 1


def test_budgets_that_change_at_any_moment_change_nothing(roomy: tuple[Host, Plan], on_cpu: Mapping[str, Answer]):
    host, plan = roomy
    for nth in host.moments(QUESTION, 4):
        host.card.at(nth, lambda: host.omni.set_budget(host.least_bytes_left()))
        assert QUESTION.answer(host.omni).says(on_cpu["spoken"]), nth
        assert host.leaked_bytes == 0, nth
        host.omni.set_budget(plan.budget_bytes)
