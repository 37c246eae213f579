from __future__ import annotations

import pytest
import torch
from layer_by_hand import (
    GROUP_SIZE,
    HEADS,
    LENGTH,
    SAMPLES,
    STORAGE,
    clip_by_hand,
    inputs_of,
    make_layer,
    rounded,
    search_by_hand,
)
from torch import Tensor, nn

from lowvram.quant.calibrate import clipped
from lowvram.quant.int8 import unpack_int8
from lowvram.quant.layer import Chunk, LayerQuantizer, round_to_nearest, run_layer, store_linear
from lowvram.quant.packing import unpack_awq
from lowvram.quant.recipe import GROUPS, LINEARS, UNCLIPPED
from lowvram.quant.storage import Int4Storage, Int8Storage, Storage


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.inference_mode():
        yield


def quantizer_of(layer: nn.Module, dtype: torch.dtype = torch.float32, storage: Storage = STORAGE) -> LayerQuantizer:
    floats = (name for name, _ in layer.named_parameters() if name.removesuffix(".weight") not in LINEARS)
    return LayerQuantizer(layer, storage, dict.fromkeys(floats, dtype))


def parts(chunk: Chunk, n: int) -> list[Chunk]:
    """The same samples, `n` at a time."""
    cosines, sines = chunk.rotary
    return [
        Chunk(chunk.hidden[i : i + n], (cosines[i : i + n], sines[i : i + n])) for i in range(0, len(chunk.hidden), n)
    ]


def searched(
    layer: nn.Module, chunks: list[Chunk], dtype: torch.dtype = torch.float32, storage: Storage = STORAGE
) -> LayerQuantizer:
    quantizer = quantizer_of(layer, dtype, storage)
    for chunk in chunks:
        quantizer.observe(chunk)
    for chunk in chunks:
        quantizer.weigh(chunk)
    return quantizer


def error(output: Tensor, right: Tensor) -> float:
    return float((output - right).pow(2).mean() / right.pow(2).mean())


@pytest.mark.parametrize("kv_heads", [1, HEADS])
@pytest.mark.parametrize("seed", [0, 1])
def test_scales_are_those_of_the_plainest_search(kv_heads: int, seed: int):
    layer, chunk = make_layer(kv_heads, seed)
    found = searched(layer, [chunk]).best_scales
    inputs = inputs_of(layer, chunk)
    for group, scales in found.items():
        x, inspected = inputs[group.linears[0]], layer.get_submodule(group.inspected)
        if group.inspected == "self_attn":
            run = lambda inspected=inspected, x=x: inspected(x, position_embeddings=chunk.rotary)[0]  # noqa: E731
        else:
            run = lambda inspected=inspected, x=x: inspected(x)  # noqa: E731
        expected = search_by_hand([layer.get_submodule(path) for path in group.linears], x, run)
        torch.testing.assert_close(scales, expected, rtol=1e-6, atol=0)


def test_values_read_by_several_queries_do_not_take_over_scales():
    assert [group.inspected for group in searched(*as_chunks(make_layer(1))).best_scales] == [
        "self_attn",
        "mlp",
        "mlp.down_proj",
    ]
    assert list(searched(*as_chunks(make_layer(HEADS))).best_scales) == list(GROUPS)


