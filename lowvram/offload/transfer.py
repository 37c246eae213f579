"""One way for weights to reach the device: bytes of a file, through one staging buffer, into a tensor that waits.

Nothing is mapped and nothing is kept on the host, so that the resident set does not grow with the checkpoint: the
host copy of a weight is its file, and the operating system's page cache makes the second read cheap.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

STAGING_BYTES = 32 * 1024**2
"""Large enough to run at full PCIe and NVMe speed, small beside any budget."""

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


class StoredTensor(Protocol):
    """Where a tensor lies in a file (`checkpoint.TensorEntry`)."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def n_bytes(self) -> int: ...


class Reader(Protocol):
    """Reads a stored tensor's bytes (`checkpoint.TensorReader`)."""

    def read_into(self, entry: StoredTensor, buffer: memoryview, start: int = 0) -> None: ...


class Transfer:
    """Copies stored tensors into waiting ones, on any device, casting on the way where the dtypes differ."""

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.device = device
        self._reader = reader
        self._staging: Tensor | None = None
        self.moved_bytes = 0

    def load(self, entry: StoredTensor, target: Tensor) -> None:
        """Fill contiguous `target` (any device and dtype, same number of elements) from the file."""
        stored = TORCH_DTYPE[entry.dtype]
        assert target.is_contiguous() and target.numel() * stored.itemsize == entry.n_bytes, entry
        flat = target.view(-1)
        self.moved_bytes += target.nbytes
        if target.device.type == "cpu" and target.dtype == stored:
            self._reader.read_into(entry, memoryview(flat.view(torch.uint8).numpy()))
            return
        staging = self._staging_buffer()
        with self._stream():
            for start in range(0, entry.n_bytes, STAGING_BYTES):
                n = min(STAGING_BYTES, entry.n_bytes - start)
                self._reader.read_into(entry, memoryview(staging[:n].numpy()), start)
                first = start // stored.itemsize
                flat[first : first + n // stored.itemsize].copy_(staging[:n].view(stored))

    def read(self, entry: StoredTensor) -> Tensor:
        """A stored tensor as a new host tensor of its own dtype and shape."""
        tensor = torch.empty(entry.shape, dtype=TORCH_DTYPE[entry.dtype])
        self._reader.read_into(entry, memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        return tensor

    def release(self) -> None:
        """Give the staging buffer back."""
        self._staging = None

    def _staging_buffer(self) -> Tensor:
        if self._staging is None:
            self._staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return self._staging

    def _stream(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
