"""The reference backend: multiplies by AWQ's own tensors, on any device and in any floating-point type.

A slice of the weight's columns at a time is dequantized into a workspace that the next slice reuses, and multiplied;
what lies on the device is the one packed copy.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from .packing import MAX_NIBBLE, NIBBLES_PER_WORD, TensorSpec, check_stored, stored_layout

CPU_SLICE_WEIGHTS = 2**20
"""Weights dequantized at once on a CPU: 7 bytes of workspace each, which a third-level cache holds."""

DEVICE_SLICE_WEIGHTS = 2**22
"""The same elsewhere, where a slice also costs the launch of a dozen kernels: 28 MiB of workspace."""

CPU_HAS_FAST_BFLOAT16 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def slice_weights(device: torch.device) -> int:
    """How many weights to dequantize at once."""
    return CPU_SLICE_WEIGHTS if device.type == "cpu" else DEVICE_SLICE_WEIGHTS


def choose_compute_dtype(x: Tensor) -> torch.dtype:
    """x's own; but on a CPU float32 where a product in half precision would take ten times as long."""
    slow = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not CPU_HAS_FAST_BFLOAT16)
    return torch.float32 if slow and x.device.type == "cpu" else x.dtype


class OnAWQTensors:
    """What backends share that multiply by AWQ's own tensors: what lies on the device is what was stored; see
    `matmul.Backend`."""

    def layout(
        self, in_features: int, out_features: int, group_size: int, dtype: torch.dtype
    ) -> Mapping[str, TensorSpec]:
        """AWQ's own tensors, whatever `dtype` is computed in."""
        return stored_layout(in_features, out_features, group_size)

    def pack(self, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, out: Mapping[str, Tensor]) -> None:
        """Copy AWQ's tensors; scales stored in another type are rounded to float16."""
        check_stored(qweight, qzeros, scales, group_size)
        out["qweight"].copy_(qweight)
        out["qzeros"].copy_(qzeros)
        out["scales"].copy_(scales)


class ReferenceBackend(OnAWQTensors):
    """Dequantizes a slice at a time; see `matmul.Backend`."""

    name = "reference"

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        self._workspace = Workspace()

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype) -> str:
        """None: it runs everywhere."""
        return ""

    def matmul(self, x: Tensor, weights: Mapping[str, Tensor], group_size: int) -> Tensor:
        """x [..., K] -> [..., N], a new tensor in x's dtype."""
        qweight, qzeros, scales = weights["qweight"], weights["qzeros"], weights["scales"]
        in_features, words = qweight.shape
        rows = x.reshape(-1, in_features).to(choose_compute_dtype(x))
        out = x.new_empty(len(rows), words, NIBBLES_PER_WORD)
        step = max(1, slice_weights(x.device) // in_features // NIBBLES_PER_WORD)
        for q, zeros, s, columns in zip(
            qweight.split(step, dim=1),
            qzeros.split(step, dim=1),
            scales.split(step * NIBBLES_PER_WORD, dim=1),
            out.split(step, dim=1),
            strict=True,
        ):
            columns.copy_(_by_columns(rows @ self._dequantize(q, zeros, s, group_size, rows.dtype)))
        return out.view(*x.shape[:-1], words * NIBBLES_PER_WORD)

    def _dequantize(
        self, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype
    ) -> Tensor:
        """Stored tensors of some columns -> their weight [K, n] in `dtype`, by halves; good until the next call.

        Computed in float32, which is exact, then rounded once; on a CPU that takes half of bfloat16's time.
        """
        device, in_features, n_bytes = qweight.device, len(qweight), 4 * qweight.shape[1]
        halves = self._workspace.take((2, in_features, n_bytes), torch.uint8, device)
        split_halves(qweight.view(torch.uint8), halves)
        weight = self._workspace.take((in_features, 2, n_bytes), torch.float32, device).copy_(halves.transpose(0, 1))
        zeros = torch.empty((2, len(qzeros), n_bytes), dtype=torch.uint8, device=device)
        split_halves(qzeros.view(torch.uint8), zeros)
        in_groups = weight.unflatten(0, (-1, group_size))
        in_groups.sub_(zeros.transpose(0, 1).float().unsqueeze(1)).mul_(_by_halves(scales.float()).unsqueeze(1))
        if dtype != torch.float32:
            weight = self._workspace.take(weight.shape, dtype, device).copy_(weight)
        return weight.flatten(1)


class Workspace:
    """Scratch tensors that outlive a call. A CPU's allocator gives large buffers back to the system at once, and
    faulting fresh pages in costs more than the unpacking itself.

    Every thread has its own, so threads may share a backend. Other devices' allocators keep freed memory and know
    which stream uses it: there nothing is held.
    """

    def __init__(self) -> None:
        self._of_thread = _ThreadBuffers()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialized tensor; on a CPU the next one of this dtype taken in this thread overwrites it."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        buffers, n = self._of_thread.by_dtype, math.prod(shape)
        if dtype not in buffers or buffers[dtype].numel() < n:
            with torch.inference_mode(False):  # else a later call outside of that mode could not write to it
                buffers[dtype] = torch.empty(n, dtype=dtype, device=device)
        return buffers[dtype][:n].view(shape)


class _ThreadBuffers(threading.local):
    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


def split_halves(packed: Tensor, out: Tensor) -> None:
    """Write the low, then the high nibbles of uint8 `packed` [...] into uint8 `out` [2, ...]."""
    low, high = out
    torch.bitwise_and(packed, MAX_NIBBLE, out=low)
    torch.bitwise_right_shift(packed, 4, out=high)


# Column 4a + 2b + c of a word (a, b, c = 0 or 1) lies in half b of byte 2c + a, counted from the lowest: see
# packing.NIBBLE_OF_COLUMN. Torch runs on little-endian machines only, where the lowest byte comes first.


def _by_halves(columns: Tensor) -> Tensor:
    """[R, n] in the order of columns -> [R, 2, n/2] in that of `split_halves`."""
    return columns.unflatten(1, (-1, 2, 2, 2)).permute(0, 3, 1, 4, 2).reshape(len(columns), 2, -1)


def _by_columns(halves: Tensor) -> Tensor:
    """[R, n] in the order of `split_halves` -> [R, n/8, 8] in that of columns."""
    return halves.unflatten(1, (2, -1, 2, 2)).permute(0, 2, 4, 1, 3).flatten(2)
