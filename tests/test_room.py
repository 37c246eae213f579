from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from lowvram.errors import BudgetExceededError, InfeasibleBudgetError
from lowvram.offload.budget import Budget
from lowvram.offload.plan import Phase, Plan
from lowvram.room import Cancelled, Control, Room, is_out_of_memory

CPU = torch.device("cpu")
ROOMY = Budget(1000)
STAGES = ("thinker", "talker")


def plan_within(budget_bytes: int, *stages: str) -> Plan:
    phases = tuple(
        Phase(stage, (stage,), {}, weights_bytes=budget_bytes, kv_bytes=0, activation_bytes=0, traffic_bytes=0)
        for stage in stages
    )
    return replace(PLAN, budget_bytes=budget_bytes, phases=phases)


PLAN = Plan(
    "cpu",
    1000,
    (),
    prompt_tokens=1,
    text_tokens=1,
    codes=1,
    prefill_chunk_tokens=1,
    vision_chunk_patches=1,
    audio_chunk_windows=1,
)


class Shelf:
    """Stands for a residency: keeps a diary of what it was told, and of trimming; `following` is the phase of which
    something may come ahead."""

    def __init__(self) -> None:
        self.diary: list[Any] = []
        self.following: Phase | None = None

    live_bytes = 7

    def here(self) -> Callable[[], AbstractContextManager[None]]:
        return self._inside

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self.diary.append("inside")
        yield
        self.diary.append("outside")

    def prepare(self, plan: Plan) -> None:
        self.diary.append(("plan", plan.budget_bytes))

    def enter(self, phase: Phase, following: Phase | None = None) -> Iterator[tuple[int, int]]:
        self.diary.append(("enter", phase.peak_bytes))
        self.following = following
        yield phase.peak_bytes, phase.peak_bytes

    def make_way(self, phase: Phase) -> None:
        self.diary.append(("way", phase.peak_bytes))

    def leave(self) -> None:
        self.diary.append("leave")

    def release(self) -> None:
        self.diary.append("release")

    def trim(self) -> None:
        self.diary.append("trim")


class Cache:
    """Stands for a KV cache: knows where it is, and how large."""

    device = CPU
    n_bytes = 100

    def move(self, device: torch.device) -> None:
        self.device = device


def replan(budget: Budget, over: frozenset[str], begun: tuple[str, ...]) -> Plan:
    """Plans that need at least 10 bytes, and have each stage alone."""
    assert budget.vram_bytes is not None
    if budget.vram_bytes < 10:
        raise InfeasibleBudgetError("too little", needed_bytes=10)
    return plan_within(budget.vram_bytes, *(stage for stage in STAGES if stage not in over))


class Turn:
    """A room with all that surrounds it, in the first phase of a plan for 1000 bytes, which has begun."""

    def __init__(self, device: torch.device = CPU, free_bytes: int | None = None) -> None:
        self.shelf, self.control = Shelf(), Control(ROOMY)
        plan = plan_within(1000, *STAGES)
        self.room = Room(self.shelf, device, self.shelf.trim, lambda: free_bytes, self.control, plan, replan)
        self.phases = self.room.phases()
        next(self.phases)
        self.room.begin("thinker")
        self.shelf.diary.clear()

    def go_on(self) -> Phase | None:
        """Get the phase in force over; returns the next one."""
        for stage in self.room.phase.stages:
            self.room.begin(stage)
            self.room.end(stage)
        return next(self.phases, None)

    def rest(self) -> list[Phase]:
        """The phases after the one in force, each gone through."""
        return list(iter(self.go_on, None))


def runs_out(times: int) -> Callable[[], str]:
    """A step that finds no room that many times."""
    left = iter(range(times))

    def step() -> str:
        if next(left, None) is not None:
            raise torch.OutOfMemoryError("no room")
        return "done"

    return step


def test_a_step_finds_its_phase_loaded():
    turn = Turn()
    turn.room.attempt(lambda: turn.shelf.diary.append("step"))
    assert turn.shelf.diary == [("way", 1000), ("enter", 1000), "step"]


def test_loading_reports_its_progress():
    assert list(Turn().room.load()) == [(1000, 1000)]


