"""The next phase's weights on their way to the device while this one computes.

Room for them is made at once, in the thread that computes; they come one after another beside it, and computing waits
for none of them before they are taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError
from .block import Block, empty_run
from .host import HostCopies
from .streams import Lane, Streams


class Prefetch:
    """`blocks`, coming in their order until they are taken. Nobody else may send anything meanwhile.

    Raises torch.OutOfMemoryError if the device has no room for all of them.
    """

    def __init__(self, blocks: Sequence[Block], copies: HostCopies, streams: Streams, device: torch.device) -> None:
        self._coming = [(block, empty_run(block.n_bytes, device)) for block in blocks]
        self._copies = copies
        self._streams = streams
        self._come = 0
        self._taken = False
        # The allocator may have handed out what a kernel still under way reads.
        streams.wait(Lane.COPY, streams.record(Lane.COMPUTE))
        self._join = streams.beside(self._fetch)

    @property
    def n_bytes(self) -> int:
        """Device bytes of all of them, come or not."""
        return sum(run.nbytes for _, run in self._coming)

    def take(self) -> list[tuple[Block, Tensor]]:
        """Let no further one come, and give those that have, with their bytes, for compute to use or let go."""
        self._taken = True
        self._join()
        # Also for what only began to come: its memory is somebody else's from here on.
        self._streams.wait(Lane.COMPUTE, self._streams.record(Lane.COPY))
        return self._coming[: self._come]

    def _fetch(self) -> None:
        for block, run in self._coming:
            if self._taken:
                return
            try:
                self._copies.send(block, run)
            except (CheckpointError, RuntimeError):
                return  # the phase that needs the block meets the same, and is the one to say so
            self._come += 1
