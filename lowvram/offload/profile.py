"""Peaks by phase, side by side: what was planned, what was traced, what was measured and how.

Each way of knowing is a column of its own under its own name, so that no figure can be taken for another kind. A
timeline shows one of them moment by moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .budget import format_bytes
from .plan import Plan

PLANNED = "planned"
TRACED = "traced"
SIMULATED_ALLOCATOR = "simulated allocator"
DEVICE_ALLOCATOR = "device allocator"
DEVICE_RESERVED = "device reserved"
TRACKED_LIVE_TENSORS = "tracked live tensors"
KINDS = (PLANNED, TRACED, SIMULATED_ALLOCATOR, DEVICE_ALLOCATOR, DEVICE_RESERVED, TRACKED_LIVE_TENSORS)
"""Computed from sizes; counted on fake tensors; what an allocator would reserve for those; and measured, by the two
kinds of meter: of a device's allocator, tensors and what it reserved for them."""


@dataclass(frozen=True)
class Moment:
    """What was held at one step of a turn, in bytes by kind, in the phase of that name. `activation_bytes` are all that
    is neither weights nor KV cache, at its highest since the moment before."""

    label: str
    phase: str
    weights_bytes: int
    kv_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.activation_bytes


@dataclass(frozen=True)
class MemoryProfile:
    """`columns` maps a kind (one of `KINDS`) to peak bytes by phase. A phase that a kind does not know is absent there.

    No column includes the plan's reserve: it stands for what none of them can see. `timeline` belongs to the kind that
    was counted last, traced or measured; a plan has none.
    """

    columns: Mapping[str, Mapping[str, int]]
    timeline: tuple[Moment, ...] = ()

    @classmethod
    def of(cls, plan: Plan) -> MemoryProfile:
        """The planned column."""
        return cls({PLANNED: {phase.name: phase.peak_bytes for phase in plan.phases}})

    def add(self, kind: str, peaks: Mapping[str, int], timeline: tuple[Moment, ...] = ()) -> MemoryProfile:
        """This profile with one more column; a kind that is there already keeps the higher peak of each phase."""
        assert kind in KINDS, kind
        known = self.columns.get(kind, {})
        merged = {phase: max(peaks.get(phase, 0), known.get(phase, 0)) for phase in {**known, **peaks}}
        return MemoryProfile({**self.columns, kind: merged}, timeline or self.timeline)

    @property
    def phases(self) -> tuple[str, ...]:
        """All phases, in the order in which the columns name them."""
        return tuple(dict.fromkeys(phase for peaks in self.columns.values() for phase in peaks))

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`: peak bytes by kind and phase."""
        return {kind: dict(peaks) for kind, peaks in self.columns.items()}

    def __str__(self) -> str:
        kinds = [kind for kind in KINDS if kind in self.columns]
        rows = [["phase", *kinds], *([phase, *(self._cell(kind, phase) for kind in kinds)] for phase in self.phases)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)

    def _cell(self, kind: str, phase: str) -> str:
        peaks = self.columns[kind]
        return format_bytes(peaks[phase]) if phase in peaks else "-"
