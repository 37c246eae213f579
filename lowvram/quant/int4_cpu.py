"""The int4-cpu backend: torch's own 4-bit matrix product for CPUs, in bfloat16.

AWQ's w = (q - z) * s is torch's w = (q - 8) * scale + zero with scale = s and zero = (8 - z) * s. For long inputs
unpacking a slice of the same bytes and multiplying takes less time than torch's kernel: half of it with AVX-512, where
products are in bfloat16, two thirds with AVX2, where they are in float32. Where `native` can be compiled it multiplies
from these bytes, too, faster than either for any number of rows; only on linears as small as k_proj does starting it
from Python cost more than it saves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import BackendError
from .native import BLOCK_COLUMNS, MIDPOINT, Multiply, in_blocks, load_kernel
from .packing import MAX_NIBBLE, NIBBLES_PER_WORD, TensorSpec, check_stored, pack_awq, unpack_awq, unpack_columns
from .reference import CPU_SLICE_WEIGHTS, ReferenceBackend, Workspace, choose_compute_dtype, split_halves
from .trial import complaint, dtype_obstacle, largest_error, require_dtype

log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16,)

PACKED, SCALES_AND_ZEROS = "int4pack", "scales_and_zeros"

GROUP_SIZES = (32, 64, 128, 256)

UNPACK_FROM_ROWS = 96
"""From here on unpacking is faster than torch's kernel, which at 64 rows took 0.8 of the time, at 96 as long, at 128
1.2 times as long, with K = 3584 for N = 18944 as for N = 3584 (benchmarks/kernels.py, one thread, shared machine). With
AVX2 it took 0.8 to 1.0, 1.0 and 1.1 to 1.3 times as long, at 512 rows 1.5 to 1.9 times (CPU time, torch and MKL told to
use no more)."""

BLOCKS = (BLOCK_COLUMNS, 32)
"""How many columns torch's kernels for AVX-512 and for AVX2 pack together."""


