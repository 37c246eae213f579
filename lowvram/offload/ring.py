"""Weights that pass through: blocks walked again and again in one order, with room on the device for only some.

Each slot is device memory made once. While the block in one slot computes, the next block comes into another. The
order is kept by running through it, not by arithmetic on indices, and every use checks whose bytes a slot holds: if a
walk was broken off, the ring starts again at whatever block is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .block import Block, empty_run
from .host import HostCopies
from .streams import Event, Lane, Streams


@dataclass(eq=False)
class _Slot:
    """Room for one block: `block` is whose bytes are in `run`, or on their way, once `ready`; `free` is the point at
    which the last use of what was there before is done."""

    run: Tensor
    free: Event
    ready: Event | None = None
    block: Block | None = None


class Ring:
    """`blocks`, in the order of their use, through `n_slots` slots, each the size of the largest.

    `misses` counts uses that found another block in their slot than their own. Raises torch.OutOfMemoryError if the
    device has no room for the slots.
    """

    def __init__(
        self, blocks: Sequence[Block], n_slots: int, copies: HostCopies, streams: Streams, device: torch.device
    ) -> None:
        assert 1 <= n_slots <= len(blocks), (n_slots, len(blocks))
        self.blocks = tuple(blocks)
        self.misses = 0
        self._copies = copies
        self._streams = streams
        slot_bytes = max(block.n_bytes for block in blocks)
        runs = [empty_run(slot_bytes, device) for _ in range(n_slots)]
        free = streams.record(Lane.COMPUTE)  # the allocator may have handed out what a kernel still under way reads
        self._slots = deque(_Slot(run, free) for run in runs)
        """In the order of their next use, those without a block first."""
        self._coming = deque(blocks)
        """The cycle of blocks, beginning with the next to be loaded."""
        self._in_use: Block | None = None

    @property
    def n_bytes(self) -> int:
        """Device bytes of the slots."""
        return sum(slot.run.nbytes for slot in self._slots)

    def awaited(self) -> tuple[Block, ...]:
        """The blocks that the empty slots are for, to be loaded in this order."""
        empty = sum(slot.block is None for slot in self._slots)
        return tuple(islice(self._coming, empty))

    def load_next(self) -> None:
        """Start the copy of the next block into the slot whose use lies furthest back.

        Raises CheckpointError when the block's file cannot be read; the slot is then empty.
        """
        slot, block = self._slots[0], self._coming[0]
        slot.block = None
        self._streams.wait(Lane.COPY, slot.free)
        self._copies.send(block, slot.run[: block.n_bytes])
        slot.ready, slot.block = self._streams.record(Lane.COPY), block
        self._slots.rotate(-1)
        self._coming.rotate(-1)

    def begin(self, block: Block) -> None:
        """Bind `block` to its slot, for compute to use once it is there."""
        assert self._in_use is None, f"{block.name} is asked for while {self._in_use.name} of its ring is in use"
        if self._slots[0].block is not block:
            self.misses += 1
            self._start_at(block)
        slot = self._slots[0]
        self._streams.wait(Lane.COMPUTE, slot.ready)
        self._in_use = block
        block.bind(slot.run)

    def end(self, block: Block, *, broken_off: bool) -> None:
        """The use of `block` is over: its slot is the next block's, unless the walk was broken off."""
        self._in_use = None
        block.unbind()
        self._slots[0].free = self._streams.record(Lane.COMPUTE)
        if not broken_off:
            self.load_next()

    def close(self) -> None:
        """Give the slots back to the device, whatever had become of the last use."""
        if self._in_use is not None:  # an interrupt may come between `begin` and what it was for
            self._in_use.unbind()
        # What was loaded and never used is waited for here: memory is free for compute once its last copy is done.
        self._streams.wait(Lane.COMPUTE, self._streams.record(Lane.COPY))
        self._slots.clear()

    def _start_at(self, block: Block) -> None:
        self._coming.rotate(-self._coming.index(block))
        for _ in range(len(self._slots)):
            self.load_next()
