"""What the host keeps of the weights: each block in its file, in ordinary memory or in page-locked memory, by plan.

A copy on the host has the device's layout, made once from the file, so that bringing the block is then one copy.
Copies live as long as plans want them; they are never written again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from .block import Block
from .budget import format_bytes
from .pages import HostPages
from .placement import HostTier
from .transfer import Transfer

log = logging.getLogger(__name__)


class HostCopies:
    """The blocks that the host keeps a copy of, and how each block is sent. On a device that is the host: none.

    `pinning_refused` says that page-locked memory was asked for and not to be had; ordinary memory stands in.
    """

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._tiers: Mapping[str, HostTier] = {}
        self._copies: dict[str, HostPages] = {}
        self.pinning_refused = False

    @property
    def n_bytes(self) -> int:
        """Bytes of the host's copies now; they come one by one, as their blocks are first sent."""
        return sum(pages.n_bytes for pages in list(self._copies.values()))  # one may be coming in another thread

    def prepare(self, tiers: Mapping[str, HostTier]) -> None:
        """Keep copies as `tiers` says from now on (block names to tiers, the file where none is named), and drop
        those it does not want."""
        self._tiers = tiers if self._transfer.streams.apart else {}
        if not self._copies:
            return
        self._transfer.drain()
        for name, pages in list(self._copies.items()):
            match self._tiers.get(name, HostTier.FILE):
                case HostTier.FILE:
                    del self._copies[name]
                case HostTier.PAGEABLE:
                    pages.unlock()
                case HostTier.PINNED:
                    self._lock(pages)

    def send(self, block: Block, run: Tensor) -> None:
        """Fill `run` [n_bytes] uint8 on the device with a block, in the copy lane.

        Raises CheckpointError when its file cannot be read.
        """
        tier = self._tiers.get(block.name, HostTier.FILE)
        if tier is HostTier.FILE:
            block.fill(run)
            return
        if block.name not in self._copies:
            self._copies[block.name] = self._copy(block, tier)
        self._transfer.send(self._copies[block.name], run)

    def drop(self) -> None:
        """Give all copies back; they are made again as blocks are sent."""
        self._transfer.drain()
        self._copies.clear()

    def _copy(self, block: Block, tier: HostTier) -> HostPages:
        pages = HostPages(block.n_bytes, self._transfer.streams)
        block.fill(pages.run)
        if tier is HostTier.PINNED:
            self._lock(pages)
        return pages

    def _lock(self, pages: HostPages) -> None:
        """Page-lock a copy, unless the system has said before that it will not."""
        if not self.pinning_refused and not pages.lock():
            self.pinning_refused = True
            log.warning(
                "no more host memory can be page-locked: %s and what follows is sent from ordinary memory, more slowly",
                format_bytes(pages.n_bytes),
            )
