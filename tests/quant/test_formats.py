from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from on_this_cpu import INT4_CPU
from published_by_hand import Numbers, as_compressed, as_gptq, random_numbers
from torch import Tensor

from lowvram.errors import UnsupportedQuantError
from lowvram.quant.formats import FORMATS, to_compressed, transpose_nibbles
from lowvram.quant.linear import AWQLinear
from lowvram.quant.matmul import choose_backend
from lowvram.quant.packing import pack_awq, unpack_awq
from lowvram.quant.scheme import Packing

SHAPES = [(32, 8, 32), (64, 40, 8), (256, 72, 128)]  # inputs, outputs, group size
EIGHTS, STORABLE = range(8, 9), range(1, 16)


def published(packing: Packing, shape: tuple[int, int, int]) -> tuple[Numbers, dict[str, Tensor]]:
    """Random numbers that a packing can hold, and a checkpoint's tensors for them."""
    match packing:
        case "gptq":
            numbers = random_numbers(*shape, zeros=STORABLE)
            return numbers, as_gptq(numbers)
        case "gptq_v2":
            numbers = random_numbers(*shape)
            return numbers, as_gptq(numbers, version=2)
        case "pack-quantized":
            numbers = random_numbers(*shape, zeros=EIGHTS)
            return numbers, as_compressed(numbers, symmetric=True)
        case _:
            numbers = random_numbers(*shape)
            return numbers, as_compressed(numbers, symmetric=False)


PACKINGS = tuple(packing for packing in FORMATS if packing != "awq")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_published_linear_means_the_same_weights_in_awq_s_tensors(packing: Packing, shape: tuple[int, int, int]):
    numbers, stored = published(packing, shape)
    converted = FORMATS[packing].to_awq(*stored.values(), group_size=shape[2])
    assert torch.equal(unpack_awq(*converted, shape[2], torch.float64), numbers.weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_layout_names_what_a_checkpoint_stores_in_the_order_of_its_conversion(
    packing: Packing, shape: tuple[int, int, int]
):
    _, stored = published(packing, shape)
    layout = FORMATS[packing].layout(*shape)
    assert {leaf: (spec.shape, spec.dtype) for leaf, spec in layout.items()} == {
        leaf: (tuple(tensor.shape), tensor.dtype) for leaf, tensor in stored.items()
    }
    assert list(layout) == list(stored) and next(iter(layout)) == FORMATS[packing].marker


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_turning_awq_s_tensors_into_compressed_ones_is_undone(shape: tuple[int, int, int]):
    awq = pack_awq(torch.randn(shape[1], shape[0], generator=torch.Generator().manual_seed(0)), shape[2])
    packed, zeros, scales = to_compressed(*awq)
    stored = (packed, scales, torch.tensor([shape[1], shape[0]]), zeros)
    back = FORMATS["pack-quantized, asymmetric"].to_awq(*stored, group_size=shape[2])
    assert all(torch.equal(ours, before) for ours, before in zip(back, awq, strict=True))


@pytest.mark.parametrize("name", ["reference", INT4_CPU])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_linear_takes_a_published_packing_into_any_backend_s_layout(packing: Packing, name: str):
    numbers, stored = published(packing, (64, 128, 32))
    backend = choose_backend(torch.device("cpu"), torch.bfloat16, name)
    linear = AWQLinear(64, 128, bias=False, group_size=32, backend=backend, dtype=torch.bfloat16, packing=packing)
    weights = {name: torch.empty_like(linear.get_parameter(name), device="cpu") for name in linear.packed_names}
    linear.pack(*stored.values(), out=weights)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() @ numbers.weight.t()
    assert not linear.keeps_stored_layout
    assert (backend.matmul(x, weights, 32) - exact).norm() <= 3e-3 * exact.norm()


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=8, max_size=8))
def test_turning_words_moves_nibble_i_of_word_j_to_nibble_j_of_word_i(words: list[int]):
    turned = transpose_nibbles(torch.tensor(words, dtype=torch.int32)).tolist()
    assert [[word >> 4 * i & 15 for i in range(8)] for word in turned] == [
        [word >> 4 * i & 15 for word in words] for i in range(8)
    ]


