"""The device as one turn has it: the phase in force, and the one way in which stages get a step done there.

Between two steps no block is in use, so that placements may change: another thread named a budget or wants the device
for a while (`Control`), or the device ran out. A step that ran out is undone and tried again with less held, until
nothing is left to give up. Stages that have begun together may then find themselves in phases apart: from there on they
take turns, each with its own weights and KV cache. Whatever happened on the way, the answer is the same.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
"""A plan within a budget for what is left of a turn: without the stages that are over, and with room for what those
remember that have begun."""

Terms = Callable[[int, int], AbstractContextManager[object]]
"""What a process lends while steps are computed: of (bytes that this turn holds, bytes of its budget)."""

CPU = torch.device("cpu")

WORDS_OF_LIBRARIES = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
)
"""What is left of an allocation that failed inside cuBLAS or cuDNN: a handle or a workspace that was not to be had.
Torch tries every convolution that cuDNN has, passes over those without room, and reports that none is left."""


def forget(cache: KVCache) -> None:
    """Keep nothing of a cache."""


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
    """One turn's hold on the device. `plan` is the one in force and `phase` the first of its phases that is not over.

    A step finds the phase of its own stage on the device, whichever that is. It is `phase`, but where another plan cut
    the pipe while stages waited for each other: then those get what they are at done, each in its phase, and whoever
    asks for the next step does so in `phase`.
    """

    def __init__(
        self,
        residency: Residency,
        device: torch.device,
        trim: Callable[[], None],
        free_bytes: Callable[[], int | None],
        control: Control,
        plan: Plan,
        replan: Replan,
    ) -> None:
        self.plan, self.phase = plan, plan.phases[0]
        self._present = self.phase
        """The phase whose weights and caches are on the device, or on their way, if `_is_settled`."""
        self._is_settled = False
        self._begun: tuple[str, ...] = ()
        self._over: set[str] = set()
        self._deciding = threading.RLock()
        """No stage begins while another thread asks in how little the rest would fit."""
        self._residency = residency
        self._here = residency.here()
        self._device = device
        self._trim = trim
        self._free_bytes = free_bytes
        self._control = control
        self._replan_for = replan
        self._budget = _budget_of(plan, control.budget)
        self._loading: Iterator[tuple[int, int]] = iter(())
        self._caches: dict[str, KVCache] = {}
        self._keepers: dict[str, Callable[[KVCache], None]] = {}
        self._captures: list[Callable[[], None]] = []
        self._is_loading = self._was_away = False
        self._terms: Terms | None = None
        self._lent = ExitStack()

    def phases(self) -> Iterator[Phase]:
        """Go through the plan's phases, or through those of whatever plan replaces it on the way, until all stages are
        over. A phase that has more stages than could begin in it comes again."""
        self._adopt(self.plan)
        while True:
            yield self.phase
            self._let_go()
            if self._over.issuperset(self.phase.stages):
                if self._following is None:
                    return
                with self._deciding:
                    self.phase = self._following
                    self._heed_budget()
            self._is_settled = False
            self._residency.make_way(self.phase)  # now, so that nobody counts the last phase's weights as this one's

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV caches that are on the device now."""
        return sum(cache.n_bytes for cache in self._caches.values() if cache.device == self._device)

    def begin(self, stage: str) -> bool:
        """Whether a stage begins now, as one of the phase in force. From then on plans count what it remembers.

        It is never the second before the first: where another plan joins phases after the first was asked for in vain,
        both begin when their phase comes again.
        """
        with self._deciding:
            self._heed_budget()
            begins = stage == next((other for other in self.phase.stages if other not in self._begun), None)
            if begins:
                self._begun = (*self._begun, stage)
            return begins

    def end(self, stage: str) -> None:
        """A stage is over. Its weights and its cache stay for the phase, but another plan for the rest of the turn will
        do without them."""
        self._over.add(stage)

    def accept(self, budget: Budget) -> None:
        """Promise, to any thread, to keep within another budget from the next step on.

        Raises InfeasibleBudgetError, and promises nothing, when what is left of the turn cannot run in so little.
        """
        with self._deciding:
            self._replanned(budget)
            self._control.set_budget(budget)

    def load(self) -> Iterator[tuple[int, int]]:
        """Bring the phase's weights, yielding (bytes so far, bytes in all).

        Ends early where the device was given away meanwhile: else who takes it at each block would wait for ever for
        the last. The next step brings the rest.
        """
        self._is_loading, self._was_away = True, False
        try:
            while (progress := self._with_relief(self._load_next)) is not None:
                yield progress
        finally:
            self._is_loading = False

    def hold(self, stage: str, make_cache: Callable[[], KVCache], keep: Callable[[KVCache], None] = forget) -> KVCache:
        """A stage's cache, on the device whenever its phase is. `keep` sees it, wherever it is, before it is let go."""
        cache = self.attempt(make_cache, stage=stage)
        self._caches[stage], self._keepers[stage] = cache, keep
        return cache

    def before_moving(self, drop: Callable[[], None]) -> None:
        """Have `drop` called before weights or caches go elsewhere, and when a phase is over."""
        self._captures.append(drop)

    def attempt(self, step: Callable[[], T], undo: Callable[[], object] = lambda: None, stage: str | None = None) -> T:
        """The result of `step`, computed as soon as the phase of its stage (None: the one in force) has the device, and
        again after `undo` if that runs out.

        Raises Cancelled in its place when the turn is cancelled, BudgetExceededError when nothing is left to give up.
        """

        def when_ready() -> T:
            self._heed(stage)
            for _ in self._loading:
                pass
            return step()

        return self._with_relief(when_ready, undo)

    @contextmanager
    def computing(self, terms: Terms) -> Iterator[None]:
        """Inside, `terms` hold: for the budget in force, whenever another one comes into force for that, and not while
        the turn waits for the device."""
        self._terms = terms
        with self._lent:
            try:
                self._borrow()
                yield
            finally:
                self._terms = None

    def _borrow(self) -> None:
        """Take what is lent, if anything is, for the budget of now."""
        self._lent.close()
        if self._terms and self._budget.vram_bytes is not None:
            held_bytes = self._residency.live_bytes + self.kv_bytes
            self._lent.enter_context(self._terms(held_bytes, self._budget.vram_bytes))

    def adapt(self) -> None:
        """Let go now of what is to go, for a thread that has stopped the turn between two steps.

        What is to come does so with the next one: who asks for room waits for no file.
        """
        with self._here():
            if self._control.released:
                self._step_aside()
                self._heed_budget()
            else:
                self._with_relief(self._settle)

    def leave(self) -> None:
        """The turn is over: only residents stay, or nothing if the device was asked back."""
        self._drop_captures()
        with self._here():  # whoever closes an answer may do so in another stream than its last step's
            self._residency.leave()
            if self._control.released:
                self._residency.release()
            for stage in [*self._caches]:  # last, since keeping one may take a second, in which somebody may interrupt
                self._let_go_of(stage)

    def _heed(self, stage: str | None = None) -> None:
        """Do what other threads asked for since the last step, and then have the stage's phase here."""
        if self._control.cancelled:
            raise Cancelled
        while self._control.released:
            self._step_aside()
            self._lent.close()
            self._control.wait_while_released()
            if self._control.cancelled:
                raise Cancelled
            self._borrow()
        self._settle(stage)

    def _settle(self, stage: str | None = None) -> None:
        """Have the phase of a stage here (None: the one in force), within the budget of the moment."""
        self._heed_budget()
        phase = next((phase for phase in self.plan.phases if stage in phase.stages), self.phase)
        if not (self._is_settled and phase is self._present):
            self._go_to(phase)

    def _heed_budget(self) -> None:
        """Keep within another budget. While weights come only a smaller one counts, and a larger one once they are
        there: else who changes it at each of them would wait for ever for the last."""
        budget = self._control.budget
        if budget is self._budget or (self._is_loading and not _is_smaller(budget, self._budget)):
            return
        self._budget = budget
        self._go_on_within(budget)
        self._borrow()

    def _step_aside(self) -> None:
        """Leave the device: weights are dropped, caches wait on the host, small states stay."""
        self._drop_captures()
        self._is_settled, self._was_away = False, True
        self._residency.release()
        for cache in self._caches.values():
            cache.move(CPU)
        self._trim()

    def _go_to(self, phase: Phase) -> None:
        """Have a phase's caches here, and its weights with the next steps. What has no place in it goes first."""
        self._drop_captures()
        self._present, self._is_settled = phase, False
        for stage in self._caches.keys() - set(phase.stages):
            self._caches[stage].move(CPU)
        self._residency.make_way(phase)
        for stage in self._caches.keys() & set(phase.stages):
            self._caches[stage].move(self._device)
        self._loading = self._residency.enter(phase, self._following if phase is self.phase else None)
        self._is_settled = True

    def _load_next(self) -> tuple[int, int] | None:
        """One block more, if there is one and the device was not given away meanwhile."""
        self._heed()
        return None if self._was_away else next(self._loading, None)

    def _with_relief(self, step: Callable[[], T], undo: Callable[[], object] = lambda: None) -> T:
        """Climb down: try again, then twice with three quarters of the phase's peak, or what others have left of that,
        then with the least it can do with."""
        rungs = (self._give_back_what_is_free, self._keep_what_is_left, self._keep_what_is_left, self._keep_the_least)
        for relieve in rungs:
            try:
                return step()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # Outside of the handler: its traceback would keep the failed step's tensors alive.
            log.warning('phase "%s" ran out of device memory and goes on with less: %s', self._present.name, reason)
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
        self._loading = self._residency.enter(self._present)

    def _keep_what_is_left(self) -> None:
        self._drop_captures()
        self._trim()
        own_bytes = self._present.peak_bytes - self._present.prefetch_bytes
        vram_bytes = max(1, own_bytes * 3 // 4 + self.plan.reserve_bytes)
        if (free_bytes := self._free_bytes()) is not None:
            vram_bytes = min(vram_bytes, self._residency.live_bytes + self.kv_bytes + free_bytes)
        self._fall_back_to(vram_bytes)

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
        """The rest of the turn within a budget. Raises InfeasibleBudgetError."""
        begun = tuple(stage for stage in self._begun if stage not in self._over)
        return self._replan_for(budget, frozenset(self._over), begun)

    def _adopt(self, plan: Plan) -> None:
        """Follow another plan from its first phase on; weights and caches come and go with the next step."""
        self._let_go()
        self.plan, self.phase = plan, plan.phases[0]
        self._is_settled = False
        self._residency.prepare(plan)

    def _let_go(self) -> None:
        """What is held for stages that are over."""
        self._drop_captures()
        for stage in self._caches.keys() & self._over:
            self._let_go_of(stage)

    def _let_go_of(self, stage: str) -> None:
        self._keepers.pop(stage)(self._caches.pop(stage))

    def _drop_captures(self) -> None:
        for drop in self._captures:
            drop()

    @property
    def _following(self) -> Phase | None:
        """The next phase that is not over."""
        after = self.plan.phases[self.plan.phases.index(self.phase) + 1 :]
        return next((phase for phase in after if not self._over.issuperset(phase.stages)), None)

    def _exceeded(self) -> BudgetExceededError:
        phase = self._present
        return BudgetExceededError(
            f'phase "{phase.name}" was planned to need {format_bytes(phase.peak_bytes)}, but the device ran out, and'
            " with the least that it can do with again",
            phase=phase.name,
            needed_bytes=phase.peak_bytes,
            hint="another program may have taken the room: name a smaller budget, or close it",
        )


def _budget_of(plan: Plan, named: Budget) -> Budget:
    """What a plan was made for. That may be another one than is named by now: then it is to be heeded yet."""
    made_for = Budget(plan.budget_bytes, plan.ram_bytes)
    return named if named == made_for else made_for


def _is_smaller(budget: Budget, other: Budget) -> bool:
    unbounded = float("inf")
    return (budget.vram_bytes or unbounded) < (other.vram_bytes or unbounded)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch means by this error that the device has no room. Libraries and the driver say so in words of
    theirs: `WORDS_OF_LIBRARIES`, and CUDA's error code 2 (cudaErrorMemoryAllocation)."""
    if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in WORDS_OF_LIBRARIES):
        return True
    return isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", None) == 2
