"""Where each block of weights is right now: carries out a plan's placements, phase by phase.

A block's device copy is one run of bytes of which the module's parameters are views; offloading drops that run
(weights are immutable: nothing is ever copied back). A stage enters a block to use it and never learns whether it was
there, came for the phase or ahead of it, or came for this one use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor, nn

from .ahead import blocks_ahead, divide
from .block import Block, empty_run
from .host import HostCopies
from .placement import STREAM_SLOTS, Phase, Placement, Plan
from .prefetch import Prefetch
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
        self._prefetch: Prefetch | None = None
        """What is coming for the next phase. It has the transfer for itself: to send anything else, end it first."""
        self._residents: frozenset[str] = frozenset()
        self._past_misses = 0
        self.prefetched_bytes = 0
        """Bytes of weights that came ahead of their phase, in all turns so far."""
        self._uses = {
            name: tuple(BlockUse(block, self._runs, self._rings) for block in blocks)
            for name, blocks in components.items()
        }

    def component(self, name: str) -> tuple[BlockUse, ...]:
        """The blocks of a component, for a stage to walk; empty for a component the checkpoint does not have."""
        return self._uses.get(name, ())

    def whereabouts(self, component: str) -> tuple[int, ...] | None:
        """Addresses of a component's blocks, if all of them stay there from one step to the next; else None."""
        names = [block.name for block in self._components.get(component, ())]
        if not self._runs.keys() >= set(names):
            return None
        return tuple(self._runs[name].data_ptr() for name in names)

    def here(self) -> Callable[[], AbstractContextManager[object]]:
        """Contexts for other threads that change placements: what comes then is ordered as if this thread did it."""
        return self._streams.here()

    def prepare(self, plan: Plan) -> None:
        """Follow another plan on the host's side: copies of blocks that it does not want there are dropped."""
        self._end_prefetch()
        # A turn may compute in another stream than the one before, which may have ended while residents came.
        self._streams.wait(Lane.COMPUTE, self._streams.record(Lane.COPY))
        self._copies.prepare(plan.host_tiers)

    def enter(self, phase: Phase, following: Phase | None = None) -> Iterator[tuple[int, int]]:
        """Make the device hold what the phase places there, yielding (bytes so far, bytes in all) per block loaded.

        A phase names all that it keeps, residents of other phases included. Whatever it does not name leaves first, so
        that old and new never need the room together. Once all is there, as much of the `following` phase begins to
        come as this one lets. May be broken off, or fail, at any block: what is there then counts, and the next `enter`
        goes on from it. Raises CheckpointError and torch.OutOfMemoryError.
        """
        self.make_way(phase)
        staying, passing = divide(phase, self._components)
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
        if following and (coming := blocks_ahead(phase, following, self._components)):
            self._prefetch = Prefetch(coming, self._copies, self._streams, self._transfer.device)

    def make_way(self, phase: Phase) -> None:
        """Drop what the phase has no place for; `enter`, which does so too, is yet to come."""
        staying, passing = divide(phase, self._components)
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
        """Bytes of weights on the device now, slots and what is coming included."""
        coming_bytes = self._prefetch.n_bytes if self._prefetch else 0
        rings_bytes = sum(ring.n_bytes for ring in self._open_rings())
        return sum(run.nbytes for run in self._runs.values()) + rings_bytes + coming_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the copies that the host keeps now, beside the files."""
        return self._copies.n_bytes

    @property
    def misses(self) -> int:
        """How often a streamed block had to be fetched out of turn, because a walk had been broken off."""
        return self._past_misses + sum(ring.misses for ring in self._open_rings())

    def _end_prefetch(self) -> None:
        """What has come so far stays, like any other block, until a phase has no place for it."""
        if self._prefetch is None:
            return
        for block, run in self._prefetch.take():
            block.bind(run)
            self._runs[block.name] = run
            self.prefetched_bytes += block.n_bytes
        self._prefetch = None  # only now: where an interrupt ended the wait, whoever leaves waits again

    def _onload(self, block: Block) -> None:
        """Bring a block to stay."""
        run = empty_run(block.n_bytes, self._transfer.device)
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
        self._end_prefetch()
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
        self._trim()

    def _trim(self) -> None:
        """Also where no block goes: a phase's KV cache may have, and a small tensor that came to lie in its segment
        would keep all of that from the blocks to come."""
        self._transfer.trim()
