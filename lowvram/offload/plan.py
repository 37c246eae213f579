"""Sizes and a budget to a plan: which stages share the device, and where each component's weights are meanwhile.

Pure arithmetic over a footprint; nothing is allocated and nothing is measured. The plan is data: what executes it
consumes the object that was priced here. A phase is a set of neighbouring stages that share the device; inside it
they run as one pipe, across a boundary the upstream is drained first.

All ways to run a turn are weighed by what a listener notices, in this order: weights that cross the bus again and
again, tokens and codes that are written before the first sound because the pipe is cut, prefill passes, and weights
moved once per turn. A larger budget only adds ways, so in this order it never makes a plan worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from itertools import combinations, groupby, pairwise
from typing import Any

from ..errors import InfeasibleBudgetError, OptionError
from ..options import Limits
from .budget import GIB, MIB, Budget, format_bytes
from .footprint import Footprint

COMPONENTS = {
    "audio_tower": ("audio_tower",),
    "visual": ("visual",),
    "thinker": ("thinker", "lm_head"),
    "talker": ("talker",),
    "token2wav": ("dit", "bigvgan"),
}
"""The components that each stage computes with, stages in the order of a turn."""

STREAMABLE = ("audio_tower", "visual", "thinker", "talker")
"""Components of many blocks; the others are one block, and to stream them would save nothing."""

STREAM_SLOTS = 1
"""Blocks of a streamed component on the device at once."""

SMALLER_CHUNKS = (512, 256, 128)
"""Prefill chunks tried below the chosen one. 128 tokens of a 7B are 25 MiB: little is left to gain beneath."""

RESERVE_BYTES = 512 * MIB
"""Device memory outside the phases' own count. An estimate, not yet measured on a card: 350 MiB for the CUDA context
and its loaded kernels, 64 for cuBLAS and dequantizing workspaces, 8 for tables that stay, 90 for the allocator's
rounding."""

VERBS = {"audio_tower": "hear", "visual": "see", "thinker": "think", "talker": "talk", "token2wav": "sound"}
TALKER_FRAME_TOKENS = 2
"""The talker reads two rows between the prompt and the first code: the voice's beginning and the first reply row."""


class Placement(StrEnum):
    """Where a component's weights are: on the device across phases and turns, for its phase, or block by block."""

    RESIDENT = "resident"
    PHASE = "phase"
    STREAMED = "streamed"


class HostTier(StrEnum):
    """Where the host keeps a block it sends to the device: page-locked, in ordinary memory, or only in its file."""

    PINNED = "pinned"
    PAGEABLE = "pageable"
    FILE = "file"