def test_a_step_that_runs_out_is_undone_and_tried_again_after_trimming():
    turn, undone = Turn(), []
    assert turn.room.attempt(runs_out(1), lambda: undone.append(True)) == "done"
    assert undone == [True]
    assert turn.shelf.diary == [("way", 1000), ("enter", 1000), "trim", ("enter", 1000)]
    assert turn.room.plan.budget_bytes == 1000


@pytest.mark.parametrize(("times", "budget_bytes"), [(2, 750), (3, 562), (4, 10)])
def test_then_less_is_held_and_then_the_least(times: int, budget_bytes: int):
    turn = Turn()
    assert turn.room.attempt(runs_out(times)) == "done"
    assert turn.room.plan.budget_bytes == budget_bytes


@pytest.mark.parametrize(("free_bytes", "budget_bytes"), [(300, 407), (643, 750), (5000, 750), (0, 107)])
def test_of_three_quarters_only_that_is_held_which_others_have_left(free_bytes: int, budget_bytes: int):
    turn = Turn(free_bytes=free_bytes)
    turn.room.hold("thinker", Cache)
    assert turn.room.attempt(runs_out(2)) == "done"
    assert turn.room.plan.budget_bytes == budget_bytes


def test_what_is_left_is_asked_for_when_all_is_given_back_that_can_be():
    turn = Turn(free_bytes=300)
    turn.room.attempt(runs_out(2))
    assert turn.shelf.diary[-4:] == ["trim", ("plan", 307), ("way", 307), ("enter", 307)]


def test_captures_are_dropped_before_the_card_is_asked_what_is_left():
    turn = Turn()
    turn.room.before_moving(lambda: turn.shelf.diary.append("drop"))
    turn.room.attempt(runs_out(3))
    told = turn.shelf.diary
    assert [told[i - 1] for i, word in enumerate(told) if word == "trim"] == ["drop"] * 3


def test_the_reserve_comes_on_top_of_three_quarters():
    turn = Turn()
    turn.room.plan = replace(turn.room.plan, workspace_bytes=30, slack_bytes=10)
    turn.room.attempt(runs_out(2))
    assert turn.room.plan.budget_bytes == 790


def test_when_nothing_is_left_to_give_up_it_is_a_budget_error():
    with pytest.raises(BudgetExceededError, match='phase "thinker" was planned to need 10 B') as refused:
        Turn().room.attempt(runs_out(5))
    assert (refused.value.phase, refused.value.needed_bytes) == ("thinker", 10)
    assert isinstance(refused.value.__cause__, torch.OutOfMemoryError)


def test_the_failed_steps_tensors_are_gone_before_it_is_tried_again():
    alive = []

    def step() -> bool:
        gone = [ref() is None for ref in alive]
        tensor = torch.zeros(1)
        alive.append(weakref.ref(tensor))
        if len(alive) < 3:
            raise torch.OutOfMemoryError("no room")
        return all(gone)

    assert Turn().room.attempt(step)


@pytest.mark.parametrize("times", [0, 4])
def test_other_errors_are_not_ours_to_mend_not_even_on_the_last_rung(times: int):
    calls, finds_room = [], runs_out(times)

    def step() -> None:
        calls.append(True)
        finds_room()
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Turn().room.attempt(step)
    assert len(calls) == times + 1


def cuda_error(code: int) -> RuntimeError:
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code
    return error


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation after trying 9 plans."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (cuda_error(2), True),
        (cuda_error(700), False),
    ],
)
def test_what_counts_as_running_out(error: RuntimeError, verdict: bool):
    assert is_out_of_memory(error) is verdict


def test_a_cancelled_turn_takes_no_further_step():
    turn = Turn()
    turn.control.cancel()
    with pytest.raises(Cancelled):
        turn.room.attempt(lambda: turn.shelf.diary.append("step"))
    assert "step" not in turn.shelf.diary


def test_another_budget_holds_from_the_next_step_on():
    turn = Turn()
    turn.control.set_budget(Budget(500))
    turn.room.attempt(lambda: None)
    assert turn.shelf.diary == [("plan", 500), ("way", 500), ("enter", 500)]


