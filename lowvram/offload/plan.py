"""Sizes and a budget to a plan: which stages share the device, and where each component's weights are meanwhile.

Pure arithmetic over a footprint; nothing is allocated and nothing is measured. The plan is data (`placement`): what
executes it consumes the object that was priced (`prices`) and chosen (`search`) here. A phase is a set of neighbouring
stages that share the device; inside it they run as one pipe, across a boundary the upstream is drained first.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from ..errors import InfeasibleBudgetError, OptionError
from ..options import Limits
from .ahead import with_prefetch
from .budget import MIB, Budget
from .footprint import Footprint
from .placement import STREAM_SLOTS, HostTier, Phase, Placement, Plan, evenly_spaced
from .prices import COMPONENTS, PREFILL_STAGES, Prices, Turn
from .ram import choose_tiers, host_bytes
from .refusal import refuse_ram, refuse_vram, suggestions
from .search import Choice, best_choice, leanest_choice

__all__ = [
    "COMPONENTS",
    "STREAM_SLOTS",
    "HostTier",
    "Phase",
    "Placement",
    "Plan",
    "Turn",
    "evenly_spaced",
    "plan_memory",
    "smallest_budget_bytes",
]

CONTEXT_BYTES = 350 * MIB
"""The CUDA context and its loaded kernels, on an Ampere card: mostly taken when free memory is asked for. This and the
next two are estimates, not yet measured on a card."""

WORKSPACE_BYTES = 64 * MIB
"""What kernels work in and no trace sees: cuBLAS (8 MiB a stream, 32 on Hopper), cuDNN, attention's partial sums."""

SLACK_BYTES = 98 * MIB
"""8 for tables that stay, 90 for the allocator's rounding."""

NO_LIMIT_BYTES = 2**63

VERBS = {
    "conditioning": "condition",
    "audio_tower": "hear",
    "visual": "see",
    "thinker": "think",
    "talker": "talk",
    "token2wav": "sound",
}


def plan_memory(
    footprint: Footprint,
    budget: Budget,
    limits: Limits,
    turn: Turn,
    *,
    device: str = "cuda",
    over: Set[str] = frozenset(),
    begun: Iterable[str] = (),
) -> Plan:
    """The best plan for `turn` that keeps within `budget`; without a VRAM budget, everything resident in one phase.

    When what is left of a turn is planned anew, stages that are `over` are left out (of all but the last, when all
    are), and those that have `begun` hold what they remember while they wait for their phase: KV caches on the host,
    the rest, which is small, on the device. On a CPU device and host share the RAM budget.

    Raises InfeasibleBudgetError, with the smallest budget that works and what giving something up would save, when
    none fits; OptionError when speech is asked of a checkpoint that has none.
    """
    if turn.codes and not footprint.speaks:
        raise OptionError("speech was asked for, but this checkpoint has no talker", hint="--no-speech")
    task = _Task(_prices(footprint, limits, turn, frozenset(begun), device), device, over)
    if budget.ram_bytes is not None and task.host_bytes > budget.ram_bytes:
        raise refuse_ram(turn, task.host_bytes, budget.ram_bytes)
    budget_bytes = task.device_budget_bytes(budget)
    room_bytes = NO_LIMIT_BYTES if budget_bytes is None else budget_bytes - task.reserve_bytes
    choice = best_choice(task.prices, task.stages, room_bytes)
    if choice is None:
        raise _refusal(task, budget)
    return task.plan(choice, budget_bytes, budget.ram_bytes)


def smallest_budget_bytes(footprint: Footprint, limits: Limits, turn: Turn, *, device: str = "cuda") -> int:
    """The least VRAM in which `turn` runs: one stage at a time, everything streamed that can be, smallest chunks."""
    return _Task(_prices(footprint, limits, turn, frozenset(), device), device).smallest_budget_bytes


def _prices(footprint: Footprint, limits: Limits, turn: Turn, begun: frozenset[str], device: str) -> Prices:
    return Prices(footprint.speaking_in(turn.speech_dtype), limits, turn, begun, device.startswith("cpu"))


