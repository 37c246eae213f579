"""Real blocks of toy size, a reader that serves their tensors from memory, and walks over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lowvram.checkpoint import TensorEntry
from lowvram.errors import CheckpointError
from lowvram.offload.placement import Phase, Placement
from lowvram.offload.residency import BlockUse
from lowvram.offload.streams import InOrder
from lowvram.offload.transfer import Transfer
from lowvram.weights import WeightBlock

CPU = torch.device("cpu")
KINDS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint8: "U8",
}


@dataclass
class Shelf:
    """Stored tensors by name, read as a checkpoint's would be.

    `reads` lists what was asked for, `largest_bytes` is the most at once; `on_write` hears of each buffer it fills, and
    reading a tensor named in `damaged` fails.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    largest_bytes: int = 0
    on_write: Callable[[memoryview], None] = lambda buffer: None
    damaged: set[str] = field(default_factory=set)

    def entries(self) -> dict[str, TensorEntry]:
        return {
            name: TensorEntry(name, Path("shelf"), KINDS[t.dtype], tuple(t.shape), 0, t.nbytes)
            for name, t in self.tensors.items()
        }

    def read_into(self, entry: TensorEntry, buffer: memoryview, start: int = 0) -> None:
        if entry.name in self.damaged:
            raise CheckpointError(f"shelf is truncated at {entry.name}", tensor=entry.name)
        stored = self.tensors[entry.name].reshape(-1).view(torch.uint8).numpy()
        buffer[:] = stored[start : start + len(buffer)].tobytes()
        self.reads.append(entry.name)
        self.largest_bytes = max(self.largest_bytes, len(buffer))
        self.on_write(buffer)


class Locks(InOrder):
    """Notes which pages are locked; refuses once `limit_bytes` would be passed."""

    def __init__(self, limit_bytes: int = 1 << 40) -> None:
        super().__init__(apart=True)
        self.locked: dict[int, int] = {}
        self._limit_bytes = limit_bytes

    def lock_pages(self, pages: torch.Tensor) -> bool:
        if sum(self.locked.values()) + pages.nbytes > self._limit_bytes:
            return False
        assert pages.data_ptr() not in self.locked
        self.locked[pages.data_ptr()] = pages.nbytes
        return True

    def unlock_pages(self, pages: torch.Tensor) -> None:
        assert self.locked.pop(pages.data_ptr()) == pages.nbytes


def stack(
    shelf: Shelf, transfer: Transfer, component: str, widths: Sequence[int], stored: torch.dtype = torch.float32
) -> tuple[WeightBlock, ...]:
    """A component's blocks, one linear of `widths[i]` float32 weights each, all of them equal to i + 1 plus a fraction
    that is the component's own. The last is its rest."""
    fraction = sum(map(ord, component)) % 8 / 8
    blocks = []
    for i, width in enumerate(widths):
        name = f"{component}.{i}"
        shelf.tensors[f"{name}.weight"] = torch.full((1, width), i + 1 + fraction, dtype=stored)
        linear = nn.Linear(width, 1, bias=False, device="meta")
        blocks.append(WeightBlock(name, linear, f"{name}.", shelf.entries(), transfer, torch.float32))
    return tuple(blocks)


def expected(component: str, i: int) -> float:
    """The value of every weight of a component's block."""
    return i + 1 + sum(map(ord, component)) % 8 / 8


def phase(kept: Mapping[str, int] | None = None, **placements: Placement) -> Phase:
    """A phase that matters for its placements alone."""
    return Phase("phase", (), placements, 0, 0, 0, 0, kept_layers=kept or {})


def walk(uses: Sequence[BlockUse]) -> list[float]:
    """Use blocks one after another; the first and the last weight that each was seen with, if they agree."""
    seen = []
    for use in uses:
        with use as linear:
            first, last = (float(weight) for weight in linear.weight.clone()[0, [0, -1]])
            assert first == last
            seen.append(first)
    return seen