def evenly_spaced(layers: int, kept: int) -> frozenset[int]:
    """Which `kept` of `layers` stay: spread out, so that copies of the others overlap with computing them."""
    assert 0 <= kept <= layers, (kept, layers)
    return frozenset(i * layers // kept for i in range(kept))


@dataclass(frozen=True)
class Turn:
    """The work of one turn, as far as memory cares.

    `visual_patches` is the largest image or temporal patch (a pair of frames), in patches of 14 x 14 pixels before
    merging; `visuals` how many images and temporal patches there are in all. `text_tokens` and `codes` are the most
    that may be written; 0 codes is a turn without speech. `speech_chunk_codes` and `ode_evaluations` say how speech
    is decoded (a chunk of 0.96 s, ten Euler points).
    """

    prompt_tokens: int
    text_tokens: int
    codes: int = 0
    visual_patches: int = 0
    visuals: int = 0
    audio_windows: int = 0
    speech_chunk_codes: int = 48
    ode_evaluations: int = 9

    def __post_init__(self) -> None:
        assert self.prompt_tokens >= 1 and self.text_tokens >= 1 and self.codes >= 0, self
        assert (self.visual_patches > 0) == (self.visuals > 0) and self.audio_windows >= 0, self

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages this turn needs, in order."""
        needed = {
            "audio_tower": self.audio_windows > 0,
            "visual": self.visuals > 0,
            "thinker": True,
            "talker": self.codes > 0,
            "token2wav": self.codes > 0,
        }
        return tuple(stage for stage in COMPONENTS if needed[stage])


@dataclass(frozen=True)
class Phase:
    """Stages that share the device. `placements` names every component that is on it, those of other phases that are
    resident included; `weights_bytes` is what they hold at once and `traffic_bytes` what a turn moves for them.

    Of a streamed component `kept_layers` layers (0 where it is not named) stay for the phase all the same, chosen by
    `evenly_spaced`, and so does its last block, which is no layer; the other layers pass through slots of their own.
    """

    name: str
    stages: tuple[str, ...]
    placements: Mapping[str, Placement]
    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    traffic_bytes: int
    kept_layers: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.activation_bytes


@dataclass(frozen=True)
class Plan:
    """How one turn runs inside a budget (None: no limit). Chunk sizes are what fits, at most what was asked for.

    `host_tiers` maps names of blocks to where the host keeps them; those it does not name are read from their file.
    """

    device: str
    budget_bytes: int | None
    phases: tuple[Phase, ...]
    prompt_tokens: int
    text_tokens: int
    codes: int
    prefill_chunk_tokens: int
    vision_chunk_patches: int
    audio_chunk_windows: int
    reserve_bytes: int
    host_tiers: Mapping[str, HostTier] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most the device holds at any time, reserve included."""
        return max(phase.peak_bytes for phase in self.phases) + self.reserve_bytes

    @property
    def traffic_bytes(self) -> int:
        """Weights moved to the device per turn, once the resident ones are there."""
        return sum(phase.traffic_bytes for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`, with the peak and the traffic for readers that do no sums."""
        return asdict(self) | {"peak_bytes": self.peak_bytes, "traffic_bytes": self.traffic_bytes}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote. Raises OptionError for anything else."""
        try:
            fields = {name: fields[name] for name in cls.__dataclass_fields__}
            return cls(**fields | {"phases": tuple(_phase_from_json(phase) for phase in fields["phases"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OptionError(f"this is not a plan: {error!r}", hint="pass what Plan.to_json() wrote") from error

    def __str__(self) -> str:
        rows = [("phase", "weights", "KV cache", "activ.", "peak", "GiB; where weights are"), *map(_row, self.phases)]
        width = max(len(row[0]) for row in rows)
        lines = ["  ".join((row[0].ljust(width), *(cell.rjust(8) for cell in row[1:5]), row[5])) for row in rows]
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        limit = "no limit" if self.budget_bytes is None else f"of {_gib(self.budget_bytes)} GiB"
        return (
            f"peak {_gib(self.peak_bytes)} GiB {limit} on {self.device}, {_gib(self.reserve_bytes)} in reserve;"
            f" {_gib(self.traffic_bytes)} GiB of weights move per turn; prefill in chunks of"
            f" {self.prefill_chunk_tokens} tokens"
        )


def plan_memory(footprint: Footprint, budget: Budget, limits: Limits, turn: Turn, *, device: str = "cuda") -> Plan:
    """The best plan for `turn` that keeps within `budget`; without a VRAM budget, everything resident in one phase.

    Raises InfeasibleBudgetError, with the smallest budget that works and what giving something up would save, when
    none fits; OptionError when speech is asked of a checkpoint that has none.
    """
    if turn.codes and not footprint.speaks:
        raise OptionError("speech was asked for, but this checkpoint has no talker", hint="--no-speech")
    work = _Work(footprint, limits, turn, device, budget.vram_bytes)
    if budget.vram_bytes is None:
        return work.plan(_Way((turn.stages,), frozenset(), work.chunks[0]), frozenset(work.components))
    for _, equals in groupby(sorted(work.ways(), key=work.burden), key=work.burden):
        fitting = [(way, resident) for way in equals if (resident := work.most_resident(way)) is not None]
        if fitting:
            return min((work.plan(*choice) for choice in fitting), key=_tie_break)
    raise _infeasible(work)


def smallest_budget_bytes(footprint: Footprint, limits: Limits, turn: Turn, *, device: str = "cuda") -> int:
    """The least VRAM in which `turn` runs: one stage at a time, everything streamed that can be, smallest chunks."""
    return _Work(footprint, limits, turn, device, None).leanest().peak_bytes


@dataclass(frozen=True)
class _Way:
    """One way to run a turn, but for which components stay: its phases, what is streamed, the prefill chunk."""

    phases: tuple[tuple[str, ...], ...]
    streamed: frozenset[str]
    chunk_tokens: int

    def cuts_after(self, stage: str) -> bool:
        """Whether what `stage` makes waits on the host for a later phase."""
        return any(stages[-1] == stage for stages in self.phases[:-1])


@dataclass(frozen=True)
class _Work:
    """A turn on a checkpoint: every price that the search asks for."""

    footprint: Footprint
    limits: Limits
    turn: Turn
    device: str
    budget_bytes: int | None

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(component for stage in self.turn.stages for component in COMPONENTS[stage])

    @property
    def chunks(self) -> tuple[int, ...]:
        largest = self.limits.prefill_chunk_tokens
        return (largest, *(chunk for chunk in SMALLER_CHUNKS if chunk < largest))

    @property
    def reserve_bytes(self) -> int:
        return RESERVE_BYTES if self.device.startswith("cuda") else 0

    def ways(self) -> Iterator[_Way]:
        """All ways to run the turn."""
        streamable = [component for component in STREAMABLE if component in self.components]
        for phases in _partitions(self.turn.stages):
            for streamed in _subsets(streamable):
                for chunk_tokens in self.chunks:
                    yield _Way(phases, streamed, chunk_tokens)

    def burden(self, way: _Way) -> tuple[int, int, int]:
        """What a listener notices of a way, most important first."""
        repeats = {component: self._passes(component, way) - 1 for component in way.streamed}
        repeated_bytes = sum(n * self.footprint.component_bytes(component) for component, n in repeats.items())
        drained = self.turn.text_tokens * way.cuts_after("thinker") + self.turn.codes * way.cuts_after("talker")
        return repeated_bytes, drained, self._passes("thinker", way)

    def most_resident(self, way: _Way) -> frozenset[str] | None:
        """The most bytes of components that can stay for good, or None if the way does not fit even without.

        A component that stays costs its bytes in every phase but its own, where it would be anyway.
        """
        assert self.budget_bytes is not None
        rooms = []
        for stages in way.phases:
            phase = self._phase(stages, way, frozenset())
            room_bytes = self.budget_bytes - self.reserve_bytes - phase.peak_bytes
            if room_bytes < 0:
                return None
            rooms.append((phase.placements.keys(), room_bytes))
        sizes = {c: self.footprint.component_bytes(c) for c in self.components if c not in way.streamed}
        fitting = (
            resident
            for resident in _subsets(sizes)
            if all(sum(sizes[c] for c in resident if c not in own) <= room_bytes for own, room_bytes in rooms)
        )
        return max(fitting, key=lambda resident: sum(sizes[c] for c in resident))

    def leanest(self) -> Plan:
        """The plan that needs least: no other way has a lower peak."""
        phases = tuple((stage,) for stage in self.turn.stages)
        streamed = frozenset(component for component in STREAMABLE if component in self.components)
        return self.plan(_Way(phases, streamed, self.chunks[-1]), frozenset())

    def plan(self, way: _Way, resident: frozenset[str]) -> Plan:
        return Plan(
            device=self.device,
            budget_bytes=self.budget_bytes,
            phases=tuple(self._phase(stages, way, resident) for stages in way.phases),
            prompt_tokens=self.turn.prompt_tokens,
            text_tokens=self.turn.text_tokens,
            codes=self.turn.codes,
            prefill_chunk_tokens=way.chunk_tokens,
            vision_chunk_patches=self.limits.vision_chunk_patches,
            audio_chunk_windows=self.limits.audio_chunk_windows,
            reserve_bytes=self.reserve_bytes,
        )

    def _phase(self, stages: tuple[str, ...], way: _Way, resident: frozenset[str]) -> Phase:
        own = [component for stage in stages for component in COMPONENTS[stage]]
        placements = {
            component: Placement.RESIDENT
            if component in resident
            else Placement.STREAMED
            if component in way.streamed
            else Placement.PHASE
            for component in self.components
            if component in own or component in resident
        }
        return Phase(
            name="+".join(VERBS[stage] for stage in stages),
            stages=stages,
            placements=placements,
            weights_bytes=sum(self._held_bytes(component, place) for component, place in placements.items()),
            kv_bytes=sum(self._kv_bytes(stage) for stage in stages),
            activation_bytes=self._activation_bytes(stages, way.chunk_tokens),
            traffic_bytes=sum(self._traffic_bytes(c, way) for c in own if c not in resident),
        )

    def _held_bytes(self, component: str, placement: Placement) -> int:
        if placement is Placement.STREAMED:
            return STREAM_SLOTS * self.footprint.largest_block_bytes(component)
        return self.footprint.component_bytes(component)

    def _traffic_bytes(self, component: str, way: _Way) -> int:
        """What a turn moves for a component that does not stay: once, or at every pass over it."""
        passes = self._passes(component, way) if component in way.streamed else 1
        return passes * self.footprint.component_bytes(component)

    def _passes(self, component: str, way: _Way) -> int:
        """How often a turn walks a component's blocks, at most."""
        turn = self.turn
        match component:
            case "audio_tower":
                return -(-turn.audio_windows // self.limits.audio_chunk_windows)
            case "visual":
                return turn.visuals
            case "thinker":
                return -(-turn.prompt_tokens // way.chunk_tokens) + turn.text_tokens
            case _:
                return -(-turn.prompt_tokens // way.chunk_tokens) + turn.codes

    def _kv_bytes(self, stage: str) -> int:
        """The caches are allocated whole, for the longest answer allowed."""
        turn, width_bytes = self.turn, self.footprint.width_bytes
        if stage == "thinker":
            return (turn.prompt_tokens + turn.text_tokens) * self.footprint.thinker.kv_bytes_per_token(width_bytes)
        if stage == "talker" and self.footprint.talker:
            tokens = turn.prompt_tokens + TALKER_FRAME_TOKENS + turn.codes
            return tokens * self.footprint.talker.kv_bytes_per_token(width_bytes)
        return 0

    def _activation_bytes(self, stages: Iterable[str], chunk_tokens: int) -> int:
        """Stages of a phase compute in turn, so the largest counts; what token2wav keeps meanwhile comes on top."""
        kept_bytes = 0
        if "token2wav" in stages and self.footprint.sound:
            kept_bytes = self.footprint.sound.state_bytes(self.turn.ode_evaluations)
        return kept_bytes + max(self._stage_bytes(stage, chunk_tokens) for stage in stages)

    def _stage_bytes(self, stage: str, chunk_tokens: int) -> int:
        turn, limits, footprint = self.turn, self.limits, self.footprint
        width_bytes, chunk_tokens = footprint.width_bytes, min(chunk_tokens, turn.prompt_tokens)
        match stage:
            case "audio_tower":
                windows = min(limits.audio_chunk_windows, turn.audio_windows)
                return footprint.audio.activation_bytes(windows, width_bytes)
            case "visual":
                # A run never takes less than one temporal patch, however small the chunk.
                patches = max(limits.vision_chunk_patches, turn.visual_patches)
                return footprint.visual.activation_bytes(patches, width_bytes)
            case "thinker":
                return footprint.thinker.activation_bytes(chunk_tokens, width_bytes)
            case "talker":
                assert footprint.talker
                return footprint.talker.activation_bytes(chunk_tokens, width_bytes)
            case _:
                assert footprint.sound
                return footprint.sound.activation_bytes(turn.speech_chunk_codes, turn.ode_evaluations)


def _partitions(stages: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """All ways to cut a row of stages into phases, from one phase to one stage each."""
    for cuts in _subsets(range(1, len(stages))):
        bounds = (0, *sorted(cuts), len(stages))
        yield tuple(stages[start:stop] for start, stop in pairwise(bounds))


def _subsets(items: Iterable[Any]) -> Iterator[frozenset[Any]]:
    """All subsets, small ones first, always in the same order."""
    pool = tuple(items)
    return (frozenset(chosen) for n in range(len(pool) + 1) for chosen in combinations(pool, n))


def _tie_break(plan: Plan) -> tuple[Any, ...]:
    placed = [(stage, *sorted(phase.placements.items())) for phase in plan.phases for stage in phase.stages]
    streamed = sum(Placement.STREAMED in phase.placements.values() for phase in plan.phases)
    return plan.traffic_bytes, len(plan.phases), streamed, -plan.prefill_chunk_tokens, plan.peak_bytes, placed


def _infeasible(work: _Work) -> InfeasibleBudgetError:
    """The refusal, with what would do: a larger budget, or less to remember."""
    leanest = work.leanest()
    binding = max(leanest.phases, key=lambda phase: phase.peak_bytes)
    assert work.budget_bytes is not None
    turn, smallest_bytes = work.turn, leanest.peak_bytes
    half = replace(turn, prompt_tokens=-(-turn.prompt_tokens // 2))
    less = {"without speech": replace(turn, codes=0), f"with a prompt of {half.prompt_tokens} tokens": half}
    needs = {what: replace(work, turn=turn).leanest().peak_bytes for what, turn in less.items()}
    savings = [f"{_mib(n_bytes)} {what}" for what, n_bytes in needs.items() if n_bytes < smallest_bytes]
    return InfeasibleBudgetError(
        f'phase "{binding.name}" needs {_mib(leanest.peak_bytes)} at the least for {turn.prompt_tokens} prompt tokens,'
        f" but the budget is {format_bytes(work.budget_bytes)}",
        phase=binding.name,
        needed_bytes=leanest.peak_bytes,
        available_bytes=work.budget_bytes,
        hint="; ".join([f"the smallest budget for this turn is {_mib(smallest_bytes)}", *savings]),
    )


def _phase_from_json(fields: Mapping[str, Any]) -> Phase:
    fields = {name: fields[name] for name in Phase.__dataclass_fields__}
    placements = {component: Placement(placement) for component, placement in fields["placements"].items()}
    return Phase(**fields | {"stages": tuple(fields["stages"]), "placements": placements})


def _row(phase: Phase) -> tuple[str, ...]:
    sizes = (phase.weights_bytes, phase.kv_bytes, phase.activation_bytes, phase.peak_bytes)
    placed = ", ".join(f"{component} {placement}" for component, placement in phase.placements.items())
    return phase.name, *map(_gib, sizes), placed


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f}"


def _mib(n_bytes: int) -> str:
    """Whole MiB, rounded up, so that the figure can be given as a budget and works."""
    return f"{math.ceil(n_bytes / MIB)} MiB"