def test_a_budget_named_after_the_plan_was_made_and_before_its_turn_holds_from_the_first_step_on():
    turn = Turn()
    turn.control.set_budget(Budget(500))
    room = Room(turn.shelf, CPU, turn.shelf.trim, lambda: None, turn.control, plan_within(1000, *STAGES), replan)
    room.attempt(lambda: None)
    assert room.plan.budget_bytes == 500


def test_a_plan_that_takes_over_goes_on_with_its_own_phases():
    turn = Turn()
    turn.control.set_budget(Budget(500))
    turn.room.attempt(lambda: None)
    assert [(phase.name, phase.weights_bytes) for phase in turn.rest()] == [("talker", 500)]


@pytest.mark.parametrize(("budget_bytes", "loaded"), [(500, [1000, 500]), (5000, [1000])])
def test_while_weights_come_only_a_smaller_budget_counts_and_any_other_once_they_are_there(
    budget_bytes: int, loaded: list[int]
):
    turn, seen, budget = Turn(), [], Budget(budget_bytes)
    for done_bytes, _ in turn.room.load():
        seen.append(done_bytes)
        turn.control.set_budget(budget)
    assert seen == loaded
    turn.room.attempt(lambda: None)
    assert turn.room.plan.budget_bytes == budget_bytes


def test_weights_whose_coming_was_interrupted_by_a_release_come_with_the_next_step():
    """Else who takes the device at each of them would wait for ever for the last."""
    turn = Turn()
    loading = turn.room.load()
    next(loading)
    turn.control.release()
    turn.room.adapt()
    turn.control.resume()
    turn.shelf.diary.clear()
    assert list(loading) == []
    turn.room.attempt(lambda: turn.shelf.diary.append("step"))
    assert turn.shelf.diary == [("way", 1000), ("enter", 1000), "step"]


def test_a_released_room_is_empty_and_the_step_waits():
    turn = Turn()
    cache = turn.room.hold("thinker", Cache)
    cache.move(torch.device("meta"))
    turn.control.release()
    done = threading.Event()
    waiting = threading.Thread(target=lambda: turn.room.attempt(done.set), daemon=True)
    waiting.start()
    assert not done.wait(0.05)
    assert cache.device == CPU
    assert turn.shelf.diary[-2:] == ["release", "trim"]
    turn.control.resume()
    waiting.join(10)
    assert done.is_set()


def test_a_resumed_room_has_its_caches_and_weights_back():
    turn = Turn(device=torch.device("meta"))
    cache = turn.room.hold("thinker", Cache)
    turn.control.release()
    turn.room.adapt()
    turn.control.resume()
    turn.shelf.diary.clear()
    turn.room.attempt(lambda: None)
    assert cache.device == torch.device("meta")
    assert turn.shelf.diary == [("way", 1000), ("enter", 1000)]


def test_what_was_asked_stands_when_something_else_is_asked():
    control = Control(ROOMY)
    control.cancel()
    control.release()
    control.set_budget(Budget(500))
    assert (control.cancelled, control.released, control.budget) == (True, True, Budget(500))
    control.resume()
    assert (control.cancelled, control.released, control.budget) == (True, False, Budget(500))


def test_a_released_turn_can_be_cancelled():
    turn = Turn()
    turn.control.release()
    turn.control.cancel()
    with pytest.raises(Cancelled):
        turn.room.attempt(lambda: None)


def test_a_turn_that_ends_while_released_leaves_no_resident():
    turn = Turn()
    turn.control.release()
    turn.room.leave()
    assert turn.shelf.diary == ["inside", "leave", "release", "outside"]


def test_a_stopped_turn_makes_way_at_once_and_loads_with_the_next_step():
    turn = Turn()
    turn.control.set_budget(Budget(500))
    turn.room.adapt()
    assert turn.shelf.diary == ["inside", ("plan", 500), ("way", 500), "outside"]
    turn.room.attempt(lambda: None)
    assert turn.shelf.diary[4:] == [("enter", 500)]


def test_who_has_a_cancelled_turn_adapt_does_not_hear_of_it():
    turn = Turn()
    turn.control.cancel()
    turn.control.set_budget(Budget(500))
    turn.room.adapt()
    assert turn.room.plan.budget_bytes == 500


