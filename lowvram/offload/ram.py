"""A RAM budget to what the host keeps: the process, the prompt's rows, known voices, copies of weights ready to travel.

Without a RAM budget weights wait in their files. Within one, those blocks come first that cross the bus most: copied
into memory once, page-locked while the operating system will have it, so that each later crossing is one transfer.
"""

from __future__ import annotations

from collections.abc import Iterator

from .budget import GIB, MIB
from .footprint import Footprint
from .placement import HostTier, evenly_spaced
from .prices import COMPONENTS, Turn
from .search import Choice

HOST_BASE_BYTES = 700 * MIB
"""Python, torch and the other libraries, once loaded. An estimate."""

HOST_BASE_CUDA_BYTES = 3 * GIB // 2
"""The same with CUDA's libraries and the driver's share. An estimate, not measured on a machine with a card."""

STAGING_BYTES = 2 * 32 * MIB
"""Buffers through which bytes of files pass on their way to the device."""

MEDIA_BYTES = 64 * MIB
"""Pictures and sound that are decoded and not encoded yet."""

KEPT_CONDITIONINGS_BYTES = 20 * MIB
"""Voices and solvers that earlier turns have worked out for the speech decoder: as many as `token2wav` keeps."""

PINNED_SHARE = 0.4
"""Of the RAM budget, at most, page-locked: Windows lends no more."""


def host_bytes(footprint: Footprint, turn: Turn, *, has_cuda: bool) -> int:
    """What a turn needs on the host, weights not counted: the process, staging, media in flight; the prompt's rows for
    the thinker and, with speech, for the talker; and where the checkpoint speaks, what earlier turns left to condition
    its speech with and what this one adds."""
    base_bytes = HOST_BASE_CUDA_BYTES if has_cuda else HOST_BASE_BYTES
    rows_bytes = turn.prompt_tokens * footprint.thinker.hidden * footprint.width_bytes
    conditionings_bytes = KEPT_CONDITIONINGS_BYTES if footprint.sound else 0
    if footprint.sound and turn.codes and not turn.is_conditioned:
        conditionings_bytes += footprint.sound.constants_bytes(turn.ode_evaluations)
    return base_bytes + STAGING_BYTES + MEDIA_BYTES + rows_bytes * (2 if turn.codes else 1) + conditionings_bytes


def choose_tiers(footprint: Footprint, choice: Choice, room_bytes: int, ram_bytes: int) -> dict[str, HostTier]:
    """Where the host keeps the blocks of a choice: pinned, pageable or, not named, in their files.

    `room_bytes` of the budget `ram_bytes` are left for them.
    """
    tiers: dict[str, HostTier] = {}
    pinnable_bytes = int(PINNED_SHARE * ram_bytes)
    for block, n_bytes in _travellers(footprint, choice):
        if n_bytes > room_bytes:
            continue
        room_bytes -= n_bytes
        tiers[block] = HostTier.PINNED if n_bytes <= pinnable_bytes else HostTier.PAGEABLE
        pinnable_bytes -= n_bytes if n_bytes <= pinnable_bytes else 0
    return tiers


def _travellers(footprint: Footprint, choice: Choice) -> Iterator[tuple[str, int]]:
    """Blocks that travel in every turn and their bytes: streamed layers first, by what they move, then the others."""
    crossings = []
    for stage, way in choice.ways.items():
        for component, holding in zip(COMPONENTS[stage], way.holdings, strict=True):
            if component in choice.residents:
                continue
            blocks = footprint.components[component]
            kept = evenly_spaced(len(blocks) - 1, holding.kept_layers)
            for index, block in enumerate(blocks):
                streamed = not holding.is_whole and index < len(blocks) - 1 and index not in kept
                crossings.append((streamed, (way.passes if streamed else 1) * block.n_bytes, block))
    for _, _, block in sorted(crossings, key=lambda crossing: (crossing[0], crossing[1]), reverse=True):
        yield block.name, block.n_bytes
