"""The int8-cuda backend: decodes from 8-bit weights as they are stored with kernels of ours (`int8.cu`).

A few rows are multiplied straight from the bytes; for more of them a slice of columns at a time is unpacked in 16 bit
for cuBLAS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .cuda import SLICE_WEIGHTS
from .int8 import BYTES_PER_WORD, SlicesBackend, pack_int8, unpack_int8
from .nvrtc import ROWS_PER_BLOCK, SUFFIX, Launch, Source, addresses, aligned_rows, blocks, load_kernels, obstacle_on
from .reference import Workspace
from .trial import largest_error, require_dtype

SOURCE = Source("int8.cu")

FEW_ROWS = 16
"""Up to here rows are multiplied from the bytes: every 4 of them take a pass over a byte per weight, of which all but
the first find it in the cache; unpacking moves 5 bytes. By this arithmetic, not by measurement."""

RUN, COLUMNS, WARP, MOST_WARPS = 16, 4, 32, 8
UNPACK_WEIGHTS, UNPACK_THREADS = 8, 256
"""How `int8.cu` divides the work: see there."""


class Int8CudaBackend:
    """Multiplies by `int8.cu`, which `load` brings to a card; see `int8_matmul.Int8Backend`.

    It never waits for the card, and allocates nothing but its result and, for many rows, a slice: once it has run, it
    can be captured in a CUDA graph. Linears with groups that are no multiple of 16 are left to the slices backend.
    """

    name = "int8-cuda"

    def __init__(self, load: Callable[[torch.device], Launch] | None = None, few_rows: int = FEW_ROWS) -> None:
        self._few_rows = few_rows
        self._load = load or partial(load_kernels, SOURCE)
        self._slices = SlicesBackend()
        self._workspace = Workspace()

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot serve here, or nothing: it must compile for this card and compute a small linear rightly."""
        return obstacle_on(device, dtype, lambda: self_test(Int8CudaBackend(), device, dtype))

    def matmul(self, x: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
        """x [..., K] float16 or bfloat16 -> [..., N], a new tensor."""
        if group_size % RUN:
            return self._slices.matmul(x, packed, scales, group_size)
        require_dtype(self.name, x, SUFFIX)
        rows = aligned_rows(x, packed.shape[1] * BYTES_PER_WORD)
        out = rows.new_empty(len(rows), len(packed))
        if len(rows) > self._few_rows:
            self._unpack_and_multiply(rows, packed, scales, group_size, out)
        elif len(rows):
            self._multiply(rows, packed, scales, group_size, out)
        return out.view(*x.shape[:-1], len(packed))

    def _multiply(self, rows: Tensor, packed: Tensor, scales: Tensor, group_size: int, out: Tensor) -> None:
        """rows [M, K] times the stored weight -> out [M, N]."""
        in_features, out_features = rows.shape[1], len(packed)
        per_block = ROWS_PER_BLOCK[len(rows) > 1]
        self._load(rows.device)(
            f"multiply_{SUFFIX[rows.dtype]}_{per_block}",
            (blocks(len(rows), per_block), blocks(out_features, COLUMNS)),
            WARP * min(MOST_WARPS, blocks(in_features, RUN * WARP)),
            *addresses(rows, packed, scales, out),
            *(len(rows), in_features, out_features, group_size),
        )

    def _unpack_and_multiply(self, rows: Tensor, packed: Tensor, scales: Tensor, group_size: int, out: Tensor) -> None:
        """The same, a slice of columns at a time."""
        launch, kernel = self._load(rows.device), f"unpack_{SUFFIX[rows.dtype]}"
        step = max(1, SLICE_WEIGHTS // rows.shape[1])
        space = self._workspace.take((min(step, len(packed)), rows.shape[1]), rows.dtype, rows.device)
        for q, s, columns in zip(packed.split(step), scales.split(step), out.split(step, dim=1), strict=True):
            weight = space[: len(q)]
            eights = weight.numel() // UNPACK_WEIGHTS
            launch(
                kernel,
                (blocks(eights, UNPACK_THREADS), 1),
                UNPACK_THREADS,
                *addresses(q, s, weight),
                *(eights, group_size),
            )
            torch.mm(rows, weight.t(), out=columns)


def self_test(backend: Int8CudaBackend, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of a small linear, both ways: one whose last block lacks columns, and with more inputs
    than the most warps take at once."""
    generator = torch.Generator().manual_seed(0)
    group_size, in_features, out_features = 2 * RUN, (MOST_WARPS * WARP + 2) * RUN, COLUMNS + 1
    stored = pack_int8(torch.randn(out_features, in_features, generator=generator), group_size)
    x = torch.randn(FEW_ROWS + 1, in_features, generator=generator).to(dtype)
    exact = x.float() @ unpack_int8(*stored, group_size, torch.float32).t()
    packed, scales = (tensor.to(device) for tensor in stored)
    rows = (1, FEW_ROWS, len(x))
    return largest_error((backend.matmul(x[:n].to(device), packed, scales, group_size).cpu() for n in rows), exact)
