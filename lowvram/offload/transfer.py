"""One way for weights to reach the device: bytes of a file, through one staging buffer, into a tensor that waits.

Nothing is mapped and nothing is kept on the host, so that the resident set does not grow with the checkpoint: the
host copy of a weight is its file, and the operating system's page cache makes the second read cheap.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..checkpoint import TensorEntry, TensorReader

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


class Transfer:
    """Copies stored tensors into waiting ones, on any device, casting on the way where the dtypes differ."""

    def __init__(self, reader: TensorReader, device: torch.device) -> None:
        self.device = device
        self._reader = reader
        self._staging: Tensor | None = None

    def load(self, entry: TensorEntry, target: Tensor) -> None:
        """Fill contiguous `target` (any device and dtype, same number of elements) from the file."""
        stored = TORCH_DTYPE[entry.dtype]
        assert target.is_contiguous() and target.numel() * stored.itemsize == entry.n_bytes, entry
        flat = target.view(-1)
        if target.device.type == "cpu" and target.dtype == stored:
            self._reader.read_into(entry, _bytes(flat))
            return
        with self._on_device():  # pinning, too, belongs to a device
            staging = self._staging_buffer()
            for start in range(0, entry.n_bytes, STAGING_BYTES):
                n = min(STAGING_BYTES, entry.n_bytes - start)
                self._reader.read_into(entry, _bytes(staging[:n]), start)
                first = start // stored.itemsize
                flat[first : first + n // stored.itemsize].copy_(staging[:n].view(stored))

    def read(self, entry: TensorEntry) -> Tensor:
        """A stored tensor as a new host tensor of its own dtype and shape."""
        tensor = torch.empty(entry.shape, dtype=TORCH_DTYPE[entry.dtype], device="cpu")
        self._reader.read_into(entry, _bytes(tensor.view(-1)))
        return tensor

    def release(self) -> None:
        """Give the staging buffer back, and to the device what its allocator keeps for later."""
        self._staging = None
        self.trim()

    def trim(self) -> None:
        """Give freed device memory back, so that the next phase does not come on top of the last one's leftovers and
        other programs get their room. Costs a synchronization: for between phases, not inside them."""
        if self.device.type == "cuda":
            with self._on_device():
                torch.cuda.empty_cache()

    def _staging_buffer(self) -> Tensor:
        if self._staging is None:
            pin = self.device.type == "cuda"
            self._staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=pin)
        return self._staging

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def _bytes(flat: Tensor) -> memoryview:
    """A host tensor's memory, to be written."""
    return flat.view(torch.uint8).numpy().data
