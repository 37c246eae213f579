"""Where each block of weights is right now: carries out a plan's placements, phase by phase.

A block's device copy is one run of bytes of which the module's parameters are views; offloading drops that run
(weights are immutable: nothing is ever copied back). A stage enters a block to use it and never learns whether it was
there, came for the phase, or came for this one use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import partial

import torch
from torch import Tensor, nn

from .block import Block
from .host import HostCopies
from .placement import STREAM_SLOTS, Phase, Placement, Plan, evenly_spaced
from .ring import Ring
from .streams import Lane
from .transfer import Transfer


class BlockUse:
    """A block as stages see it: entering gives the module with its weights on the device."""

    def __init__(self, block: Block, runs: Mapping[str, Tensor], rings: Mapping[str, Ring]) -> None:
        self._block = block
        self._name = block.name
        self._module = block.module
        self._runs = runs
        self._rings = rings

    def __enter__(self) -> nn.Module:
        if self._name not in self._runs:
            assert self._name in self._rings, f"{self._name} has no place in the phase that was entered last"
            self._rings[self._name].begin(self._block)
        return self._module

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._name not in self._runs:
            self._rings[self._name].end(self._block, broken_off=kind is not None)


class Residency:
    """The device copies of all blocks of `components` (component name to its blocks, in the order of their use), and
    through `transfer` the host's.

    A turn prepares its plan, enters its phases one after another, and leaves. Placements may change whenever no block
    is in use: `enter` again moves to them.
    """

    def __init__(self, components: Mapping[str, Sequence[Block]], transfer: Transfer) -> None:
        self._components = components
        self._transfer = transfer
        self._streams = transfer.streams
        self._copies = HostCopies(transfer)
        self._runs: dict[str, Tensor] = {}
        """By block, the bytes of those that stay for the phase or for good."""
        self._rings: dict[str, Ring] = {}
        """By block, the ring of those that pass through."""
        self._residents: frozenset[str] = frozenset()
        self._past_misses = 0
        self._uses = {
            name: tuple(BlockUse(block, self._runs, self._rings) for block in blocks)
            for name, blocks in components.items()
        }

    def component(self, name: str) -> tuple[BlockUse, ...]:
        """The blocks of a component, for a stage to walk; empty for a component the checkpoint does not have."""
        return self._uses.get(name, ())

    def prepare(self, plan: Plan) -> None:
        """Follow another plan on the host's side: copies of blocks that it does not want there are dropped."""
        self._copies.prepare(plan.host_tiers)

    def enter(self, phase: Phase) -> Iterator[tuple[int, int]]:
        """Make the device hold what the phase places there, yielding (bytes so far, bytes in all) per block loaded.

        A phase names all that it keeps, residents of other phases included. Whatever it does not name leaves first, so
        that old and new never need the room together. May be broken off, or fail, at any block: what is there then
        counts, and the next `enter` goes on from it. Raises CheckpointError and torch.OutOfMemoryError.
        """
        self.make_way(phase)
        staying, passing = self._divide(phase)
        self._residents = frozenset(
            b.name for c, p in phase.placements.items() if p is Placement.RESIDENT for b in self._components.get(c, ())
        )
        loads = [(block, partial(self._onload, block)) for block in staying if block.name not in self._runs]
        for blocks in passing:
            ring = self._ring(blocks)
            loads += [(block, partial(ring.load_next)) for block in ring.awaited()]
        done, total = 0, sum(block.n_bytes for block, _ in loads)
        for block, load in loads:
            load()
            done += block.n_bytes
            yield done, total

    def make_way(self, phase: Phase) -> None:
        """Drop what the phase has no place for; `enter`, which does so too, is yet to come."""
        staying, passing = self._divide(phase)
        self._drop_all_but({block.name for block in staying}, passing)

    def leave(self) -> None:
        """The turn is over: only what its last phase placed as resident stays."""
        self._drop_all_but(self._residents)

    def release(self) -> None:
        """Give everything back: the device's memory, and the host's copies and staging."""
        self._residents = frozenset()
        self.leave()
        self._copies.drop()
        self._transfer.release()

    @property
    def live_bytes(self) -> int:
        """Bytes of weights on the device now, slots included."""
        return sum(run.nbytes for run in self._runs.values()) + sum(ring.n_bytes for ring in self._open_rings())

    @property
    def host_bytes(self) -> int:
        """Bytes of the copies that the host keeps now, beside the files."""
        return self._copies.n_bytes

    @property
    def misses(self) -> int:
        """How often a streamed block had to be fetched out of turn, because a walk had been broken off."""
        return self._past_misses + sum(ring.misses for ring in self._open_rings())

    def _divide(self, phase: Phase) -> tuple[list[Block], list[tuple[Block, ...]]]:
        """The blocks that stay for the phase, and those that pass through slots, by component."""
        staying, passing = [], []
        for component, placement in phase.placements.items():
            blocks = tuple(self._components.get(component, ()))
            streamed = _streamed(blocks, phase.kept_layers.get(component, 0)) if placement is Placement.STREAMED else ()
            staying += [block for block in blocks if block not in streamed]
            passing += [streamed] if streamed else []
        return staying, passing

    def _onload(self, block: Block) -> None:
        """Bring a block to stay."""
        run = torch.empty(block.n_bytes, dtype=torch.uint8, device=self._transfer.device)
        # The allocator may have handed out what a kernel still under way reads.
        self._streams.wait(Lane.COPY, self._streams.record(Lane.COMPUTE))
        try:
            self._copies.send(block, run)
        finally:  # before it is used, and before its memory is anybody else's
            self._streams.wait(Lane.COMPUTE, self._streams.record(Lane.COPY))
        block.bind(run)
        self._runs[block.name] = run

    def _ring(self, blocks: tuple[Block, ...]) -> Ring:
        """The ring of these blocks: the one that is there, or a new one."""
        if blocks[0].name not in self._rings:
            ring = Ring(blocks, STREAM_SLOTS, self._copies, self._streams, self._transfer.device)
            self._rings.update((block.name, ring) for block in blocks)
        return self._rings[blocks[0].name]

    def _open_rings(self) -> Iterable[Ring]:
        return dict.fromkeys(self._rings.values())

    def _drop_all_but(self, staying: Set[str], passing: Sequence[tuple[Block, ...]] = ()) -> None:
        """Take off the device what is neither to stay nor in a ring of exactly these blocks."""
        blocks = [b for blocks in self._components.values() for b in blocks if b.name in self._runs.keys() - staying]
        rings = [ring for ring in self._open_rings() if ring.blocks not in passing]
        for block in blocks:
            block.unbind()
            del self._runs[block.name]
        for ring in rings:
            ring.close()
            self._past_misses += ring.misses
            for block in ring.blocks:
                del self._rings[block.name]
        if blocks or rings:
            self._transfer.trim()


def _streamed(blocks: tuple[Block, ...], kept_layers: int) -> tuple[Block, ...]:
    """Of a streamed component's blocks those that pass through slots: layers (the last block is none) that are not
    kept. When no more are left than there are slots, they stay too: that takes no more room."""
    layers = blocks[:-1]
    kept = evenly_spaced(len(layers), kept_layers)
    passing = tuple(layer for i, layer in enumerate(layers) if i not in kept)
    return passing if len(passing) > STREAM_SLOTS else ()