class Lender:
    """Notes what is lent, by its budget, and what is given back."""

    def __init__(self) -> None:
        self.diary: list[Any] = []

    @contextmanager
    def lend(self, held_bytes: int, budget_bytes: int) -> Iterator[None]:
        assert held_bytes == Shelf.live_bytes
        self.diary.append(budget_bytes)
        yield
        self.diary.append("back")


def test_what_is_lent_for_a_budget_is_lent_anew_when_another_one_comes_into_force():
    """Else a larger one that is named in the middle of a long step would be met by the old one's bound."""
    turn, lender = Turn(), Lender()
    with turn.room.computing(lender.lend):
        turn.room.accept(Budget(5000))
        assert lender.diary == [1000]
        turn.room.attempt(lambda: lender.diary.append("step"))
    assert lender.diary == [1000, "back", 5000, "step", "back"]


def test_what_is_lent_is_for_the_weights_and_caches_that_are_held():
    turn, held = Turn(), []

    @contextmanager
    def lend(held_bytes: int, budget_bytes: int) -> Iterator[None]:
        held.append(held_bytes)
        yield

    turn.room.hold("thinker", Cache)
    with turn.room.computing(lend):
        pass
    assert held == [Shelf.live_bytes + Cache.n_bytes]


def test_nothing_is_lent_to_a_turn_that_waits_for_the_device():
    turn, lender = Turn(), Lender()

    def resume_later() -> None:
        lender.diary.append("waiting")
        turn.control.resume()

    with turn.room.computing(lender.lend):
        turn.control.release()
        threading.Timer(0.05, resume_later).start()
        turn.room.attempt(lambda: lender.diary.append("step"))
    assert lender.diary == [1000, "back", "waiting", 1000, "step", "back"]


def test_what_cannot_be_lent_is_not_asked_for_again_outside():
    """There nobody would give it back."""
    turn, asked = Turn(), []

    def refuses(held_bytes: int, budget_bytes: int) -> AbstractContextManager[None]:
        asked.append(budget_bytes)
        raise RuntimeError("the card is gone")

    with pytest.raises(RuntimeError, match="gone"), turn.room.computing(refuses):
        pass
    turn.room.accept(Budget(500))
    turn.room.adapt()
    assert asked == [1000]


def test_who_stops_a_turn_borrows_nothing_for_it():
    turn, lender = Turn(), Lender()
    with turn.room.computing(lender.lend):
        pass
    turn.room.accept(Budget(500))
    turn.room.adapt()
    assert lender.diary == [1000, "back"]


def test_a_phase_finds_the_last_ones_weights_gone():
    turn = Turn()
    turn.go_on()
    assert turn.shelf.diary == [("way", 1000)]


def in_one_phase(device: torch.device = CPU) -> Turn:
    """A turn whose plan has both stages in one phase, loaded and not begun."""
    turn = Turn()
    plan = replace(turn.room.plan, phases=(replace(turn.room.phase, stages=STAGES),))
    turn.room = Room(turn.shelf, device, turn.shelf.trim, lambda: None, turn.control, plan, replan)
    turn.phases = turn.room.phases()
    next(turn.phases)
    return turn


def test_a_turn_has_the_host_prepared_for_its_plan_first_of_all():
    """Else copies that the plan before wanted would stay beside those of this one."""
    assert in_one_phase().shelf.diary == [("plan", 1000)]


def test_a_stage_begins_in_its_own_phase_only_and_once():
    turn = Turn()
    assert not turn.room.begin("thinker")
    assert not turn.room.begin("talker")
    turn.go_on()
    assert turn.room.begin("talker")
    assert not turn.room.begin("talker")


def test_no_stage_begins_before_the_one_that_it_hears():
    """Another thread joins the phases just after the first stage was told that it is not its turn."""
    turn = in_one_phase()
    assert not turn.room.begin("talker")
    assert turn.room.begin("thinker")
    assert turn.room.begin("talker")


def test_stages_that_have_not_begun_are_cut_from_those_that_have():
    turn = in_one_phase()
    assert turn.room.begin("thinker")
    turn.room.accept(Budget(500))
    assert not turn.room.begin("talker")
    assert [phase.stages for phase in turn.rest()] == [("talker",)]


