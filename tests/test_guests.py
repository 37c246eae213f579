"""A running answer makes room for others, or loses it, and says what it would have said."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from test_turn import MEDIA, MESSAGES, SAMPLING, SPEECH, CardCount, assert_same_answer

from lowvram.device import MemoryCap
from lowvram.errors import BudgetExceededError, InfeasibleBudgetError, LowVRAMError
from lowvram.events import AudioChunk, Event, Finished, TextDelta
from lowvram.kv_cache import KVCache
from lowvram.offload.budget import GIB
from lowvram.offload.plan import Plan
from lowvram.options import SamplingParams
from lowvram.room import Room
from lowvram.runtime import OmniRuntime
from lowvram.weights import WeightBlock


def ask(omni: OmniRuntime) -> Iterator[Event]:
    return omni.generate(MESSAGES, sampling=SAMPLING, speech=SPEECH, media=MEDIA)


def answer(events: Iterator[Event], after_each: Callable[[int], Any] = lambda n: None) -> tuple[Finished, np.ndarray]:
    """The answer and its sound; `after_each` event the caller does something, while the turn is stopped."""
    samples: list[np.ndarray] = []
    for n, event in enumerate(events):
        if isinstance(event, AudioChunk):
            samples.append(event.samples)
        if isinstance(event, Finished):
            return event, np.concatenate(samples)
        after_each(n)
    raise AssertionError("a turn ends with Finished")


@pytest.fixture
def undisturbed(omni: OmniRuntime) -> tuple[Finished, np.ndarray]:
    return answer(ask(omni))


def squeeze(omni: OmniRuntime) -> int:
    """Name the smallest budget that the rest of the answer can do with; returns it."""
    try:
        omni.set_budget(1000)
    except InfeasibleBudgetError as error:
        omni.set_budget(error.needed_bytes)
        return error.needed_bytes
    raise AssertionError("nothing runs in a kilobyte")


@contextmanager
def at_each_step(act: Callable[[int], Any]) -> Iterator[None]:
    """Before each step of a turn, in the middle of whatever waits for it, somebody does something; steps count from
    0."""
    attempt, steps = Room.attempt, count()

    def disturbed(room: Room, *step: Any, **stage: Any) -> Any:
        act(next(steps))
        return attempt(room, *step, **stage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Room, "attempt", disturbed)
        yield


def greet(omni: OmniRuntime) -> Iterator[Event]:
    """Ask for a short answer: a chunk of sound, and a code more."""
    speech = replace(SPEECH, sampling=replace(SPEECH.sampling, max_tokens=13), steps=2)
    return omni.generate([{"role": "user", "content": "hello"}], sampling=SamplingParams(max_tokens=4), speech=speech)


def test_a_budget_may_shrink_to_the_least_before_any_step_and_stay_there(omni: OmniRuntime):
    steps: list[int] = []
    with at_each_step(steps.append):
        undisturbed = answer(greet(omni))
    for nth in steps:
        with at_each_step(lambda n, nth=nth: n == nth and squeeze(omni)):
            said = answer(greet(omni))
        assert_same_answer(said, undisturbed)
        omni.set_budget(None)


@pytest.mark.parametrize("every", [1, 3])
def test_budgets_that_come_and_go_change_nothing(omni: OmniRuntime, undisturbed: Any, every: int):
    def change(n: int) -> None:
        if n % every == 0:
            squeeze(omni)
        elif n % every == every // 2:
            omni.set_budget(None)

    assert_same_answer(answer(ask(omni), change), undisturbed)


OTHERS_BYTES = 4096 * GIB
"""Taken by others in the process whenever a phase runs."""


def test_what_others_take_meanwhile_is_told_and_ends_no_answer(omni: OmniRuntime, caplog: pytest.LogCaptureFixture):
    expected = answer(greet(omni))
    omni._machine = replace(omni._machine, meter=CardCount(OTHERS_BYTES))
    assert_same_answer(answer(greet(omni)), expected)
    assert 'phase "think+talk+sound" held 4096' in caplog.text


def test_a_phase_that_comes_again_is_not_measured_against_a_plan_that_came_in_between(
    omni: OmniRuntime, caplog: pytest.LogCaptureFixture
):
    """Its peak is of both times, and was meant to be higher the first time."""
    omni._machine = replace(omni._machine, meter=CardCount(OTHERS_BYTES))
    list(greet(omni))
    assert '"think+talk+sound" held' in caplog.text
    caplog.clear()
    with at_each_step(lambda n: squeeze(omni) if n == 0 else omni.set_budget(None) if n == 2 else None):
        list(greet(omni))
    assert "think" not in caplog.text


def test_who_names_a_budget_waits_for_no_file(omni: OmniRuntime, monkeypatch: pytest.MonkeyPatch):
    events = ask(omni)
    next(event for event in events if isinstance(event, TextDelta))
    reads: list[str] = []
    monkeypatch.setattr(WeightBlock, "fill", lambda block, run: reads.append(block.name))
    squeeze(omni)
    omni.set_budget(None)
    assert reads == []
    events.close()


def test_a_smaller_budget_lets_weights_go_at_once(omni: OmniRuntime):
    events = ask(omni)
    next(event for event in events if isinstance(event, TextDelta))
    held_bytes = omni._machine.residency.live_bytes
    squeeze(omni)
    assert omni._machine.residency.live_bytes < held_bytes
    events.close()


def test_stages_that_are_over_need_no_room(omni: OmniRuntime):
    events = ask(omni)
    next(event for event in events if isinstance(event, TextDelta))
    turn = omni._turn
    squeeze(omni)
    assert {"audio_tower", "visual"}.isdisjoint(turn.room.phase.placements)
    events.close()


def test_a_budget_too_small_for_the_rest_is_refused_and_the_answer_goes_on(omni: OmniRuntime, undisturbed: Any):
    def too_small(n: int) -> None:
        if n == 3:
            with pytest.raises(InfeasibleBudgetError):
                omni.set_budget(1000)

    assert_same_answer(answer(ask(omni), too_small), undisturbed)


def test_a_budget_named_between_turns_holds_for_the_next(omni: OmniRuntime, undisturbed: Any):
    least_bytes = omni.plan(MESSAGES, sampling=SAMPLING, speech=SPEECH, media=MEDIA).smallest_budget_bytes
    omni.set_budget(least_bytes)
    assert omni.plan(MESSAGES, sampling=SAMPLING, speech=SPEECH, media=MEDIA).peak_bytes <= least_bytes
    assert_same_answer(answer(ask(omni)), undisturbed)


def test_what_was_asked_before_an_answer_began_holds_for_it_whichever_was_made_last(
    omni: OmniRuntime, undisturbed: Any
):
    first, second = ask(omni), ask(omni)
    omni.release()
    least_bytes = omni.plan(MESSAGES, sampling=SAMPLING, speech=SPEECH, media=MEDIA).smallest_budget_bytes
    omni.set_budget(least_bytes)
    omni.resume()
    plans: list[Plan] = []
    for events in (first, second):
        assert_same_answer(answer(events, lambda _: plans.append(omni._turn.room.plan)), undisturbed)
    assert max(plan.peak_bytes for plan in plans) <= least_bytes


def test_a_release_before_answers_began_is_over_for_all_of_them_once_resumed(omni: OmniRuntime, undisturbed: Any):
    first, second = ask(omni), ask(omni)
    omni.release()
    said: list[Any] = []
    waiting = threading.Thread(target=lambda: said.extend(map(answer, (first, second))), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    omni.resume()
    waiting.join(60)
    assert len(said) == 2
    for each in said:
        assert_same_answer(each, undisturbed)


def test_releasing_after_any_event_and_resuming_changes_nothing(omni: OmniRuntime, undisturbed: Any):
    def step_aside(_: int) -> None:
        omni.release()
        assert omni._machine.residency.live_bytes == 0
        omni.resume()

    assert_same_answer(answer(ask(omni), step_aside), undisturbed)


def test_releasing_from_another_thread_at_any_moment_changes_nothing(omni: OmniRuntime, undisturbed: Any):
    over, events = threading.Event(), ask(omni)

    def guest() -> None:
        while not over.is_set():
            omni.release()
            time.sleep(0.002)
            omni.resume()
            time.sleep(0.005)

    playing = threading.Thread(target=guest, daemon=True)
    playing.start()
    try:
        said = answer(events)
    finally:
        over.set()
        playing.join()
    assert_same_answer(said, undisturbed)


def test_an_answer_that_is_closed_early_leaves_no_cache_to_the_garbage_collector(
    omni: OmniRuntime, monkeypatch: pytest.MonkeyPatch
):
    caches: list[weakref.ref[KVCache]] = []
    hold = Room.hold

    def noted(room: Room, stage: str, make_cache: Callable[[], KVCache], *keep: Callable[[KVCache], None]) -> KVCache:
        cache = hold(room, stage, make_cache, *keep)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(Room, "hold", noted)
    gc.disable()
    try:
        events = ask(omni)
        next(event for event in events if isinstance(event, TextDelta))
        events.close()
        assert caches
        assert not any(cache() for cache in caches)
    finally:
        gc.enable()


def test_a_released_answer_waits_and_can_be_cancelled(omni: OmniRuntime):
    events = ask(omni)
    next(event for event in events if isinstance(event, TextDelta))
    omni.release()
    rest: list[Event] = []
    waiting = threading.Thread(target=lambda: rest.extend(events), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive() and not rest
    omni.cancel()
    waiting.join(30)
    assert rest[-1].finish_reason == "cancelled"
    assert omni._machine.residency.live_bytes == 0


def test_a_released_answer_lends_no_cap_and_goes_on_under_that_of_the_budget_named_meanwhile(
    omni: OmniRuntime, monkeypatch: pytest.MonkeyPatch
):
    caps: list[int] = []

    @contextmanager
    def noted(_cap: MemoryCap, budget_bytes: int) -> Iterator[None]:
        caps.append(budget_bytes)
        yield

    monkeypatch.setattr(MemoryCap, "at", noted)
    events = greet(omni)
    next(events)
    omni.release()
    caps.clear()
    going_on = threading.Thread(target=lambda: next(events), daemon=True)
    going_on.start()
    going_on.join(0.05)
    assert caps == []
    omni.set_budget("1GiB")
    omni.resume()
    going_on.join(10)
    assert caps == [2**30]
    events.close()


def test_a_released_runtime_answers_again_after_resume(omni: OmniRuntime, undisturbed: Any):
    omni.release()
    with pytest.raises(LowVRAMError, match="released its device"):
        ask(omni)
    omni.resume()
    assert_same_answer(answer(ask(omni)), undisturbed)


def test_releasing_between_turns_drops_residents(omni: OmniRuntime):
    answer(ask(omni))
    assert omni._machine.residency.live_bytes > 0
    omni.release()
    omni.release()
    assert omni._machine.residency.live_bytes == 0


class Full:
    """Makes a component's block find no room at its nth use and for some uses after."""

    def __init__(self, omni: OmniRuntime, component: str, first: int, times: int = 1) -> None:
        block = omni._machine.model.components[component][0]
        self.uses, self._failing = 0, range(first, first + times)
        self._hook = block.module.register_forward_pre_hook(self._before)

    def _before(self, *_: Any) -> None:
        self.uses += 1
        if self.uses in self._failing:
            raise torch.OutOfMemoryError("a game took it")

    def mend(self) -> None:
        self._hook.remove()