def as_chunks(toy: tuple[nn.Module, Chunk]) -> tuple[nn.Module, list[Chunk]]:
    layer, chunk = toy
    return layer, [chunk]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_scales_do_not_depend_on_how_samples_are_cut_into_chunks(n: int, seed: int):
    layer, chunk = make_layer(2, seed)
    whole, cut = searched(layer, [chunk]).best_scales, searched(layer, parts(chunk, n)).best_scales
    for group, scales in whole.items():
        torch.testing.assert_close(cut[group], scales, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kv_heads", [1, HEADS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scaled_layer_that_is_not_yet_rounded_computes_the_same(kv_heads: int, dtype: torch.dtype):
    layer, chunk = make_layer(kv_heads)
    layer.self_attn.v_proj.bias.zero_()  # the other thing that is rounded to 16 bit, where values take over scales
    right = run_layer(layer, chunk)
    before = layer.mlp.gate_proj.weight.clone()
    searched(layer, [chunk], dtype).scale()
    assert not torch.equal(layer.mlp.gate_proj.weight, before)
    assert (run_layer(layer, chunk) - right).abs().max() < 1e-5 * right.abs().max()


def test_norms_are_left_as_they_will_be_stored():
    layer, chunk = make_layer(1)
    searched(layer, [chunk], torch.bfloat16).scale()
    weight = layer.input_layernorm.weight
    assert torch.equal(weight, weight.bfloat16().float())


def test_a_layer_loses_less_than_by_rounding_to_nearest():
    for seed in range(3):
        layer, chunk = make_layer(2, seed)
        known, others = parts(chunk, SAMPLES // 2)
        right = run_layer(layer, others) - others.hidden
        plain = error(run_layer(layer, others, round_to_nearest(layer, STORAGE)) - others.hidden, right)
        quantizer = searched(layer, [known])
        quantizer.scale()
        quantizer.round()
        assert error(run_layer(layer, others) - others.hidden, right) < 0.6 * plain


def test_clips_are_searched_for_scaled_weights_on_inputs_that_are_divided():
    layer, chunk = make_layer(HEADS)
    quantizer = searched(layer, [chunk])
    quantizer.scale()
    inputs = inputs_of(layer, chunk)
    for path in LINEARS:
        weight, x = layer.get_submodule(path).weight.clone(), inputs[path].flatten(0, 1)
        if path not in UNCLIPPED:
            weight = clipped(weight, clip_by_hand(weight, x), GROUP_SIZE)
        inputs[path] = rounded(weight)
    quantizer.round()
    for path in LINEARS:
        same = torch.isclose(layer.get_submodule(path).weight, inputs[path])
        assert same.float().mean() > 0.97, path  # two ranges may cost the same but for rounding


def test_observing_returns_the_output_and_changes_nothing():
    layer, chunk = make_layer(1)
    before = {name: value.clone() for name, value in layer.named_parameters()}
    quantizer = quantizer_of(layer)
    assert torch.equal(quantizer.observe(chunk), layer(chunk.hidden, position_embeddings=chunk.rotary))
    quantizer.weigh(chunk)
    assert all(torch.equal(value, before[name]) for name, value in layer.named_parameters())


def test_what_is_stored_is_what_the_layer_then_computes_with():
    layer, chunk = make_layer(1)
    quantizer = searched(layer, [chunk], torch.bfloat16)
    quantizer.scale()
    tensors = quantizer.round()
    for path in LINEARS:
        words = (tensors.pop(f"{path}.{leaf}") for leaf in ("qweight", "qzeros", "scales"))
        assert torch.equal(layer.get_submodule(path).weight, unpack_awq(*words, GROUP_SIZE, torch.float32))
    assert sorted(tensors) == sorted(n for n, _ in layer.named_parameters() if not n.endswith("_proj.weight"))
    assert all(torch.equal(tensor.float(), layer.get_parameter(name)) for name, tensor in tensors.items())


def test_eight_bits_lose_a_hundredth_of_what_four_do_and_are_stored_as_computed_with():
    layer, chunk = make_layer(2)
    right = run_layer(layer, chunk) - chunk.hidden
    quantizer = searched(layer, [chunk], storage=Int8Storage(GROUP_SIZE))
    four = error(run_layer(layer, chunk, round_to_nearest(layer, STORAGE)) - chunk.hidden, right)
    quantizer.scale()
    tensors = quantizer.round()
    assert error(run_layer(layer, chunk) - chunk.hidden, right) < 0.01 * four
    for path in LINEARS:
        words = tensors[f"{path}.weight_packed"], tensors[f"{path}.weight_scale"]
        weight = layer.get_submodule(path).weight
        assert torch.equal(weight, unpack_int8(*words, GROUP_SIZE, torch.float32))
        assert tensors[f"{path}.weight_shape"].tolist() == list(weight.shape)


@pytest.mark.parametrize("storage", [STORAGE, Int4Storage(GROUP_SIZE), Int8Storage(GROUP_SIZE)], ids=repr)
def test_a_linear_packed_some_rows_at_a_time_is_the_same(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(40, 64)
    whole = storage.pack(weight)
    monkeypatch.setattr("lowvram.quant.layer.CLIP_SLICE_WEIGHTS", 16 * 64)
    tensors = store_linear(weight.clone(), storage)
    layout = {leaf: (spec.shape, spec.dtype) for leaf, spec in storage.layout(64, 40).items()}
    assert {leaf: (tuple(tensor.shape), tensor.dtype) for leaf, tensor in tensors.items()} == layout
    assert all(torch.equal(tensors[leaf], tensor) for leaf, tensor in whole.items())


def test_samples_of_a_chunk_do_not_see_each_other():
    layer, chunk = make_layer(1)
    alone = torch.cat([run_layer(layer, part) for part in parts(chunk, 1)])
    assert alone.shape == (SAMPLES, LENGTH, chunk.hidden.shape[-1])
    torch.testing.assert_close(run_layer(layer, chunk), alone, rtol=1e-5, atol=1e-5)