def test_plans_know_what_has_begun_and_what_is_over():
    asked = []

    def note(budget: Budget, over: frozenset[str], begun: tuple[str, ...]) -> Plan:
        asked.append((set(over), begun))
        return plan_within(500, "thinker", "talker")

    turn = in_one_phase()
    turn.room._replan_for = note
    for happens in (lambda: None, *(partial(turn.room.begin, s) for s in STAGES), lambda: turn.room.end("thinker")):
        happens()
        turn.room.accept(turn.control.budget)  # the same, so that nothing is cut
    assert asked == [
        (set(), ()),
        (set(), ("thinker",)),
        (set(), ("thinker", "talker")),
        ({"thinker"}, ("talker",)),
    ]


def cut_in_the_middle(device: torch.device = CPU) -> tuple[Turn, Cache, Cache]:
    """A turn whose stages began in one phase and have to take turns from now on, and their caches."""
    turn = in_one_phase(device)
    caches = []
    for stage in STAGES:
        turn.room.begin(stage)
        caches.append(turn.room.hold(stage, Cache))
        caches[-1].device = device
    turn.room.accept(Budget(500))
    turn.shelf.diary.clear()
    return turn, *caches


def test_stages_that_have_begun_together_go_on_one_after_the_other():
    turn, *_ = cut_in_the_middle()
    turn.room.attempt(lambda: None, stage="thinker")
    assert turn.room.phase.stages == ("thinker",)
    assert [phase.stages for phase in turn.rest()] == [("talker",)]


def test_a_step_finds_its_own_stages_phase_there_and_the_other_stages_cache_away():
    device = torch.device("meta")
    turn, thinking, talking = cut_in_the_middle(device)
    for stage, places in (("talker", (CPU, device)), ("thinker", (device, CPU)), ("talker", (CPU, device))):
        seen = turn.room.attempt(lambda: (thinking.device, talking.device), stage=stage)
        assert seen == places


def test_a_cache_is_made_where_its_own_stages_phase_is_there_and_the_other_stages_cache_away():
    turn, thinking, _ = cut_in_the_middle(torch.device("meta"))
    places: list[torch.device] = []

    def make_cache() -> Cache:
        places.append(thinking.device)
        return Cache()

    turn.room.hold("talker", make_cache)
    assert places == [CPU]


def test_caches_that_wait_on_the_host_are_not_counted():
    turn, *_ = cut_in_the_middle(torch.device("meta"))
    counts = [turn.room.kv_bytes]
    for ask in (lambda: None, turn.control.release):
        ask()
        turn.room.adapt()
        counts.append(turn.room.kv_bytes)
    assert counts == [200, 100, 0]


def test_what_goes_to_and_fro_goes_before_anything_comes():
    turn, thinking, talking = cut_in_the_middle()
    for name, cache in (("thinker", thinking), ("talker", talking)):
        cache.move = lambda device, name=name: turn.shelf.diary.append(f"{name} to {device}")
    turn.room._device = torch.device("meta")
    turn.room.attempt(lambda: None, stage="talker")
    assert turn.shelf.diary == [
        ("plan", 500),
        "thinker to cpu",
        ("way", 500),
        "talker to meta",
        ("enter", 500),
    ]


def test_a_cache_that_found_no_room_on_the_device_comes_with_the_next_try():
    device = torch.device("meta")
    turn, thinking, _ = cut_in_the_middle(device)
    turn.room.attempt(lambda: None, stage="talker")
    move, finds_room = thinking.move, runs_out(1)
    thinking.move = lambda to: (to == device and finds_room(), move(to))
    assert turn.room.attempt(lambda: thinking.device, stage="thinker") == device


def test_a_stage_that_takes_its_turn_early_changes_nothing_about_what_comes_first():
    turn, *_ = cut_in_the_middle()
    turn.room.attempt(lambda: None, stage="talker")
    assert turn.room.phase.stages == ("thinker",)
    assert turn.shelf.following is None  # nothing comes ahead: the thinker is next, and all of it must come
    turn.room.attempt(lambda: None)
    assert turn.shelf.following.stages == ("talker",)


