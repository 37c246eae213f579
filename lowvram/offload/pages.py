"""Host memory at its exact size, page-locked where the device can do that.

torch's own page-locked memory is rounded up to powers of two and kept after use: 129 MiB would lock 256.
"""

from __future__ import annotations

import mmap
import weakref

import torch

from .block import empty_run
from .streams import Streams


class HostPages:
    """`run` [n_bytes] uint8 on the host, on pages of its own. Locked pages are unlocked before they are freed."""

    def __init__(self, n_bytes: int, streams: Streams) -> None:
        whole_bytes = -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = empty_run(whole_bytes + mmap.PAGESIZE, torch.device("cpu"))
        start = -memory.data_ptr() % mmap.PAGESIZE
        self._pages = memory[start : start + whole_bytes]
        self._streams = streams
        self._unlock: weakref.finalize[..., HostPages] | None = None
        self.run = self._pages[:n_bytes]

    @property
    def n_bytes(self) -> int:
        return self.run.nbytes

    @property
    def is_locked(self) -> bool:
        return self._unlock is not None

    def lock(self) -> bool:
        """Page-lock the run unless it is; False if the device refuses."""
        if self._unlock is None and self._streams.lock_pages(self._pages):
            self._unlock = weakref.finalize(self, self._streams.unlock_pages, self._pages)
            self._unlock.atexit = False  # the driver may have gone by then, and takes its locks along
        return self.is_locked

    def unlock(self) -> None:
        """Make the run ordinary memory again. No copy from it may be under way, now or when it is freed."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None
