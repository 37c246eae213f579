"""AWQ's stored tensors and the weights they mean, in the most readable way: the judge of every fast backend.

A linear of N outputs and K inputs is stored transposed, for groups of G inputs: `qweight` int32 [K, N/8], `qzeros`
int32 [K/G, N/8] and `scales` float16 [K/G, N]. A word holds eight columns of 4 bits each, and w = (q - z) * s. The
layout is that of AutoAWQ's `gemm` version (casper-hansen/AutoAWQ, awq/modules/linear/gemm.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedQuantError

NIBBLES_PER_WORD = 8
MAX_NIBBLE = 15

NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word, lowest first, holds each of its eight columns: read by nibble, columns 0 2 4 6 1 3 5 7."""

SMALLEST_SCALE = 2.0**-24
"""float16's smallest positive number: a group of zeros still needs a scale to divide by."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that need not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def stored_layout(in_features: int, out_features: int, group_size: int) -> dict[str, TensorSpec]:
    """What a checkpoint stores for one linear, by leaf name.

    Raises UnsupportedQuantError for a linear that does not divide into words and groups.
    """
    if out_features % NIBBLES_PER_WORD or in_features % group_size:
        raise UnsupportedQuantError(
            f"a linear of {in_features} inputs and {out_features} outputs cannot be stored as AWQ with groups of"
            f" {group_size}",
            hint=f"inputs must divide into groups of {group_size}, outputs into words of {NIBBLES_PER_WORD}",
        )
    groups, words = in_features // group_size, out_features // NIBBLES_PER_WORD
    return {
        "qweight": TensorSpec((in_features, words), torch.int32),
        "qzeros": TensorSpec((groups, words), torch.int32),
        "scales": TensorSpec((groups, out_features), torch.float16),
    }


def check_stored(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> None:
    """Raise UnsupportedQuantError unless the three tensors are one AWQ linear with groups of `group_size`.

    Scales may come in any floating-point type.
    """
    expected = stored_layout(qweight.shape[0], qweight.shape[1] * NIBBLES_PER_WORD, group_size)
    for (leaf, spec), tensor in zip(expected.items(), (qweight, qzeros, scales), strict=True):
        kind_matches = tensor.dtype == spec.dtype or (leaf == "scales" and tensor.is_floating_point())
        if tensor.shape != spec.shape or not kind_matches:
            raise UnsupportedQuantError(
                f"{leaf} is {tensor.dtype} {list(tensor.shape)}, but AWQ with groups of {group_size} has {spec.dtype}"
                f" {list(spec.shape)} beside qweight {list(qweight.shape)}",
                tensor=leaf,
                hint="the checkpoint's group_size may be wrong, or its tensors packed for another kernel",
            )


def unpack_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The linear's weight [N, K], rounded to `dtype` once: in float32 it is exact (11 bits of scale, 5 of q - z).

    Raises UnsupportedQuantError for tensors that do not belong together.
    """
    check_stored(qweight, qzeros, scales, group_size)
    steps = unpack_columns(qweight) - unpack_columns(qzeros).repeat_interleave(group_size, dim=1)
    return (steps.float() * scales.t().float().repeat_interleave(group_size, dim=1)).to(dtype)


def pack_awq(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round `weight` [N, K] to 4 bits: (qweight, qzeros, scales) as AWQ stores them.

    Round-to-nearest with one scale and zero point per group of `group_size` inputs; nothing is searched or scaled for
    activations. A group's range always includes 0, which is stored exactly. Raises UnsupportedQuantError as
    `stored_layout` does.
    """
    out_features, in_features = weight.shape
    stored_layout(in_features, out_features, group_size)
    q, zeros, scales = _round_in_groups(weight, group_size)
    return pack_columns(q.flatten(1).int()), pack_columns(zeros.int()), scales.t().contiguous()


def fake_quantize(weight: Tensor, group_size: int) -> Tensor:
    """`weight` [N, K] as it will be once stored, in float32: bit for bit what `unpack_awq` makes of `pack_awq`."""
    q, zeros, scales = _round_in_groups(weight, group_size)
    return q.sub_(zeros.unsqueeze(-1)).mul_(scales.float().unsqueeze(-1)).flatten(1)


def _round_in_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`weight` [N, K] -> numbers 0..15 [N, K/G, G], zero points 0..15 [N, K/G], both float32, and steps [N, K/G] in
    float16: numbers count from zero points in the steps that are stored, not in those before rounding."""
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    scales = ((high - low) / MAX_NIBBLE).clamp_(min=SMALLEST_SCALE).half()
    step = scales.float()
    zeros = (-low / step).round_().clamp_(0, MAX_NIBBLE)
    q = (groups / step.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, MAX_NIBBLE)
    return q, zeros, scales


def unpack_columns(words: Tensor) -> Tensor:
    """int32 words [R, C/8] -> int32 values 0..15 [C, R], a column to a row."""
    return (words.t().contiguous().unsqueeze(1) >> _shifts(words) & MAX_NIBBLE).flatten(0, 1)


def pack_columns(values: Tensor) -> Tensor:
    """int32 values 0..15 [C, R] -> int32 words [R, C/8]; undoes `unpack_columns`."""
    in_words = values.unflatten(0, (-1, NIBBLES_PER_WORD))
    return (in_words << _shifts(values)).sum(1, dtype=torch.int32).t().contiguous()


def _shifts(like: Tensor) -> Tensor:
    return 4 * torch.tensor(NIBBLE_OF_COLUMN, dtype=torch.int32, device=like.device).unsqueeze(1)