@pytest.mark.parametrize(
    ("component", "times"), [("audio_tower", 1), ("visual", 2), ("thinker", 3), ("lm_head", 1), ("talker", 3)]
)
def test_a_step_that_finds_no_room_changes_nothing(omni: OmniRuntime, undisturbed: Any, component: str, times: int):
    """Whether it is a stage's first step or a later one, and however far the ladder has to be climbed down."""
    for first in (1, 3):
        full = Full(omni, component, first, times)
        said = answer(ask(omni))
        full.mend()
        assert_same_answer(said, undisturbed)


def test_a_weight_that_finds_no_room_comes_later(omni: OmniRuntime, undisturbed: Any, monkeypatch: pytest.MonkeyPatch):
    tries = []
    (bigvgan,) = omni._machine.model.components["bigvgan"]
    fill = bigvgan.fill

    def sometimes(run: torch.Tensor) -> None:
        tries.append(True)
        if len(tries) < 3:
            raise torch.OutOfMemoryError("a game took it")
        fill(run)

    omni.release(), omni.resume()
    monkeypatch.setattr(bigvgan, "fill", sometimes)
    assert_same_answer(answer(ask(omni)), undisturbed)
    assert len(tries) >= 3


def test_weights_and_caches_beyond_the_budget_end_the_phase_with_its_profile(
    omni: OmniRuntime, monkeypatch: pytest.MonkeyPatch
):
    """The plan would have been wrong, which only the count can show."""
    budget_bytes = omni.budget.vram_bytes
    monkeypatch.setattr(Room, "kv_bytes", property(lambda _room: budget_bytes))
    with pytest.raises(BudgetExceededError, match="of weights and caches, but the budget is") as refused:
        list(ask(omni))
    assert refused.value.profile.columns["planned"]
    assert refused.value.needed_bytes > refused.value.available_bytes == budget_bytes


def test_a_device_that_stays_full_is_a_typed_error_and_leaves_nothing_behind(omni: OmniRuntime, undisturbed: Any):
    full = Full(omni, "talker", 2, times=10**9)
    with pytest.raises(BudgetExceededError) as refused:
        list(ask(omni))
    full.mend()
    assert refused.value.profile.columns["planned"]
    assert omni._machine.residency.live_bytes == 0
    assert_same_answer(answer(ask(omni)), undisturbed)
