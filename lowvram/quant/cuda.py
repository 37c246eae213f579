"""The int4-cuda backend: decodes from AWQ's own tensors with kernels of ours (`awq.cu`).

A few rows are multiplied straight from the packed words; for more of them a slice of columns at a time is unpacked in
16 bit for cuBLAS. One packed copy serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from .nvrtc import ROWS_PER_BLOCK, SUFFIX, Launch, Source, addresses, aligned_rows, blocks, load_kernels, obstacle_on
from .packing import NIBBLES_PER_WORD
from .reference import OnAWQTensors, ReferenceBackend, Workspace
from .trial import awq_error, require_dtype

SOURCE = Source("awq.cu")

FEW_ROWS = 16
"""Up to here rows are multiplied from the packed words: every 4 of them take a pass over half a byte per weight, of
which all but the first find it in the cache; unpacking moves 4.5 bytes. By this arithmetic, not by measurement."""

RUN, TILE_WORDS, SLICES = 32, 8, 64
UNPACK_WORDS, UNPACK_RUNS = 32, 8
"""How `awq.cu` divides the work: see there."""

SLICE_WEIGHTS = 2**23
"""Weights unpacked at once: 16 MiB, so that the largest linear of the 7B thinker takes nine slices."""


class CudaBackend(OnAWQTensors):
    """Multiplies by `awq.cu`, which `load` brings to a card; see `matmul.Backend`.

    It never waits for the card, and allocates nothing but its result and, for many rows, a slice: once it has run, it
    can be captured in a CUDA graph. Linears with groups that are no multiple of 32 are left to the reference backend.
    """

    name = "int4-cuda"

    def __init__(
        self, reason: str = "", load: Callable[[torch.device], Launch] | None = None, few_rows: int = FEW_ROWS
    ) -> None:
        self.reason = reason
        self._few_rows = few_rows
        self._load = load or partial(load_kernels, SOURCE)
        self._reference = ReferenceBackend()
        self._workspace = Workspace()

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot serve here, or nothing: it must compile for this card and compute a small linear rightly."""
        return obstacle_on(device, dtype, lambda: self_test(CudaBackend(), device, dtype))

    def matmul(self, x: Tensor, weights: Mapping[str, Tensor], group_size: int) -> Tensor:
        """x [..., K] float16 or bfloat16 -> [..., N], a new tensor."""
        if group_size % RUN:
            return self._reference.matmul(x, weights, group_size)
        require_dtype(self.name, x, SUFFIX)
        stored = weights["qweight"], weights["qzeros"], weights["scales"]
        in_features, words = stored[0].shape
        rows = aligned_rows(x, in_features)
        out = rows.new_empty(len(rows), words * NIBBLES_PER_WORD)
        if len(rows) > self._few_rows:
            self._unpack_and_multiply(rows, *stored, group_size, out)
        elif len(rows):
            self._multiply(rows, *stored, group_size, out)
        return out.view(*x.shape[:-1], out.shape[1])

    def _multiply(
        self, rows: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, out: Tensor
    ) -> None:
        """rows [M, K] times the packed weight -> out [M, N]."""
        in_features, words = qweight.shape
        per_block = ROWS_PER_BLOCK[len(rows) > 1]
        self._load(rows.device)(
            f"multiply_{SUFFIX[rows.dtype]}_{per_block}",
            (blocks(len(rows), per_block), blocks(words, TILE_WORDS)),
            TILE_WORDS * SLICES,
            *addresses(rows, qweight, qzeros, scales, out),
            *(len(rows), in_features, words, group_size),
        )

    def _unpack_and_multiply(
        self, rows: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, out: Tensor
    ) -> None:
        """The same, a slice of columns at a time."""
        in_features, words = qweight.shape
        launch, kernel = self._load(rows.device), f"unpack_{SUFFIX[rows.dtype]}"
        step = max(1, SLICE_WEIGHTS // in_features // NIBBLES_PER_WORD)
        space = self._workspace.take((in_features * min(step, words) * NIBBLES_PER_WORD,), rows.dtype, rows.device)
        for first, columns in zip(range(0, words, step), out.split(step * NIBBLES_PER_WORD, dim=1), strict=True):
            weight = space[: in_features * columns.shape[1]].view(in_features, -1)
            n_words = columns.shape[1] // NIBBLES_PER_WORD
            launch(
                kernel,
                (blocks(n_words, UNPACK_WORDS), blocks(in_features, UNPACK_RUNS * RUN)),
                UNPACK_WORDS * UNPACK_RUNS,
                *addresses(qweight, qzeros, scales, weight),
                *(first, n_words, in_features, words, group_size),
            )
            torch.mm(rows, weight, out=columns)


def self_test(backend: CudaBackend, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of a small linear, both ways: one with a second tile and slices of two runs."""
    sizes = (SLICES + 2) * RUN, (TILE_WORDS + 1) * NIBBLES_PER_WORD, RUN
    return awq_error(backend.matmul, device, dtype, sizes, rows=(1, FEW_ROWS, FEW_ROWS + 1))
