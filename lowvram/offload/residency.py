"""Where each block of weights is right now: carries out a plan's placements, phase by phase.

A block is weights that move as one. Its device copy is one run of bytes of which the module's parameters are views;
offloading drops that run (weights are immutable: nothing is ever copied back). A stage enters a block to use it and
never learns whether it was there, came for the phase, or came for this one use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .plan import Phase, Placement


class Block(Protocol):
    """Weights that move as one, for `module`, as `n_bytes` contiguous bytes in the layout their kernels read."""

    @property
    def name(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def module(self) -> nn.Module: ...

    def fill(self, run: Tensor) -> None:
        """Write the weights into `run` [n_bytes] uint8 on the device."""

    def bind(self, run: Tensor) -> None:
        """Make the module's parameters views of `run`."""

    def unbind(self) -> None:
        """Forget the device copy: the module's parameters hold no memory afterwards."""


class BlockUse:
    """A block as stages see it: entering gives the module with its weights on the device."""

    def __init__(self, block: Block, residency: Residency) -> None:
        self._block = block
        self._residency = residency

    def __enter__(self) -> nn.Module:
        self._residency.onload(self._block)
        return self._block.module

    def __exit__(self, *_: object) -> None:
        if self._block.name not in self._residency.kept:
            self._residency.offload(self._block)


class Residency:
    """The device copies of all blocks of `components` (component name to its blocks, in the order of their use).

    `trim` is called after blocks have left for good, to give their room back to the device.
    """

    def __init__(
        self, components: Mapping[str, Sequence[Block]], device: torch.device, trim: Callable[[], None] = lambda: None
    ) -> None:
        self._components = components
        self._device = device
        self._trim = trim
        self._runs: dict[str, Tensor] = {}
        self._residents: set[str] = set()
        self.kept: set[str] = set()
        """Names of blocks that stay on the device when a stage leaves them."""

    def component(self, name: str) -> tuple[BlockUse, ...]:
        """The blocks of a component, for a stage to walk; empty for a component the checkpoint does not have."""
        return tuple(BlockUse(block, self) for block in self._components.get(name, ()))

    def enter(self, phase: Phase) -> Iterator[tuple[int, int]]:
        """Make the device hold what the phase places there, yielding (bytes so far, bytes in all) per block loaded.

        A phase names all that it keeps, residents of other phases included. Whatever it does not name leaves first, so
        that old and new never need the room together.
        """
        here = [b for c, p in phase.placements.items() if p is not Placement.STREAMED for b in self._blocks(c)]
        self.kept = {block.name for block in here}
        self._residents = {
            b.name for c, p in phase.placements.items() if p is Placement.RESIDENT for b in self._blocks(c)
        }
        self._offload_all_but(self.kept)
        missing = [block for block in here if block.name not in self._runs]
        done, total = 0, sum(block.n_bytes for block in missing)
        for block in missing:
            self.onload(block)
            done += block.n_bytes
            yield done, total

    def leave(self) -> None:
        """The turn is over: only what its last phase placed as resident stays."""
        self.kept = self._residents
        self._offload_all_but(self.kept)

    def release(self) -> None:
        """Take every block off the device."""
        self._residents = set()
        self.leave()

    def onload(self, block: Block) -> None:
        """Bring a block to the device unless it is there."""
        if block.name in self._runs:
            return
        run = torch.empty(block.n_bytes, dtype=torch.uint8, device=self._device)
        block.fill(run)
        block.bind(run)
        self._runs[block.name] = run

    def offload(self, block: Block) -> None:
        """Drop a block's device copy if there is one."""
        if self._runs.pop(block.name, None) is not None:
            block.unbind()

    @property
    def live_bytes(self) -> int:
        """Bytes of weights on the device now."""
        return sum(run.nbytes for run in self._runs.values())

    def _blocks(self, component: str) -> Iterable[Block]:
        return self._components.get(component, ())

    def _offload_all_but(self, kept: set[str]) -> None:
        leaving = [b for blocks in self._components.values() for b in blocks if b.name in self._runs.keys() - kept]
        for block in leaving:
            self.offload(block)
        if leaving:
            self._trim()
