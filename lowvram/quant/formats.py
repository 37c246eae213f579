"""How published checkpoints store 4-bit linears, and the lossless way from each packing to AWQ's tensors.

GPTQ and compressed-tensors hold the same numbers as AWQ (4 bits, a scale and a zero point per group) in words of eight
*inputs*; AWQ's hold eight *outputs*. Words are turned eight by eight, without unpacking them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import UnsupportedQuantError
from .packing import MAX_NIBBLE, NIBBLES_PER_WORD, TensorSpec, pack_columns, stored_layout, unpack_columns
from .scheme import Packing

AWQTensors = tuple[Tensor, Tensor, Tensor]
"""qweight, qzeros and scales, as `packing` describes them."""

EIGHT_IN_EVERY_NIBBLE = -0x77777778
"""0x88888888: the zero points of symmetric weights."""


@dataclass(frozen=True)
class Format:
    """What a checkpoint stores for one linear.

    A linear is 4-bit where a tensor called `marker` is stored. `layout` takes inputs, outputs and group size and
    raises UnsupportedQuantError for a linear that cannot be stored so; `to_awq` takes the layout's tensors, in its
    order, and `group_size`, and raises UnsupportedQuantError for numbers that AWQ's tensors cannot hold.
    """

    marker: str
    layout: Callable[[int, int, int], dict[str, TensorSpec]]
    to_awq: Callable[..., AWQTensors]


def gptq_layout(in_features: int, out_features: int, group_size: int) -> dict[str, TensorSpec]:
    """GPTQ's tensors of one linear: AWQ's, but for words of eight inputs, and the group of every input."""
    awq = stored_layout(in_features, out_features, group_size)
    _require_whole_words(in_features)
    qweight = TensorSpec((in_features // NIBBLES_PER_WORD, out_features), torch.int32)
    return awq | {"qweight": qweight, "g_idx": TensorSpec((in_features,), torch.int32)}


def compressed_layout(in_features: int, out_features: int, group_size: int) -> dict[str, TensorSpec]:
    """Symmetric tensors of compressed-tensors: outputs first, and no zero points."""
    groups = stored_layout(in_features, out_features, group_size)["scales"].shape[0]
    _require_whole_words(in_features)
    return {
        "weight_packed": TensorSpec((out_features, in_features // NIBBLES_PER_WORD), torch.int32),
        "weight_scale": TensorSpec((out_features, groups), torch.float16),
        "weight_shape": TensorSpec((2,), torch.int64),
    }


def asymmetric_layout(in_features: int, out_features: int, group_size: int) -> dict[str, TensorSpec]:
    """The same with zero points, in words of eight outputs."""
    symmetric = compressed_layout(in_features, out_features, group_size)
    words, groups = out_features // NIBBLES_PER_WORD, in_features // group_size
    return symmetric | {"weight_zero_point": TensorSpec((words, groups), torch.int32)}


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, *, group_size: int, zeros_less_one: bool
) -> AWQTensors:
    """GPTQ's tensors as AWQ's. The first version of the format stores every zero point less one."""
    in_order = torch.arange(len(g_idx), dtype=g_idx.dtype, device=g_idx.device) // group_size
    if not torch.equal(g_idx, in_order):
        _refuse("g_idx", "gives inputs to groups out of order (desc_act)", "convert it to desc_act: false")
    zeros = _in_columns(qzeros) + int(zeros_less_one)
    if zeros.max() > MAX_NIBBLE:
        _refuse("qzeros", "holds a zero point of 16, for which 4 bits have no room", "export it as gptq_v2")
    return _turn_words(qweight), pack_columns(zeros), _in_half(scales, "scales")


def from_compressed(
    packed: Tensor, scale: Tensor, shape: Tensor, zero_point: Tensor | None = None, *, group_size: int
) -> AWQTensors:
    """compressed-tensors' pack-quantized tensors as AWQ's. Signed numbers are stored plus 8, zero points too."""
    if shape.tolist() != [len(packed), packed.shape[1] * NIBBLES_PER_WORD]:
        _refuse("weight_shape", f"is {shape.tolist()}, but the packed weight has no such shape", "download it again")
    scales = _in_half(scale, "weight_scale").t().contiguous()
    words = (scales.shape[0], scales.shape[1] // NIBBLES_PER_WORD)
    if zero_point is None:
        qzeros = torch.full(words, EIGHT_IN_EVERY_NIBBLE, dtype=torch.int32, device=packed.device)
    else:
        qzeros = pack_columns(_in_columns(zero_point.t()))
    return _turn_words(packed.t()), qzeros, scales


def to_compressed(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> AWQTensors:
    """AWQ's tensors as compressed-tensors': weight_packed, weight_zero_point and weight_scale."""
    packed, zeros = _in_words(unpack_columns(qweight)), _in_words(unpack_columns(qzeros).t())
    return packed, zeros.t().contiguous(), scales.t().contiguous()


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group_size: int) -> AWQTensors:
    """AWQ's tensors as they are."""
    return qweight, qzeros, scales


