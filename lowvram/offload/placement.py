"""What a plan is: phases, what each places where and at how many bytes; as data, as JSON, and as a table for people.

Nothing is decided here. `search` makes plans, `residency` carries them out, and both mean the same by these words.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from ..errors import OptionError
from ..options import KV_PRECISIONS, KVPrecision
from .budget import GIB, MIB

STREAM_SLOTS = 2
"""Layers of a streamed component on the device at once: one computes while the next one comes."""

TABLE_COLUMNS = 120

KINDS: dict[str, Any] = {"int": int, "int | None": int | None, "str": str}
"""Of fields that JSON may have wrong, by annotation."""


class Placement(str, Enum):
    """Where a component's weights are: on the device across phases and turns, for its phase, or block by block."""

    __str__ = str.__str__

    RESIDENT = "resident"
    PHASE = "phase"
    STREAMED = "streamed"


class HostTier(str, Enum):
    """Where the host keeps a block it sends to the device: page-locked, in ordinary memory, or only in its file."""

    __str__ = str.__str__

    PINNED = "pinned"
    PAGEABLE = "pageable"
    FILE = "file"


def evenly_spaced(layers: int, kept: int) -> frozenset[int]:
    """Which `kept` of `layers` stay: spread out, so that copies of the others overlap with computing them."""
    assert 0 <= kept <= layers, (kept, layers)
    return frozenset(i * layers // kept for i in range(kept))


@dataclass(frozen=True)
class Phase:
    """Stages that share the device. `placements` names every component that is on it, those of other phases that are
    resident included; `weights_bytes` is what they hold at once and `traffic_bytes` what a turn moves for them.

    Of a streamed component `kept_layers` layers (0 where it is not named) stay for the phase all the same, chosen by
    `evenly_spaced`, and so does its last block, which is no layer; the other `streamed_layers` pass through
    `STREAM_SLOTS` slots of their own (or one, for one layer), each the size of the largest of them.

    So many as `prefetch_bytes` of the next phase's weights may come while this one computes: see `ahead`.
    """

    name: str
    stages: tuple[str, ...]
    placements: Mapping[str, Placement]
    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    traffic_bytes: int
    kept_layers: Mapping[str, int] = field(default_factory=dict)
    streamed_layers: Mapping[str, int] = field(default_factory=dict)
    prefetch_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.activation_bytes + self.prefetch_bytes


@dataclass(frozen=True)
class Plan:
    """How one turn runs inside a budget (None: no limit). Chunk sizes are what fits, at most what was asked for.

    Beside its phases the device holds a context (CUDA and its kernels), a workspace (inside cuBLAS and other kernels)
    and slack (tables that stay, the allocator's rounding). `kv` is how the caches store a number: in the compute dtype,
    or in 8 bits. `host_tiers` maps names of blocks to where the host keeps them; those it does not name are read from
    their file. `host_bytes` is what the process holds on the host, those blocks included, of `ram_bytes` (None: no
    limit). `smallest_budget_bytes` is the least budget in which this turn runs at all.
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
    kv: KVPrecision = "16bit"
    context_bytes: int = 0
    workspace_bytes: int = 0
    slack_bytes: int = 0
    ram_bytes: int | None = None
    host_bytes: int = 0
    host_tiers: Mapping[str, HostTier] = field(default_factory=dict)
    smallest_budget_bytes: int | None = None

    @property
    def reserve_bytes(self) -> int:
        """Device memory outside the phases' own count."""
        return self.context_bytes + self.workspace_bytes + self.slack_bytes

    @property
    def peak_bytes(self) -> int:
        """The most the device holds at any time, reserve included."""
        return max(phase.peak_bytes for phase in self.phases) + self.reserve_bytes

    @property
    def traffic_bytes(self) -> int:
        """Weights moved to the device per turn, once the resident ones are there."""
        return sum(phase.traffic_bytes for phase in self.phases)

    @property
    def placements(self) -> dict[str, dict[str, Placement]]:
        """Each component's placement by the name of the phase; absent where it is not on the device."""
        components = dict.fromkeys(component for phase in self.phases for component in phase.placements)
        return {
            component: {p.name: p.placements[component] for p in self.phases if component in p.placements}
            for component in components
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`, with sums and placements for readers that derive nothing."""
        return asdict(self) | {
            "peak_bytes": self.peak_bytes,
            "reserve_bytes": self.reserve_bytes,
            "traffic_bytes": self.traffic_bytes,
            "placements": self.placements,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote. Raises OptionError for anything else."""
        try:
            fields = _fields_of(cls, fields)
            phases = tuple(_phase_from_json(phase) for phase in fields["phases"])
            if not phases or fields["kv"] not in KV_PRECISIONS:
                raise ValueError(f"{len(phases)} phases with a KV cache in {fields['kv']!r}")
            tiers = {block: HostTier(tier) for block, tier in fields["host_tiers"].items()}
            return cls(**fields | {"phases": phases, "host_tiers": tiers})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OptionError(f"this is not a plan: {error!r}", hint="pass what Plan.to_json() wrote") from error

    def __str__(self) -> str:
        return "\n".join([*_table(self.phases), *self._summary()])

    def _summary(self) -> Iterator[str]:
        limit = "no limit" if self.budget_bytes is None else f"of {_gib(self.budget_bytes)} GiB"
        yield (
            f"peak {_gib(self.peak_bytes)} GiB {limit} on {self.device}, of it {_mib(self.context_bytes)} MiB context,"
            f" {_mib(self.workspace_bytes)} workspace, {_mib(self.slack_bytes)} slack"
        )
        yield (
            f"weights moved per turn: {_gib(self.traffic_bytes)} GiB; prefill in chunks of"
            f" {self.prefill_chunk_tokens} tokens; KV cache in {'int8' if self.kv == 'int8' else 'the compute dtype'}"
        )
        limit = "no limit" if self.ram_bytes is None else f"of {_gib(self.ram_bytes)} GiB"
        tiers = Counter(self.host_tiers.values())
        kept = " and ".join(f"{tiers[tier]} {tier}" for tier in HostTier if tiers[tier])
        yield f"host {_gib(self.host_bytes)} GiB {limit}{f', blocks of weights there: {kept}' if kept else ''}"


def _phase_from_json(fields: Mapping[str, Any]) -> Phase:
    fields = _fields_of(Phase, fields)
    placements = {component: Placement(placement) for component, placement in fields["placements"].items()}
    for layers in (*fields["kept_layers"].values(), *fields["streamed_layers"].values()):
        _require(layers, int, "a number of layers")
    return Phase(**fields | {"stages": tuple(fields["stages"]), "placements": placements})


def _fields_of(cls: type[Plan | Phase], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a class's fields, of which numbers and words are what their annotations say."""
    for name, known in cls.__dataclass_fields__.items():
        _require(values[name], KINDS.get(str(known.type), object), name)
    return {name: values[name] for name in cls.__dataclass_fields__}


def _require(value: object, kind: Any, name: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise ValueError(f"{name} is {value!r}")


def _table(phases: tuple[Phase, ...]) -> Iterator[str]:
    """One row per phase; what is long to tell of where weights are runs on below."""
    width = max(len(phase.name) for phase in phases)
    indent = width + 4 * 9 + 2
    yield "  ".join(("phase".ljust(width), "weights", "     KV", " activ.", "   peak", "GiB; where weights are"))
    for phase in phases:
        sizes = (phase.weights_bytes, phase.kv_bytes, phase.activation_bytes, phase.peak_bytes)
        first, *others = _whereabouts(phase, TABLE_COLUMNS - indent)
        yield "  ".join((phase.name.ljust(width), *(_gib(n_bytes).rjust(7) for n_bytes in sizes), first))
        yield from (" " * indent + line for line in others)


def _whereabouts(phase: Phase, width: int) -> list[str]:
    """ "thinker streamed, 12 of 28 layers stay; for the phase lm_head; resident dit": in one line, or in one each."""
    by_place = {place: [c for c, where in phase.placements.items() if where is place] for place in Placement}
    parts = [f"{component} streamed{_staying(phase, component)}" for component in by_place[Placement.STREAMED]]
    if by_place[Placement.PHASE]:
        parts.append(f"for the phase {', '.join(by_place[Placement.PHASE])}")
    if by_place[Placement.RESIDENT]:
        only = len(by_place[Placement.RESIDENT]) == len(phase.placements)
        parts.append("all resident" if only else f"resident {', '.join(by_place[Placement.RESIDENT])}")
    if phase.prefetch_bytes:
        parts.append(f"{_gib(phase.prefetch_bytes)} GiB of the next phase come ahead")
    line = "; ".join(parts)
    return [line] if len(line) <= width else [line for part in parts for line in textwrap.wrap(part, width)]


def _staying(phase: Phase, component: str) -> str:
    kept = phase.kept_layers.get(component, 0)
    return f", {kept} of {kept + phase.streamed_layers.get(component, 0)} layers stay" if kept else ""


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f}"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / MIB:.0f}"
