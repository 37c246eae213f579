"""Phases to what of the next one may come while this one computes: weights that are to stay, into room that is left.

The plan counts it (`Phase.prefetch_bytes`) and `residency` brings it, and both ask here which blocks that is. Nothing
comes where the plan would hold more for it at its highest; nor during a phase that streams layers: its bus is busy, and
its room went to layers that it keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Protocol, TypeVar

from .allocator import held_bytes
from .placement import STREAM_SLOTS, Phase, Placement, evenly_spaced


class Sized(Protocol):
    """A block, as far as its place is concerned."""

    @property
    def name(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...


B = TypeVar("B", bound=Sized)


def divide(phase: Phase, components: Mapping[str, Sequence[B]]) -> tuple[list[B], list[tuple[B, ...]]]:
    """The blocks that stay for the phase, in the order of their use, and those that pass through slots, by component.

    `components` maps names to blocks; a component that it lacks has none.
    """
    staying, passing = [], []
    for component, placement in phase.placements.items():
        blocks = tuple(components.get(component, ()))
        streamed = _streamed(blocks, phase.kept_layers.get(component, 0)) if placement is Placement.STREAMED else ()
        staying += [block for block in blocks if block not in streamed]
        passing += [streamed] if streamed else []
    return staying, passing


def blocks_ahead(phase: Phase, following: Phase, components: Mapping[str, Sequence[B]]) -> tuple[B, ...]:
    """Of the blocks that stay in the following phase and are not there in this one, the first that it lets come."""
    here = {block.name for block in divide(phase, components)[0]}
    coming: list[B] = []
    left_bytes = phase.prefetch_bytes
    for block in divide(following, components)[0]:
        if block.name not in here:
            left_bytes -= held_bytes(block.n_bytes)
            if left_bytes < 0:
                break
            coming.append(block)
    return tuple(coming)


def with_prefetch(phases: Sequence[Phase], components: Mapping[str, Sequence[Sized]]) -> tuple[Phase, ...]:
    """The same phases, each with as much of the next one as it has room for beneath the highest peak of all."""
    highest_bytes = max(phase.peak_bytes for phase in phases)
    filled = []
    for phase, following in pairwise(phases):
        free_bytes = 0 if phase.streamed_layers else highest_bytes - phase.peak_bytes
        coming = blocks_ahead(replace(phase, prefetch_bytes=free_bytes), following, components)
        filled.append(replace(phase, prefetch_bytes=sum(held_bytes(block.n_bytes) for block in coming)))
    return (*filled, phases[-1])


def _streamed(blocks: tuple[B, ...], kept_layers: int) -> tuple[B, ...]:
    """Of a streamed component's blocks those that pass through slots: layers (the last block is none) that are not
    kept. When no more are left than there are slots, they stay too: that takes no more room."""
    layers = blocks[:-1]
    kept = evenly_spaced(len(layers), kept_layers)
    passing = tuple(layer for i, layer in enumerate(layers) if i not in kept)
    return passing if len(passing) > STREAM_SLOTS else ()
