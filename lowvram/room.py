"""The device as one turn has it: the phase in force, and the one way in which stages get a step done there.

Between two steps no block is in use, so that placements may change: another thread named a budget or wants the device
for a while (`Control`), or the device ran out. A step that ran out is undone and tried again with less held, until
nothing is left to give up; whatever happened on the way, the answer is the same.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from .errors import BudgetExceededError, InfeasibleBudgetError
from .kv_cache import KVCache
from .offload.budget import Budget, format_bytes
from .offload.plan import Phase, Plan
from .offload.residency import Residency

log = logging.getLogger(__name__)

T = TypeVar("T")
Replan = Callable[[Budget, frozenset[str], tuple[str, ...]], Plan]
"""A plan within a budget for what is left of a turn: without the stages that are over, and with those that have begun
as a first phase of their own."""

CPU = torch.device("cpu")


class Cancelled(Exception):  # noqa: N818 (an ending, not an error)
    """Ends a turn between two steps. Raised and caught inside a turn; no caller meets it."""


class Control:
    """What other threads ask of an answer in the making. It heeds them between two steps."""

    def __init__(self, budget: Budget) -> None:
        self._changed = threading.Condition()
        self._budget = budget
        self._cancelled = self._released = False

    @property
    def budget(self) -> Budget:
        return self._budget

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def released(self) -> bool:
        return self._released

    def cancel(self) -> None:
        self._tell(cancelled=True)

    def release(self) -> None:
        self._tell(released=True)

    def resume(self) -> None:
        self._tell(released=False)

    def set_budget(self, budget: Budget) -> None:
        self._tell(budget=budget)

    def wait_while_released(self) -> None:
        """Return once somebody resumes or cancels."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or not self._released)

    def _tell(
        self, *, cancelled: bool | None = None, released: bool | None = None, budget: Budget | None = None
    ) -> None:
        with self._changed:
            self._cancelled = self._cancelled if cancelled is None else cancelled
            self._released = self._released if released is None else released
            self._budget = budget or self._budget
            self._changed.notify_all()