FORMATS: Mapping[Packing, Format] = {
    "awq": Format("qweight", stored_layout, from_awq),
    "gptq": Format("qweight", gptq_layout, partial(from_gptq, zeros_less_one=True)),
    "gptq_v2": Format("qweight", gptq_layout, partial(from_gptq, zeros_less_one=False)),
    "pack-quantized": Format("weight_packed", compressed_layout, from_compressed),
    "pack-quantized, asymmetric": Format("weight_packed", asymmetric_layout, from_compressed),
}


def transpose_nibbles(words: Tensor) -> Tensor:
    """int32 [..., 8] -> [..., 8]: nibble i of word j becomes nibble j of word i, both counted from the lowest.

    Swaps halves of words four apart, then quarters of words two apart, then neighbours' nibbles.
    """
    for distance, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        low, high = words.unflatten(-1, (-1, 2, distance)).unbind(-2)
        swapped = (low >> 4 * distance ^ high) & mask
        words = torch.stack((low ^ swapped << 4 * distance, high ^ swapped), dim=-2).flatten(-3)
    return words


def _turn_words(of_inputs: Tensor) -> Tensor:
    """Words of eight inputs [K/8, N] -> AWQ's words of eight outputs [K, N/8]."""
    eights = of_inputs.unflatten(1, (-1, NIBBLES_PER_WORD // 2, 2)).transpose(-1, -2).flatten(-2)  # 0 2 4 6 1 3 5 7
    return transpose_nibbles(eights).transpose(1, 2).flatten(0, 1).contiguous()


def _in_words(values: Tensor) -> Tensor:
    """int32 values 0..15 [R, C] -> words [R, C/8] whose nibbles are in the order of columns."""
    shifts = 4 * torch.arange(NIBBLES_PER_WORD, dtype=torch.int32, device=values.device)
    return (values.unflatten(1, (-1, NIBBLES_PER_WORD)) << shifts).sum(-1, dtype=torch.int32)


def _in_columns(words: Tensor) -> Tensor:
    """Words [R, C/8] whose nibbles are in the order of columns -> values 0..15 [C, R]."""
    shifts = 4 * torch.arange(NIBBLES_PER_WORD, dtype=torch.int32, device=words.device).unsqueeze(1)
    return (words.t().unsqueeze(1) >> shifts & MAX_NIBBLE).flatten(0, 1)


def _in_half(scales: Tensor, leaf: str) -> Tensor:
    half = scales.half()
    if not torch.equal(half.to(scales.dtype), scales):
        _refuse(leaf, "holds a scale that float16 cannot", "export it with scales in float16")
    return half


def _require_whole_words(in_features: int) -> None:
    if in_features % NIBBLES_PER_WORD:
        raise UnsupportedQuantError(
            f"a linear of {in_features} inputs does not divide into words of {NIBBLES_PER_WORD}",
            hint="its config.json may belong to another model",
        )


def _refuse(leaf: str, what: str, hint: str) -> None:
    raise UnsupportedQuantError(f"{leaf} {what}", tensor=leaf, hint=hint)