@dataclass(frozen=True)
class _Task:
    """A turn on a checkpoint and a device, or what is left of it."""

    prices: Prices
    device: str
    over: Set[str] = frozenset()

    @property
    def stages(self) -> tuple[str, ...]:
        stages = self.prices.turn.stages
        return tuple(stage for stage in stages if stage not in self.over) or stages[-1:]

    @property
    def has_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def reserve_bytes(self) -> int:
        return CONTEXT_BYTES + WORKSPACE_BYTES + SLACK_BYTES if self.has_cuda else 0

    @property
    def host_bytes(self) -> int:
        return host_bytes(self.prices.footprint, self.prices.turn, has_cuda=self.has_cuda)

    @property
    def leanest_phases(self) -> tuple[Phase, ...]:
        return phases_of(self.prices, leanest_choice(self.prices, self.stages))

    @property
    def smallest_budget_bytes(self) -> int:
        return max(phase.peak_bytes for phase in self.leanest_phases) + self.reserve_bytes

    def device_budget_bytes(self, budget: Budget) -> int | None:
        """What the budget leaves to the device, which on a CPU is what the host does not take of the RAM."""
        if budget.ram_bytes is None or not self.device.startswith("cpu"):
            return budget.vram_bytes
        left_bytes = budget.ram_bytes - self.host_bytes
        return left_bytes if budget.vram_bytes is None else min(left_bytes, budget.vram_bytes)

    def plan(self, choice: Choice, budget_bytes: int | None, ram_bytes: int | None) -> Plan:
        turn, limits, tiers = self.prices.turn, self.prices.limits, {}
        host_bytes = self.host_bytes + self._waiting_bytes(choice)
        blocks = {block.name: block.n_bytes for some in self.prices.footprint.components.values() for block in some}
        if ram_bytes is not None and self.has_cuda:
            tiers = choose_tiers(self.prices.footprint, choice, ram_bytes - host_bytes, ram_bytes)
        asked = {"audio_tower": limits.audio_chunk_windows, "visual": limits.vision_chunk_patches}
        chunks = asked | {stage: way.chunk for stage, way in choice.ways.items()}
        prefill_tokens = (chunks.get(stage) for stage in PREFILL_STAGES)
        return Plan(
            device=self.device,
            budget_bytes=budget_bytes,
            phases=self._with_prefetch(phases_of(self.prices, choice)),
            prompt_tokens=turn.prompt_tokens,
            text_tokens=turn.text_tokens,
            codes=turn.codes,
            prefill_chunk_tokens=next(filter(None, prefill_tokens), limits.prefill_chunk_tokens),
            vision_chunk_patches=chunks["visual"],
            audio_chunk_windows=chunks["audio_tower"],
            kv=turn.kv,
            context_bytes=CONTEXT_BYTES if self.has_cuda else 0,
            workspace_bytes=WORKSPACE_BYTES if self.has_cuda else 0,
            slack_bytes=SLACK_BYTES if self.has_cuda else 0,
            ram_bytes=ram_bytes,
            host_bytes=host_bytes + sum(blocks[name] for name in tiers),
            host_tiers=tiers,
            smallest_budget_bytes=self.smallest_budget_bytes,
        )

    def _waiting_bytes(self, choice: Choice) -> int:
        """KV caches on the host at once. They are counted, never refused: without room for them no answer could step
        aside."""
        return 0 if self.prices.host_is_device else max(map(self.prices.waiting_kv_bytes, choice.phases))

    def _with_prefetch(self, phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        """On a CPU weights are read by those who compute: nothing would be gained by doing it earlier."""
        return phases if self.device.startswith("cpu") else with_prefetch(phases, self.prices.footprint.components)


def phases_of(prices: Prices, choice: Choice) -> tuple[Phase, ...]:
    """The phases of a choice, each with its bytes."""
    return tuple(_phase(prices, choice, stages) for stages in choice.phases)


def _phase(prices: Prices, choice: Choice, stages: tuple[str, ...]) -> Phase:
    ways = [choice.ways[stage] for stage in stages]
    holdings = {c: holding for way in ways for c, holding in zip(COMPONENTS[way.stage], way.holdings, strict=True)}
    streamed = {component: holding for component, holding in holdings.items() if not holding.is_whole}
    placements = {}
    for component in (c for stage in choice.ways for c in COMPONENTS[stage]):
        if component in choice.residents:
            placements[component] = Placement.RESIDENT
        elif component in holdings:
            placements[component] = Placement.STREAMED if component in streamed else Placement.PHASE
    guests = [component for component in choice.residents if component not in holdings]
    size_of, device_bytes = prices.footprint.component_bytes, prices.footprint.device_bytes
    return Phase(
        name="+".join(VERBS[stage] for stage in stages),
        stages=stages,
        placements=placements,
        weights_bytes=sum(way.held_bytes for way in ways) + sum(map(device_bytes, guests)),
        kv_bytes=sum(way.kv_bytes for way in ways) + prices.kept_kv_bytes(stages),
        activation_bytes=max(way.activation_bytes for way in ways) + prices.state_bytes(stages),
        traffic_bytes=sum(way.repeated_bytes for way in ways)
        + sum(size_of(component) for component in holdings if component not in choice.residents),
        kept_layers={component: holding.kept_layers for component, holding in streamed.items()},
        streamed_layers={component: holding.streamed_layers for component, holding in streamed.items()},
    )


def _refusal(task: _Task, budget: Budget) -> InfeasibleBudgetError:
    """Why the turn does not fit, and, unless it has begun, what could be given up."""
    prices, budget_bytes = task.prices, task.device_budget_bytes(budget)
    assert budget_bytes is not None, "without a limit everything fits"
    binding = max(task.leanest_phases, key=lambda phase: phase.peak_bytes)

    def needed_bytes(turn: Turn) -> int:
        return smallest_budget_bytes(prices.footprint, prices.limits, turn, device=task.device)

    savings = [] if task.over or prices.begun else suggestions(prices.turn, task.smallest_budget_bytes, needed_bytes)
    if budget.ram_bytes is not None and budget_bytes != budget.vram_bytes:  # it is what a CPU's RAM leaves
        return refuse_ram(prices.turn, task.smallest_budget_bytes + task.host_bytes, budget.ram_bytes, savings)
    return refuse_vram(prices.turn, binding, task.reserve_bytes, budget_bytes, savings)
