"""The int8-cpu backend: decodes from 8-bit weights as they are stored with a kernel of ours (`int8.c`), where the
user's machine can compile it.

Its processors have AVX2: nearly all that run x86 since 2013. Long inputs are left to the slices backend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BackendError
from .compiled import CSource, Run
from .int8 import BYTES_PER_WORD, SlicesBackend, pack_int8, unpack_int8
from .trial import largest_error

SOURCE = CSource("int8.c", "int8-cpu", "AVX2, FMA or F16C instructions")

FEW_ROWS = 16
"""Up to here rows are multiplied from the bytes: at 16 that took 0.7 to 0.8 of the time of dequantizing slices, at 64
1.7 times as long, at three shapes of the thinker (benchmarks/kernels.py --bits 8, one thread, shared machine)."""

RUN, COLUMNS, ROWS = 8, 4, 4
"""How `int8.c` divides the work: see there."""

Multiply = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""rows [M, K] float32, `weight_packed`, `weight_scale`, G -> [M, N] float32: all contiguous, G a multiple of 8."""


class Int8CpuBackend:
    """Multiplies few rows by `int8.c`, in float32 whatever comes in; see `int8_matmul.Int8Backend`.

    Linears with groups that are no multiple of 8 are left to the slices backend.
    """

    name = SOURCE.backend

    def __init__(self, few_rows: int = FEW_ROWS) -> None:
        self._few_rows = few_rows
        self._multiply = load_kernel()
        self._slices = SlicesBackend()

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot serve here, or nothing: it must compile and compute a small linear rightly."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        try:
            load_kernel()
        except BackendError as refusal:
            return refusal.reason
        return ""

    def matmul(self, x: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
        """x [..., K] -> [..., N], a new tensor in x's dtype."""
        rows = x.reshape(-1, packed.shape[1] * BYTES_PER_WORD)
        if group_size % RUN or len(rows) > self._few_rows:
            return self._slices.matmul(x, packed, scales, group_size)
        product = self._multiply(rows.float().contiguous(), packed, scales, group_size)
        return product.to(x.dtype).view(*x.shape[:-1], len(packed))


def load_kernel(cache_folder: Path | None = None) -> Multiply:
    """The kernel, compiled now or before into `cache_folder` (the user's cache) and tried out.

    Raises BackendError when it cannot be had on this machine, with the reason.
    """
    run = SOURCE.load(cache_folder)

    def multiply(rows: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
        return _multiply(run, rows, packed, scales, group_size)

    SOURCE.require(self_test(multiply))
    return multiply


def self_test(multiply: Multiply) -> float:
    """The largest relative error, over several groups and a last piece that lacks columns, for numbers of rows that the
    kernel treats apart."""
    generator = torch.Generator()
    generator.seed()  # other numbers each time: where a kernel forgets to write may lie what an earlier test left there
    group_size, in_features, out_features = 2 * RUN, 6 * RUN, 2 * COLUMNS + 1
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float32)
    stored = pack_int8(weight, group_size)
    rows = torch.randn(ROWS + 1, in_features, generator=generator, dtype=torch.float32)
    exact = rows @ unpack_int8(*stored, group_size, torch.float32).t()
    return largest_error((multiply(rows[:n], *stored, group_size) for n in (1, 2, 3, len(rows))), exact)


class _Product(ctypes.Structure):
    """What `int8.c` calls a Product."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "packed", "scales", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "columns", "group_size")),
    )


def _multiply(run: Run, rows: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """See `Multiply`."""
    tensors = (rows, packed, scales, rows.new_empty(len(rows), len(packed)))
    run(_Product(*(tensor.data_ptr() for tensor in tensors), *rows.shape, len(packed), group_size))
    # From the tuple, which keeps all of them until here: torch.compile frees a tensor after the last line that mentions
    # it, and what runs has only addresses.
    return tensors[-1]