def test_scales_in_bfloat16_are_kept_exactly():
    numbers = random_numbers(64, 8, 32, zeros=EIGHTS)
    stored = as_compressed(numbers, symmetric=True)
    stored["weight_scale"] = stored["weight_scale"].bfloat16()
    *_, scales = FORMATS["pack-quantized"].to_awq(*stored.values(), group_size=32)
    assert scales.dtype == torch.float16
    assert torch.equal(scales.t().bfloat16(), stored["weight_scale"])


@pytest.mark.parametrize("scale", [1e-9, 70000.0, 1 / 3])
def test_scales_that_float16_cannot_hold_are_refused(scale: float):
    stored = as_compressed(random_numbers(32, 8, 32), symmetric=True)
    stored["weight_scale"] = torch.full((8, 1), scale, dtype=torch.float32)
    with pytest.raises(UnsupportedQuantError, match="scale that float16 cannot") as caught:
        FORMATS["pack-quantized"].to_awq(*stored.values(), group_size=32)
    assert caught.value.tensor == "weight_scale"


@pytest.mark.parametrize("packing", ["gptq", "gptq_v2"])
def test_inputs_in_groups_out_of_order_are_refused(packing: Packing):
    _, stored = published(packing, (64, 8, 32))
    stored["g_idx"] = stored["g_idx"].flip(0)
    with pytest.raises(UnsupportedQuantError, match="out of order"):
        FORMATS[packing].to_awq(*stored.values(), group_size=32)


def test_a_zero_point_that_wrapped_around_in_gptq_s_first_version_is_refused():
    stored = as_gptq(random_numbers(32, 8, 32, zeros=range(1)), version=1)
    with pytest.raises(UnsupportedQuantError, match="zero point of 16"):
        FORMATS["gptq"].to_awq(*stored.values(), group_size=32)


def test_a_packed_weight_of_another_shape_than_it_says_is_refused():
    stored = as_compressed(random_numbers(32, 8, 32), symmetric=True)
    stored["weight_shape"] = torch.tensor([8, 30])
    with pytest.raises(UnsupportedQuantError, match=r"weight_shape is \[8, 30\]"):
        FORMATS["pack-quantized"].to_awq(*stored.values(), group_size=32)


@pytest.mark.parametrize("packing", PACKINGS)
def test_inputs_that_do_not_fill_words_are_refused(packing: Packing):
    with pytest.raises(UnsupportedQuantError, match="36 inputs"):
        FORMATS[packing].layout(36, 8, 12)


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="needs compressed-tensors, whose packing is judged")
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_packing_by_hand_is_compressed_tensors_own(symmetric: bool):
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    numbers = random_numbers(64, 40, 32, zeros=EIGHTS if symmetric else range(16))
    by_hand = as_compressed(numbers, symmetric=symmetric)
    signed = torch.from_numpy(numbers.q - 8).to(torch.int8)
    assert torch.equal(pack_to_int32(signed, 4), by_hand["weight_packed"])
    if not symmetric:
        zeros = torch.from_numpy(numbers.z - 8).to(torch.int8)
        assert torch.equal(pack_to_int32(zeros, 4, packed_dim=0), by_hand["weight_zero_point"])


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="needs compressed-tensors, whose reading is judged")
def test_compressed_tensors_own_conversion_from_awq_is_ours_and_is_undone():
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    awq = pack_awq(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)), 32)
    tensors = dict(zip(("proj.qweight", "proj.qzeros", "proj.scales"), awq, strict=True))
    converted = AutoAWQConverter(bits=4, group_size=32, zero_point=True, version="gemm").process(tensors)
    leaves = FORMATS["pack-quantized, asymmetric"].layout(64, 40, 32)
    ours = to_compressed(*awq)
    for leaf, tensor in zip(("weight_packed", "weight_zero_point", "weight_scale"), ours, strict=True):
        assert torch.equal(tensor, converted[f"proj.{leaf}"]), leaf
    back = FORMATS["pack-quantized, asymmetric"].to_awq(*(converted[f"proj.{leaf}"] for leaf in leaves), group_size=32)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(back, awq, strict=True))