class Int4CpuBackend:
    """Multiplies by torch's `_weight_int4pack_mm_for_cpu`; see `matmul.Backend`.

    Linears that the kernel cannot take (other group sizes, columns not in 64s) are left to the reference backend.
    `load` brings the compiled kernel or raises BackendError; with None it is not asked for.
    """

    name = "int4-cpu"

    def __init__(
        self,
        reason: str = "",
        unpack_from_rows: int = UNPACK_FROM_ROWS,
        load: Callable[[], Multiply] | None = load_kernel,
    ) -> None:
        self.reason = reason
        self._reference = ReferenceBackend()
        self._workspace = Workspace()
        self._unpack_from_rows = unpack_from_rows
        self._block_columns = next(filter(_packs_in_blocks_of, BLOCKS), None)
        self._compiled = _compiled_kernel(load) if load and self._block_columns == BLOCK_COLUMNS else None

    @property
    def compiled(self) -> bool:
        """Whether the kernel that this machine compiled serves."""
        return self._compiled is not None

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot serve here, or nothing: it must be built to unpack a weight once for several rows, and compute
        rightly on this machine, on a small linear."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        if obstacle := dtype_obstacle(dtype, DTYPES):
            return obstacle
        try:
            if _unpacks_for_each_row():
                return "torch's kernel unpacks weights anew for each row on this system"
            return complaint("torch's kernel", _self_test())
        except (AttributeError, RuntimeError) as failure:
            return f"torch's kernel fails on this machine: {failure}"

    def layout(
        self, in_features: int, out_features: int, group_size: int, dtype: torch.dtype
    ) -> Mapping[str, TensorSpec]:
        """Torch's packed bytes with a (scale, zero) pair per group and output; or the reference's tensors."""
        stored = self._reference.layout(in_features, out_features, group_size, dtype)
        if group_size not in GROUP_SIZES or out_features % BLOCK_COLUMNS:
            return stored
        return {
            PACKED: TensorSpec((out_features, in_features // 2), torch.uint8),
            SCALES_AND_ZEROS: TensorSpec((in_features // group_size, out_features, 2), torch.bfloat16),
        }

    def pack(self, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, out: Mapping[str, Tensor]) -> None:
        """Repack AWQ's tensors, a slice of columns at a time."""
        if PACKED not in out:
            return self._reference.pack(qweight, qzeros, scales, group_size, out)
        check_stored(qweight, qzeros, scales, group_size)
        scale, zero = out[SCALES_AND_ZEROS].unbind(-1)
        scale.copy_(scales)
        zero.copy_((MIDPOINT - unpack_columns(qzeros).t()) * scales.float())
        step = _slice_columns(len(qweight))
        for q, packed in zip(qweight.split(step // NIBBLES_PER_WORD, dim=1), out[PACKED].split(step), strict=True):
            packed.copy_(_pack_for_kernel(unpack_columns(q)))

    def matmul(self, x: Tensor, weights: Mapping[str, Tensor], group_size: int) -> Tensor:
        """x [..., K] bfloat16 -> [..., N], a new tensor."""
        if PACKED not in weights:
            return self._reference.matmul(x, weights, group_size)
        require_dtype(self.name, x, DTYPES)
        packed, scales_and_zeros = weights[PACKED], weights[SCALES_AND_ZEROS]
        rows = x.reshape(-1, 2 * packed.shape[1]).contiguous()
        if self._compiled is not None:
            out = self._compiled(rows, packed, scales_and_zeros, group_size)
        elif self._block_columns is not None and len(rows) >= self._unpack_from_rows:
            out = self._unpack_and_multiply(rows, packed, scales_and_zeros, self._block_columns)
        else:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, scales_and_zeros)
        return out.view(*x.shape[:-1], len(packed))

    def _unpack_and_multiply(
        self, rows: Tensor, packed: Tensor, scales_and_zeros: Tensor, block_columns: int
    ) -> Tensor:
        """rows [M, K] -> [M, N]."""
        out = rows.new_empty(len(rows), len(packed))
        rows = rows.to(choose_compute_dtype(rows))
        step = _slice_columns(rows.shape[1])
        for part, pairs, columns in zip(
            packed.split(step), scales_and_zeros.split(step, dim=1), out.split(step, dim=1), strict=True
        ):
            columns.copy_(rows @ self._unpack(in_blocks(part, block_columns), pairs, rows.dtype))
        return out

    def _unpack(self, blocks: Tensor, scales_and_zeros: Tensor, dtype: torch.dtype) -> Tensor:
        """Some columns' bytes (see `in_blocks`) and pairs [K/G, n, 2] -> weight [K, n]; good until the next call."""
        n_blocks, in_features, half = blocks.shape
        groups, columns = scales_and_zeros.shape[:2]
        halves = self._workspace.take((2, *blocks.shape), torch.uint8, blocks.device)
        split_halves(blocks, halves)
        steps = halves.sub_(MIDPOINT).view(torch.int8)
        weight = self._workspace.take((in_features, n_blocks, 2, half), dtype, blocks.device)
        in_groups = weight.copy_(steps.permute(2, 1, 0, 3)).view(groups, -1, columns)
        # Without a copy the pairs would be read with a stride of 2, which doubles the time of what follows.
        scale, zero = scales_and_zeros.permute(2, 0, 1).contiguous().to(dtype).unsqueeze(2)
        return torch.addcmul(zero, in_groups, scale, out=in_groups).view(in_features, columns)


def _compiled_kernel(load: Callable[[], Multiply]) -> Multiply | None:
    try:
        return load()
    except BackendError as refusal:
        log.info("%s; torch's own serves", refusal)
        return None


def _pack_for_kernel(values: Tensor) -> Tensor:
    """int32 values 0..15 [n, K] as the kernel's bytes [n, K/2]."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)


def _slice_columns(in_features: int) -> int:
    """How many columns, in whole blocks, to unpack at once."""
    return max(1, CPU_SLICE_WEIGHTS // in_features // BLOCK_COLUMNS) * BLOCK_COLUMNS


def _unpacks_for_each_row() -> bool:
    """Whether this is torch's kernel for systems for which it has no better one: Windows, and all that is not x86. It
    is known by its bytes, which hold neighbouring columns. With K = N = 3584 it took 25 ms for one row, 127 ms for four
    and 15 s for 512, where the reference took 46, 44 and 213 ms, or 28, 29 and 224 with AVX2 (an x86 told to have no
    vector instructions, one thread, CPU time)."""
    second_column = torch.zeros(BLOCK_COLUMNS, 32, dtype=torch.int32)
    second_column[1] = 1
    return int(_pack_for_kernel(second_column).flatten()[0]) == 1 << 4


def _packs_in_blocks_of(columns: int) -> bool:
    """Whether this machine's kernel lays bytes out as `in_blocks` says for so many columns."""
    values = torch.arange(2 * BLOCK_COLUMNS * 32, dtype=torch.int32).mul(7).remainder(15).view(-1, 32)
    blocks = in_blocks(_pack_for_kernel(values), columns)
    read = torch.cat((blocks & MAX_NIBBLE, blocks >> 4), dim=-1).transpose(1, 2).flatten(0, 1)
    return torch.equal(read, values.to(torch.uint8))


def _self_test() -> float:
    """The largest relative error of a small linear, both of torch's ways."""
    generator = torch.Generator().manual_seed(0)
    group_size, in_features, out_features = 32, 128, BLOCK_COLUMNS
    stored = pack_awq(torch.randn(out_features, in_features, generator=generator), group_size)
    x = torch.randn(UNPACK_FROM_ROWS, in_features, generator=generator).bfloat16()
    backend = Int4CpuBackend(load=None)
    layout = backend.layout(in_features, out_features, group_size, torch.bfloat16)
    weights = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in layout.items()}
    backend.pack(*stored, group_size, weights)
    exact = x.float() @ unpack_awq(*stored, group_size, torch.float32).t()
    return largest_error((backend.matmul(x[:rows], weights, group_size) for rows in (1, UNPACK_FROM_ROWS)), exact)