def test_a_stage_that_runs_out_is_the_one_that_makes_do_with_less():
    """Three quarters of what its own phase was planned for, not of the one that comes first."""
    turn, *_ = cut_in_the_middle()
    turn.room.attempt(lambda: None)
    first, second = turn.room.plan.phases
    turn.room.plan = replace(turn.room.plan, phases=(first, replace(second, weights_bytes=400)))
    turn.room.attempt(runs_out(2), stage="talker")
    assert turn.room.plan.budget_bytes == 300


@pytest.mark.parametrize("changes", [lambda turn: turn.room.adapt(), lambda turn: next(turn.phases)])
def test_a_stage_that_is_over_leaves_no_cache_to_another_plan_or_phase(changes: Callable[[Turn], object]):
    turn, *caches = cut_in_the_middle()
    gone = [weakref.ref(cache) for cache in caches]
    del caches
    turn.room.end("talker")
    changes(turn)
    assert [ref() is None for ref in gone] == [False, True]


def test_a_phase_that_is_over_before_its_time_is_passed_by():
    """Speech may end while text is still being written."""
    turn, *_ = cut_in_the_middle()
    turn.room.attempt(lambda: None)
    turn.room.end("talker")
    assert turn.rest() == []


def test_stages_that_are_joined_again_but_could_not_begin_do_so_when_their_phase_comes_again():
    turn = in_one_phase()
    turn.room.begin("thinker")
    turn.room.end("thinker")
    assert next(turn.phases).stages == STAGES
    assert not turn.room.begin("thinker")
    assert turn.room.begin("talker")


def test_a_phase_that_follows_is_planned_without_all_before_it():
    turn = Turn()
    turn.go_on()
    turn.room.accept(Budget(500))
    turn.room.attempt(lambda: None)
    assert [phase.stages for phase in turn.room.plan.phases] == [("talker",)]


def test_a_budget_accepted_when_a_phase_is_over_decides_which_is_next():
    turn = Turn()
    turn.room.end("thinker")
    turn.room.accept(Budget(500))
    assert next(turn.phases).weights_bytes == 500


def test_a_budget_that_is_too_small_is_refused_and_changes_nothing():
    turn = Turn()
    with pytest.raises(InfeasibleBudgetError):
        turn.room.accept(Budget(5))
    assert turn.control.budget is ROOMY
    turn.room.attempt(lambda: None)
    assert turn.room.plan.budget_bytes == 1000


def test_no_stage_begins_while_a_budget_is_being_accepted():
    """It was asked whether the rest fits: what begins meanwhile has more to remember."""
    turn, asking, answer = in_one_phase(), threading.Event(), threading.Event()

    def slow(budget: Budget, over: frozenset[str], begun: tuple[str, ...]) -> Plan:
        if threading.current_thread() is other:
            asking.set()
            assert answer.wait(10)
        return plan_within(500, "thinker", "talker")

    turn.room._replan_for = slow
    other = threading.Thread(target=lambda: turn.room.accept(Budget(500)), daemon=True)
    other.start()
    assert asking.wait(10)
    threading.Timer(0.05, answer.set).start()
    assert turn.room.begin("thinker")
    assert turn.room.plan.budget_bytes == 500
    other.join(10)


def test_a_phase_is_entered_with_the_next_one_in_view_and_the_last_with_none():
    turn = Turn()
    turn.room.attempt(lambda: None)
    assert turn.shelf.following == turn.room.plan.phases[1]
    turn.go_on()
    turn.room.attempt(lambda: None)
    assert turn.shelf.following is None


def test_a_step_that_runs_out_lets_nothing_more_come_ahead():
    turn = Turn()
    turn.room.attempt(runs_out(1))
    assert turn.shelf.following is None


def test_what_came_ahead_is_no_measure_of_what_a_phase_needs():
    turn = Turn()
    turn.room.phase = replace(turn.room.phase, weights_bytes=800, prefetch_bytes=200)
    turn.room.plan = replace(turn.room.plan, phases=(turn.room.phase, turn.room.plan.phases[1]))
    turn.room.attempt(runs_out(2))
    assert turn.room.plan.budget_bytes == 600
