from __future__ import annotations

import pytest
import torch
from awq_by_hand import random_stored, unpacked, weight_by_hand
from hypothesis import given
from hypothesis import strategies as st

from lowvram.errors import UnsupportedQuantError
from lowvram.quant.packing import (
    pack_awq,
    pack_columns,
    stored_layout,
    unpack_awq,
    unpack_columns,
)


def test_a_word_holds_columns_0_2_4_6_1_3_5_7_from_its_lowest_bits_up():
    columns = torch.arange(8, dtype=torch.int32).unsqueeze(1)
    assert pack_columns(columns).item() == 0x75316420


def test_the_highest_nibble_may_set_the_sign_bit():
    columns = torch.full((8, 1), 15, dtype=torch.int32)
    assert pack_columns(columns).item() == -1
    assert torch.equal(unpack_columns(torch.tensor([[-1]], dtype=torch.int32)), columns)


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3), min_size=1, max_size=4))
def test_any_words_survive_unpacking_and_packing(rows: list[list[int]]):
    words = torch.tensor(rows, dtype=torch.int32)
    assert torch.equal(pack_columns(unpack_columns(words)), words)
    assert unpack_columns(words).t().tolist() == unpacked(words).tolist()


@pytest.mark.parametrize("group_size", [1, 32, 96])
def test_the_weight_is_exact_in_float32(group_size: int):
    stored = random_stored(96, 40, group_size)
    weight = unpack_awq(*stored, group_size, torch.float32)
    assert torch.equal(weight.double(), weight_by_hand(stored, group_size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_weight_is_rounded_once_in_half_precision(dtype: torch.dtype):
    stored = random_stored(64, 16, 32)
    assert torch.equal(unpack_awq(*stored, 32, dtype), weight_by_hand(stored, 32).to(dtype))


@given(seed=st.integers(0, 2**31), group_size=st.sampled_from([8, 32]), offset=st.sampled_from([-3.0, 0.0, 3.0]))
def test_packing_rounds_to_the_nearest_step(seed: int, group_size: int, offset: float):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)) + offset
    qweight, qzeros, scales = pack_awq(weight, group_size)
    step = scales.t().float().repeat_interleave(group_size, dim=1)
    steps_off = (unpack_awq(qweight, qzeros, scales, group_size, torch.float32) - weight).abs() / step
    q = unpack_columns(qweight)
    assert steps_off[(q > 0) & (q < 15)].max() <= 0.5 + 1e-4
    assert steps_off.max() <= 1 + 1e-2  # at the ends of the range also the zero point and the scale were rounded


def test_packing_what_was_unpacked_gives_the_same_weight_again():
    weight = unpack_awq(
        *pack_awq(torch.randn(24, 64, generator=torch.Generator().manual_seed(1)), 32), 32, torch.float32
    )
    again = unpack_awq(*pack_awq(weight, 32), 32, torch.float32)
    assert torch.equal(again, weight)


def test_a_group_of_zeros_stays_zero_and_leaves_its_neighbours_alone():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    kept = unpack_awq(*pack_awq(weight, 32), 32, torch.float32)
    weight[0, :32] = kept[0, :32] = 0
    assert torch.equal(unpack_awq(*pack_awq(weight, 32), 32, torch.float32), kept)


def test_packed_tensors_are_what_the_layout_promises():
    specs = stored_layout(96, 40, 32).values()
    for tensor, spec in zip(pack_awq(torch.randn(40, 96), 32), specs, strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype)
        assert tensor.is_contiguous()


@pytest.mark.parametrize(("in_features", "out_features"), [(100, 64), (64, 60)])
def test_a_linear_that_does_not_divide_is_refused_with_its_sizes(in_features: int, out_features: int):
    with pytest.raises(UnsupportedQuantError, match=rf"{in_features} inputs and {out_features} outputs.*groups of 32"):
        stored_layout(in_features, out_features, 32)


def test_a_wrong_group_size_names_the_tensor_that_shows_it():
    qweight, qzeros, scales = random_stored(64, 16, 32)
    with pytest.raises(UnsupportedQuantError, match=r"qzeros is torch.int32 \[2, 2\].*\[1, 2\]") as caught:
        unpack_awq(qweight, qzeros, scales, 64, torch.float32)
    assert caught.value.tensor == "qzeros"


def test_words_of_another_integer_type_are_refused():
    qweight, qzeros, scales = random_stored(64, 16, 32)
    with pytest.raises(UnsupportedQuantError, match=r"qweight is torch.int64"):
        unpack_awq(qweight.long(), qzeros, scales, 32, torch.float32)


def test_scales_of_integers_are_refused():
    qweight, qzeros, scales = random_stored(64, 16, 32)
    with pytest.raises(UnsupportedQuantError, match=r"scales is torch.int32"):
        unpack_awq(qweight, qzeros, scales.int(), 32, torch.float32)