class Room:
    """One turn's hold on the device. `plan` is the one in force and `phase` its phase in progress."""

    def __init__(
        self,
        residency: Residency,
        device: torch.device,
        trim: Callable[[], None],
        control: Control,
        plan: Plan,
        replan: Replan,
    ) -> None:
        self.plan, self.phase = plan, plan.phases[0]
        self._begun: tuple[str, ...] = ()
        self._over: set[str] = set()
        self._deciding = threading.RLock()
        """No stage begins while another thread asks whether what is left can be cut."""
        self._residency = residency
        self._here = residency.here()
        self._device = device
        self._trim = trim
        self._control = control
        self._replan_for = replan
        self._budget = control.budget
        self._loading: Iterator[tuple[int, int]] = iter(())
        self._caches: list[KVCache] = []
        self._captures: list[Callable[[], None]] = []
        self._away = False
        self._is_loading = self._was_away = False

    def phases(self) -> Iterator[Phase]:
        """Go through the plan's phases, or through those of whatever plan replaces it on the way."""
        self._adopt(self.plan)
        while True:
            yield self.phase
            self._let_go()
            if self._following is None:
                return
            with self._deciding:
                self._over.update(self.phase.stages)
                self._begun, self.phase = (), self._following
                self._heed_budget()
            self._residency.make_way(self.phase)  # now, so that nobody counts the last phase's weights as this one's
            self._enter()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV caches that this phase holds."""
        return sum(cache.n_bytes for cache in self._caches)

    def begin(self, stage: str) -> bool:
        """Whether a stage may begin now, as one of the phase in force. From then on nothing cuts it from those of the
        phase that have begun before it and are not over."""
        with self._deciding:
            self._heed_budget()
            if stage in self.phase.stages:
                self._begun = (*self._begun, stage)
            return stage in self.phase.stages

    def end(self, stage: str) -> None:
        """A stage is over. Its weights stay for now, but another plan for the rest of the turn will do without them."""
        self._over.add(stage)

    def accept(self, budget: Budget) -> None:
        """Promise, to any thread, to keep within another budget from the next step on.

        Raises InfeasibleBudgetError, and promises nothing, when what is left of the turn cannot run in so little.
        """
        with self._deciding:
            self._replanned(budget)
            self._control.set_budget(budget)

    def load(self) -> Iterator[tuple[int, int]]:
        """Bring the phase's weights, yielding (bytes so far, bytes in all)."""
        self._is_loading, self._was_away = True, False
        try:
            while (progress := self._with_relief(self._load_next)) is not None:
                yield progress
                if self._was_away:
                    return  # whoever takes the device again now does so between steps, which bring what they need
        finally:
            self._is_loading = False

    def hold(self, make_cache: Callable[[], KVCache]) -> KVCache:
        """A cache for this phase, which leaves the device and returns with it."""
        cache = self.attempt(make_cache)
        self._caches.append(cache)
        return cache

    def before_moving(self, drop: Callable[[], None]) -> None:
        """Have `drop` called before weights or caches of this phase go elsewhere, and when it is over."""
        self._captures.append(drop)

    def attempt(self, step: Callable[[], T], undo: Callable[[], object] = lambda: None) -> T:
        """The result of `step`, computed as soon as the device is ours, and again after `undo` if it runs out.

        Raises Cancelled in its place when the turn is cancelled, BudgetExceededError when nothing is left to give up.
        """

        def when_ready() -> T:
            self._heed()
            for _ in self._loading:
                pass
            return step()

        return self._with_relief(when_ready, undo)

    def adapt(self) -> None:
        """Do now what can be done without waiting; for a thread that has stopped the turn between two steps."""
        with self._here():
            if self._control.released and not self._away:
                self._step_aside()
            self._heed_budget()
            if not self._away:
                self._with_relief(lambda: next(self._loading, None))  # what must go goes before the first block comes

    def leave(self) -> None:
        """The turn is over: only residents stay, or nothing if the device was asked back."""
        self._let_go()
        self._residency.leave()
        if self._control.released:
            self._residency.release()

    def _heed(self) -> None:
        """Do what other threads asked for since the last step."""
        if self._control.cancelled:
            raise Cancelled
        while self._control.released:
            if not self._away:
                self._step_aside()
            self._control.wait_while_released()
            if self._control.cancelled:
                raise Cancelled
        if self._away:
            self._come_back()
        self._heed_budget()

    def _heed_budget(self) -> None:
        """Keep within another budget. While weights come only a smaller one counts, and a larger one once they are
        there: else who changes it at each of them would wait for ever for the last."""
        budget = self._control.budget
        if budget is self._budget or (self._is_loading and not _is_smaller(budget, self._budget)):
            return
        self._budget = budget
        self._go_on_within(budget)

    def _step_aside(self) -> None:
        """Leave the device: weights are dropped, caches wait on the host, small states stay."""
        self._drop_captures()
        self._away = self._was_away = True
        self._residency.release()
        for cache in self._caches:
            cache.move(CPU)
        self._trim()
        self._enter()

    def _come_back(self) -> None:
        for cache in self._caches:
            cache.move(self._device)
        self._away = False

    def _load_next(self) -> tuple[int, int] | None:
        """One block more; or, where the device was given away while weights came, all of them at once: else who takes
        it at each of them would wait for ever for the last."""
        self._heed()
        if not self._was_away:
            return next(self._loading, None)
        rest = deque(self._loading, maxlen=1)
        return rest.pop() if rest else None

    def _with_relief(self, step: Callable[[], T], undo: Callable[[], object] = lambda: None) -> T:
        """Climb down: try again, then with three quarters of the phase's peak, then with the least it can do with."""
        for relieve in (self._give_back_what_is_free, self._keep_three_quarters, self._keep_the_least):
            try:
                return step()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # Outside of the handler: its traceback would keep the failed step's tensors alive.
            log.warning('phase "%s" ran out of device memory and goes on with less: %s', self.phase.name, reason)
            undo()
            relieve()
        try:
            return step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._exceeded() from error

    def _give_back_what_is_free(self) -> None:
        """What came ahead of the next phase goes, too, and for the rest of this phase nothing more comes."""
        self._drop_captures()
        self._trim()
        self._loading = self._residency.enter(self.phase)

    def _keep_three_quarters(self) -> None:
        own_bytes = self.phase.peak_bytes - self.phase.prefetch_bytes
        self._fall_back_to(max(1, own_bytes * 3 // 4 + self.plan.reserve_bytes))

    def _keep_the_least(self) -> None:
        self._fall_back_to(1)

    def _fall_back_to(self, vram_bytes: int) -> None:
        """Go on within so much, or with the least that will do."""
        try:
            self._go_on_within(Budget(vram_bytes, self._budget.ram_bytes))
        except InfeasibleBudgetError as error:
            self._go_on_within(Budget(error.needed_bytes, self._budget.ram_bytes))

    def _go_on_within(self, budget: Budget) -> None:
        self._adopt(self._replanned(budget))

    def _replanned(self, budget: Budget) -> Plan:
        """The rest of the turn within a budget: what has begun and is not over, or else the last to have begun, as a
        phase of its own; what has not begun, as it fits. Raises InfeasibleBudgetError."""
        begun = tuple(stage for stage in self._begun if stage not in self._over) or self._begun[-1:]
        return self._replan_for(budget, frozenset(self._over.difference(begun)), begun)

    def _adopt(self, plan: Plan) -> None:
        """Follow another plan from its first phase on; its weights come with the next step."""
        self._drop_captures()
        self.plan, self.phase = plan, plan.phases[0]
        self._residency.prepare(plan)
        self._enter()

    def _drop_captures(self) -> None:
        for drop in self._captures:
            drop()

    def _let_go(self) -> None:
        """What was held for a phase, when it is over."""
        self._drop_captures()
        self._captures.clear()
        self._caches.clear()

    def _enter(self) -> None:
        self._loading = self._residency.enter(self.phase, self._following)

    @property
    def _following(self) -> Phase | None:
        after = self.plan.phases.index(self.phase) + 1
        return self.plan.phases[after] if after < len(self.plan.phases) else None

    def _exceeded(self) -> BudgetExceededError:
        return BudgetExceededError(
            f'phase "{self.phase.name}" was planned to need {format_bytes(self.phase.peak_bytes)}, but the device ran'
            " out, and with the least that it can do with again",
            phase=self.phase.name,
            needed_bytes=self.phase.peak_bytes,
            hint="another program may have taken the room: name a smaller budget, or close it",
        )


def _is_smaller(budget: Budget, other: Budget) -> bool:
    unbounded = float("inf")
    return (budget.vram_bytes or unbounded) < (other.vram_bytes or unbounded)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch means by this error that the device has no room. cuBLAS and the driver say so in words of theirs:
    a workspace that cannot be made, and CUDA's error code 2 (cudaErrorMemoryAllocation)."""
    if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
        return True
    return isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", None) == 2
