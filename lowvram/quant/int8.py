"""Linears in 8 bits: their stored tensors, the weights those mean, and the product with them on any device.

A linear of N outputs and K inputs is stored as compressed-tensors' `pack-quantized` does it, for groups of G inputs:
`weight_packed` int32 [N, K/4], whose bytes in memory are the inputs in their order, each w / s + 128, and
`weight_scale` float16 [N, K/G]; w = (byte - 128) * s. The device holds them as they are stored. The slices backend
multiplies by them everywhere, and is the readable twin of the others (`int8_matmul`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedQuantError
from .packing import SMALLEST_SCALE, TensorSpec
from .reference import Workspace, choose_compute_dtype, slice_weights

MARKER = "weight_packed"
"""The tensor that tells that a linear is packed."""

BYTES_PER_WORD = 4
MIDPOINT = 128
LARGEST = 127
"""Of the signed numbers that are written: -128 is left out, so that a group's range is the same on both sides of 0."""


def int8_layout(in_features: int, out_features: int, group_size: int) -> dict[str, TensorSpec]:
    """What a checkpoint stores for one linear, by leaf name.

    Raises UnsupportedQuantError for a linear whose inputs do not divide into words and groups.
    """
    if in_features % BYTES_PER_WORD or in_features % group_size:
        raise UnsupportedQuantError(
            f"a linear of {in_features} inputs cannot be stored in 8 bits with groups of {group_size}",
            hint=f"inputs must divide into groups of {group_size} and into words of {BYTES_PER_WORD}",
        )
    return {
        "weight_packed": TensorSpec((out_features, in_features // BYTES_PER_WORD), torch.int32),
        "weight_scale": TensorSpec((out_features, in_features // group_size), torch.float16),
        "weight_shape": TensorSpec((2,), torch.int64),
    }


def pack_int8(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round `weight` [N, K] to the nearest of 8 bits: `weight_packed` and `weight_scale`."""
    q, scales = _round_in_groups(weight, group_size)
    return q.add_(MIDPOINT).flatten(1).to(torch.uint8).view(torch.int32), scales


def round_to_int8(weight: Tensor, group_size: int) -> Tensor:
    """`weight` [N, K] as it will be once stored, in float32: bit for bit what `unpack_int8` makes of `pack_int8`."""
    q, scales = _round_in_groups(weight, group_size)
    return q.mul_(scales.float().unsqueeze(-1)).flatten(1)


def unpack_int8(packed: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The linear's weight [N, K], rounded to `dtype` once: in float32 it is exact (11 bits of scale, 8 of q)."""
    steps = packed.view(torch.uint8).float().sub_(MIDPOINT).unflatten(1, (-1, group_size))
    return steps.mul_(scales.float().unsqueeze(-1)).flatten(1).to(dtype)


class SlicesBackend:
    """Dequantizes a slice of columns at a time and multiplies; see `int8_matmul.Int8Backend`."""

    name = "int8-slices"

    def __init__(self) -> None:
        self._workspace = Workspace()

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype) -> str:
        """None: it runs everywhere."""
        return ""

    def matmul(self, x: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
        """x [..., K] -> [..., N], a new tensor in x's dtype."""
        out_features, in_features = len(packed), packed.shape[1] * BYTES_PER_WORD
        rows = x.reshape(-1, in_features).to(choose_compute_dtype(x))
        out = x.new_empty(len(rows), out_features)
        step = max(1, slice_weights(x.device) // in_features)
        for q, s, columns in zip(packed.split(step), scales.split(step), out.split(step, dim=1), strict=True):
            columns.copy_(rows @ self._dequantize(q, s, group_size, rows.dtype).t())
        return out.view(*x.shape[:-1], out_features)

    def _dequantize(self, packed: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
        """What `unpack_int8` gives for some columns [n, K], good until the next call."""
        stored = packed.view(torch.uint8)
        weight = self._workspace.take(tuple(stored.shape), torch.float32, stored.device).copy_(stored)
        weight.sub_(MIDPOINT).unflatten(1, (-1, group_size)).mul_(scales.float().unsqueeze(-1))
        if dtype != torch.float32:
            weight = self._workspace.take(tuple(stored.shape), dtype, stored.device).copy_(weight)
        return weight


def _round_in_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """`weight` [N, K] -> numbers -127..127 [N, K/G, G] in float32, and steps [N, K/G] in float16: numbers count in the
    steps that are stored, not in those before rounding."""
    groups = weight.float().unflatten(1, (-1, group_size))
    scales = (groups.abs().amax(-1) / LARGEST).clamp_(min=SMALLEST_SCALE).half()
    return (groups / scales.float().unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST), scales
