from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_by_hand import random_stored, weight_by_hand
from torch import Tensor, nn

from lowvram.errors import UnsupportedQuantError
from lowvram.quant import reference
from lowvram.quant.int8 import SlicesBackend, int8_layout, pack_int8, round_to_int8, unpack_int8
from lowvram.quant.linear import Int8Linear

SHAPES = [(32, 8, 32), (64, 40, 8), (96, 3, 32), (256, 72, 128)]  # inputs, outputs, group size
TOLERANCES = {torch.float32: 3e-6, torch.float16: 3.5e-4, torch.bfloat16: 3e-3}


def filled(stored: tuple[Tensor, Tensor], group_size: int, bias: bool = True) -> Int8Linear:
    packed, scales = stored
    linear = Int8Linear(
        packed.shape[1] * 4,
        len(packed),
        bias=bias,
        group_size=group_size,
        backend=SlicesBackend(),
        dtype=torch.float32,
    )
    values = {"weight_packed": packed, "weight_scale": scales, "bias": torch.arange(float(len(packed)))}
    for name in dict(linear.named_parameters()):
        linear.register_parameter(name, nn.Parameter(values[name], requires_grad=False))
    return linear


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stored_bytes_mean_what_they_mean_by_hand(shape: tuple[int, int, int]):
    stored = random_stored(*shape)
    assert torch.equal(unpack_int8(*stored, shape[2], torch.float64), weight_by_hand(*stored, shape[2]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layout_names_what_packing_makes(shape: tuple[int, int, int]):
    packed, scales = pack_int8(torch.randn(shape[1], shape[0]), shape[2])
    layout = int8_layout(*shape)
    assert [(layout[leaf].shape, layout[leaf].dtype) for leaf in ("weight_packed", "weight_scale")] == [
        (tuple(tensor.shape), tensor.dtype) for tensor in (packed, scales)
    ]


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.02, 1.0, 100.0]))
@settings(max_examples=30, deadline=None)
def test_every_weight_is_rounded_to_the_nearest_step_and_read_back_as_it_was_rounded(seed: int, size: float):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)) * size
    packed, scales = pack_int8(weight, 32)
    rounded = unpack_int8(packed, scales, 32, torch.float32)
    steps = scales.float().repeat_interleave(32, dim=1)
    assert torch.equal(rounded, round_to_int8(weight, 32))
    beyond = 127 * 2.0**-11  # of a step: how far the largest weight lies outside if float16 makes the step too short
    assert ((rounded - weight).abs() <= (0.5001 + beyond) * steps).all()


def test_zeros_stay_zeros():
    assert torch.equal(round_to_int8(torch.zeros(2, 32), 32), torch.zeros(2, 32))


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="needs compressed-tensors, whose packing is judged")
def test_compressed_tensors_packs_the_same_bytes_and_reads_the_same_weights():
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    packed, scales = pack_int8(weight, 32)
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scales.float()}, scheme)
    assert torch.equal(theirs["weight_packed"], packed)
    ours = {"weight_packed": packed, "weight_scale": scales.float(), "weight_shape": torch.tensor(weight.shape)}
    read = PackedQuantizationCompressor.decompress(ours, scheme)["weight"]
    assert torch.equal(read.float(), round_to_int8(weight, 32))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_right_for_every_byte(
    shape: tuple[int, int, int], rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reference, "CPU_SLICE_WEIGHTS", 5 * shape[0])  # several slices, the last of them shorter
    stored = random_stored(*shape)
    x = torch.randn(rows, shape[0], generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() @ weight_by_hand(*stored, shape[2]).t()
    product = SlicesBackend().matmul(x, *stored, shape[2])
    assert product.dtype == dtype and product.shape == exact.shape
    assert (product.double() - exact).norm() <= TOLERANCES[dtype] * exact.norm()


def test_inputs_may_have_any_leading_shape_and_strides():
    stored = random_stored(64, 40, 32)
    x = torch.randn(2, 64, 3).transpose(1, 2)
    exact = x.double() @ weight_by_hand(*stored, 32).t()
    torch.testing.assert_close(SlicesBackend().matmul(x, *stored, 32).double(), exact, rtol=1e-4, atol=1e-4)


def test_a_linear_adds_its_bias():
    stored = random_stored(64, 40, 32)
    x = torch.randn(3, 64)
    torch.testing.assert_close(
        filled(stored, 32)(x), filled(stored, 32, bias=False)(x) + torch.arange(40.0), rtol=1e-5, atol=1e-5
    )


def test_a_skeleton_holds_no_memory_and_keeps_what_is_stored_but_its_shape():
    linear = Int8Linear(64, 40, bias=False, group_size=32, backend=SlicesBackend(), dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in linear.parameters())
    assert linear.packed_names == ("weight_packed", "weight_scale") and linear.keeps_stored_layout
    assert set(linear.stored) == {"weight_packed", "weight_scale", "weight_shape"}
    assert repr(linear) == "Int8Linear(64, 40, group_size=32, backend=int8-slices)"


@pytest.mark.parametrize(("inputs", "group_size"), [(44, 32), (6, 3)])
def test_inputs_that_do_not_divide_are_refused(inputs: int, group_size: int):
    with pytest.raises(UnsupportedQuantError, match=f"a linear of {inputs} inputs cannot be stored in 8 bits"):
        int8_layout(inputs, 8, group_size)
