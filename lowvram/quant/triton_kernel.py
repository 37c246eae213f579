"""AWQ's matrix product as a Triton kernel: rows times packed words -> products, in one pass over the words.

Importing this needs Triton. A program makes a tile of products; the packed words of its columns are unpacked run by run
on the way to the tensor cores, and sums are kept in float32, in one order: the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import NIBBLES_PER_WORD

TILE_ROWS, TILE_WORDS = 16, 8
"""16 rows by 64 columns: the least that Triton's product of tiles takes, and enough programs for a card at one row."""


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    rows_ptr, qweight_ptr, qzeros_ptr, scales_ptr, out_ptr, n_rows, in_features, n_words, group_size,
    run: tl.constexpr, tile_rows: tl.constexpr, tile_words: tl.constexpr, widen: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    word = tl.program_id(1) * tile_words + tl.arange(0, tile_words)
    column = tl.program_id(1) * tile_words * 8 + tl.arange(0, tile_words * 8)
    in_word = tl.arange(0, 8)
    shift = 4 * ((in_word % 2) * 4 + in_word // 2)  # packing.NIBBLE_OF_COLUMN
    is_row, is_word, is_column = row < n_rows, word < n_words, column < n_words * 8
    total = tl.zeros((tile_rows, tile_words * 8), dtype=tl.float32)
    for first in range(0, in_features, run):
        k = first + tl.arange(0, run)
        group = first // group_size
        x = tl.load(rows_ptr + row[:, None] * in_features + k[None, :], mask=is_row[:, None], other=0.0)
        q = tl.load(qweight_ptr + k[:, None] * n_words + word[None, :], mask=is_word[None, :], other=0)
        z = tl.load(qzeros_ptr + group * n_words + word, mask=is_word, other=0)
        s = tl.load(scales_ptr + group * n_words * 8 + column, mask=is_column, other=0.0)
        q = tl.reshape((q[:, :, None] >> shift[None, None, :]) & 15, (run, tile_words * 8))
        z = tl.reshape((z[:, None] >> shift[None, :]) & 15, (1, tile_words * 8))
        weight = ((q - z).to(tl.float32) * s[None, :].to(tl.float32)).to(x.dtype)
        if widen:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x, weight, total, input_precision="ieee")
    out = out_ptr + row[:, None] * (n_words * 8) + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


IS_INTERPRETED = not isinstance(_multiply, triton.JITFunction)
"""Whether Triton was told to run kernels on the CPU (TRITON_INTERPRET=1, from the start of the process)."""


def multiply(rows: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, run: int) -> Tensor:
    """rows [M, K], contiguous, times the packed weight: [M, N], new. `run` inputs are taken at a time; it divides
    `group_size`, so that they share a zero point and a scale."""
    in_features, words = qweight.shape
    out = rows.new_empty(len(rows), words * NIBBLES_PER_WORD)
    grid = (triton.cdiv(len(rows), TILE_ROWS), triton.cdiv(words, TILE_WORDS))
    # Triton's interpreter multiplies the bits of bfloat16 numbers; widening them first changes no product.
    tile = {"run": run, "tile_rows": TILE_ROWS, "tile_words": TILE_WORDS, "widen": IS_INTERPRETED}
    sizes = (len(rows), in_features, words, group_size)
    if rows.device.type == "cpu":
        _multiply[grid](rows, qweight, qzeros, scales, out, *sizes, **tile)
    else:
        with torch.accelerator.device_index(rows.device.index):
            _multiply[grid](rows, qweight, qzeros, scales, out, *sizes, **tile)
    return out
