"""How bytes reach the device: from a file or from host memory, through page-locked staging, in the copy lane.

While the device copies one staging buffer, the host fills the other. Only staging is on the host meanwhile, whatever
the size of a tensor, so that the resident set does not grow with the checkpoint; no file is mapped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import TensorEntry, TensorReader
from .pages import HostPages
from .streams import Event, Lane, Streams, open_streams

STAGING_BYTES = 32 * 1024**2
"""Of one staging buffer. Large enough to run at full PCIe and NVMe speed, small beside any budget."""

STAGING_ALIGNMENT_BYTES = 64
"""Any dtype may be read at this offset, and torch's host memory begins at a multiple of it."""

TORCH_DTYPE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' dtype names."""


class Transfer:
    """The one way for weights to reach `device`. What it issues there goes to the copy lane of `streams`: whoever uses
    the target waits for that, and whoever frees or reuses it does."""

    def __init__(
        self,
        reader: TensorReader,
        device: torch.device,
        streams: Streams | None = None,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        self.device = device
        self.streams = streams or open_streams(device)
        self._reader = reader
        self._staging = Staging(staging_bytes, self.streams)

    def load(self, entry: TensorEntry, target: Tensor) -> None:
        """Fill contiguous `target` (any device and dtype, same number of elements) from the file.

        Raises CheckpointError when the file cannot be read; `target` is then partly filled.
        """
        stored = TORCH_DTYPE[entry.dtype]
        assert target.is_contiguous() and target.numel() * stored.itemsize == entry.n_bytes, entry
        flat = target.view(-1)
        if target.device.type == "cpu" and target.dtype == stored:
            self._reader.read_into(entry, _bytes(flat))
            return
        element_bytes = stored.itemsize + (target.dtype.itemsize if target.dtype != stored else 0)
        step = (self._staging.n_bytes - STAGING_ALIGNMENT_BYTES) // element_bytes
        for first in range(0, flat.numel(), step):
            part = flat[first : first + step]
            self._issue(self._stage(entry, first, part.numel(), target.dtype), part)

    def send(self, pages: HostPages, target: Tensor) -> None:
        """Fill `target` [n_bytes] uint8 on the device with a copy kept on the host: at once if that is page-locked."""
        if pages.is_locked:
            self._issue(pages.run, target)
            return
        for source, part in zip(
            pages.run.split(self._staging.n_bytes), target.split(self._staging.n_bytes), strict=True
        ):
            self._issue(self._staging.take(source.nbytes).copy_(source), part)

    def read(self, entry: TensorEntry) -> Tensor:
        """A stored tensor as a new host tensor of its own dtype and shape."""
        tensor = torch.empty(entry.shape, dtype=TORCH_DTYPE[entry.dtype], device="cpu")
        self._reader.read_into(entry, _bytes(tensor.view(-1)))
        return tensor

    def drain(self) -> None:
        """Return once all copies issued so far are done: before host memory that they read is freed."""
        self.streams.host_wait(self.streams.record(Lane.COPY))

    def release(self) -> None:
        """Give staging back, and to the device what its allocator keeps for later."""
        self.drain()
        self._staging.release()
        self.trim()

    def trim(self) -> None:
        """Give freed device memory back, so that the next phase does not come on top of the last one's leftovers and
        other programs get their room. Costs a synchronization: for between phases, not inside them."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.empty_cache()

    def _stage(self, entry: TensorEntry, first: int, n: int, dtype: torch.dtype) -> Tensor:
        """`n` elements of a stored tensor from the `first` on, in staging, as `dtype`.

        They are cast here because on the way to a device torch would cast them in device memory that no plan knows.
        """
        stored = TORCH_DTYPE[entry.dtype]
        cast_bytes = _aligned(n * dtype.itemsize) if dtype != stored else 0
        room = self._staging.take(cast_bytes + n * stored.itemsize)
        raw = room[cast_bytes:]
        self._reader.read_into(entry, _bytes(raw), first * stored.itemsize)
        if not cast_bytes:
            return raw.view(stored)
        return room[: n * dtype.itemsize].view(dtype).copy_(raw.view(stored))

    def _issue(self, source: Tensor, target: Tensor) -> None:
        with self.streams.copying():
            target.copy_(source, non_blocking=True)


@dataclass(eq=False)
class _Buffer:
    """A staging buffer, and the point at which the last copy from it is done (None: never used)."""

    pages: HostPages
    sent: Event | None = None


class Staging:
    """Buffers of `n_bytes` that the host fills and the copy lane empties, in turns; made when first needed.

    Two where the device works apart, one where a copy is over when it returns.
    """

    def __init__(self, n_bytes: int, streams: Streams) -> None:
        self.n_bytes = n_bytes
        self._streams = streams
        self._buffers: deque[_Buffer] = deque()
        self._taken_bytes = 0

    def take(self, n_bytes: int) -> Tensor:
        """Room [n_bytes] uint8 for the host to fill. The copy out of it must be issued before room is taken again."""
        assert n_bytes <= self.n_bytes, (n_bytes, self.n_bytes)
        if not self._buffers:
            self._buffers.extend(self._new_buffers())
        if self._taken_bytes + n_bytes > self.n_bytes:
            self._turn()
        start = self._taken_bytes
        self._taken_bytes += _aligned(n_bytes)
        return self._buffers[0].pages.run[start : start + n_bytes]

    def release(self) -> None:
        """Give the buffers back. No copy from them may be under way."""
        self._buffers.clear()
        self._taken_bytes = 0

    def _turn(self) -> None:
        """Go on in the buffer that was left first, once the device has what was in it."""
        self._buffers[0].sent = self._streams.record(Lane.COPY)
        self._buffers.rotate(-1)
        if self._buffers[0].sent is not None:
            self._streams.host_wait(self._buffers[0].sent)
        self._taken_bytes = 0

    def _new_buffers(self) -> Iterator[_Buffer]:
        for _ in range(2 if self._streams.apart else 1):
            pages = HostPages(self.n_bytes, self._streams)
            pages.lock()  # if refused: copies from ordinary memory are correct, only slower
            yield _Buffer(pages)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // STAGING_ALIGNMENT_BYTES) * STAGING_ALIGNMENT_BYTES


def _bytes(flat: Tensor) -> memoryview:
    """A host tensor's memory, to be written."""
    return flat.view(torch.uint8).numpy().data
