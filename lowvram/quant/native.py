"""`native.c` -> a product of bfloat16 rows and torch's packed 4-bit blocks, compiled on this machine.

Its processors have the bfloat16 instructions of AVX-512: AMD's from Zen 4, Intel's servers' from Sapphire Rapids on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .compiled import CSource, Run
from .packing import MAX_NIBBLE
from .trial import largest_error

Multiply = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""rows [M, K] bfloat16, bytes [N, K/2], (scale, zero) pairs [K/G, N, 2] bfloat16, G -> [M, N] bfloat16: all contiguous,
G even, N a multiple of 64."""

SOURCE = CSource("native.c", "int4-cpu", "AVX-512 instructions for bfloat16")

BLOCK_COLUMNS = 64
"""How many columns torch's AVX-512 kernel packs together; those for other processors pack fewer."""

MIDPOINT = 8
"""The nibble that torch's format takes for 0."""


def load_kernel(cache_folder: Path | None = None) -> Multiply:
    """The kernel, compiled now or before into `cache_folder` (the user's cache) and tried out.

    Raises BackendError when it cannot be had on this machine, with the reason.
    """
    multiply = partial(_multiply, SOURCE.load(cache_folder))
    SOURCE.require(self_test(multiply))
    return multiply


def self_test(multiply: Multiply) -> float:
    """The largest relative error, over several blocks and groups, for numbers of rows that the kernel treats apart."""
    generator = torch.Generator()
    generator.seed()  # other numbers each time: where a kernel forgets to write may lie what an earlier test left there
    columns, inputs, group_size = 3 * BLOCK_COLUMNS, 128, 32
    packed = torch.randint(0, 256, (columns, inputs // 2), generator=generator, dtype=torch.uint8)
    pairs = torch.randn(inputs // group_size, columns, 2, generator=generator).bfloat16()
    rows = torch.randn(7, inputs, generator=generator).bfloat16()
    exact = rows.double() @ _unpacked(packed, pairs, group_size)
    return largest_error((multiply(rows[:n], packed, pairs, group_size) for n in (1, 2, 4, 7)), exact)


def in_blocks(packed: Tensor, columns: int = BLOCK_COLUMNS) -> Tensor:
    """Torch's bytes [n, K/2] for blocks of C `columns` as [n/C, K, C/2]: byte j of a block holds its columns j (low)
    and j + C/2."""
    return packed.view(len(packed) // columns, -1, columns // 2)


class _Product(ctypes.Structure):
    """What `native.c` calls a Product."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "group_sums", "packed", "pairs", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "columns", "group_size")),
    )


def _multiply(run: Run, rows: Tensor, packed: Tensor, pairs: Tensor, group_size: int) -> Tensor:
    """See `Multiply`."""
    assert rows.dtype == torch.bfloat16
    n_rows, inputs = rows.shape
    columns = len(packed)
    group_sums = rows.unflatten(1, (-1, group_size)).sum(-1, dtype=torch.float32)
    tensors = (rows, group_sums, packed, pairs, rows.new_empty(n_rows, columns))
    run(_Product(*(tensor.data_ptr() for tensor in tensors), n_rows, inputs, columns, group_size))
    # From the tuple, which keeps all of them until here: torch.compile frees a tensor after the last line that mentions
    # it, and what runs has only addresses.
    return tensors[-1]


def _unpacked(packed: Tensor, pairs: Tensor, group_size: int) -> Tensor:
    """The weight [K, N] in float64."""
    blocks = in_blocks(packed)
    steps = torch.cat((blocks & MAX_NIBBLE, blocks >> 4), dim=-1).double() - MIDPOINT
    scale, zero = pairs.double().repeat_interleave(group_size, dim=0).unbind(-1)
    return steps.transpose(0, 1).flatten(1) * scale + zero
