"""Footprints: what headers and config say a checkpoint will occupy."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniToken2WavConfig

from lowvram.errors import CheckpointError
from lowvram.offload.activations import UNPACKED_WEIGHTS
from lowvram.offload.budget import GIB, MIB
from lowvram.offload.footprint import Footprint, StoredTensor, read_footprint

Headers = dict[str, StoredTensor]


class Stored(NamedTuple):
    """A tensor that a test adds to the headers."""

    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


def changed(config: Mapping[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of the config with one number replaced, by dotted path."""
    changed = copy.deepcopy(dict(config))
    *parents, leaf = path.split(".")
    part = changed
    for parent in parents:
        part = part[parent]
    part[leaf] = value
    return changed


def test_the_shape_under_test_has_the_published_number_of_parameters(headers: Headers):
    stored = {name: header for name, header in headers.items() if not name.endswith((".qzeros", ".scales"))}
    parameters = sum(math.prod(h.shape) * (8 if h.dtype == "I32" else 1) for h in stored.values())
    assert parameters / 1e9 == pytest.approx(10.73, abs=0.01)


@pytest.mark.parametrize(
    ("component", "gib"),
    [
        ("audio_tower", 1.19),
        ("visual", 1.26),
        ("thinker", 3.16),
        ("lm_head", 1.02),
        ("talker", 2.46),  # 2.52 with its embedding, which stays on the host
        ("dit", 0.71),  # float32
        ("dit_conditioning", 0.54),  # float32
        ("bigvgan", 0.43),  # float32
    ],
)
def test_7b_awq_components_have_their_known_sizes(seven_b: Footprint, component: str, gib: float):
    assert seven_b.component_bytes(component) / GIB == pytest.approx(gib, abs=0.006)


def test_embedding_tables_stay_on_the_host(seven_b: Footprint):
    assert seven_b.host_bytes == (152064 * 3584 + 8448 * 3584 + 2 * 3584) * 2


def test_a_layered_component_is_its_layers_in_order_and_then_the_rest(headers: Headers, config: dict[str, Any]):
    backwards = dict(reversed(headers.items()))
    names = [block.name for block in read_footprint(backwards, config, width_bytes=2).components["thinker"]]
    assert names == [*(f"thinker.{layer}" for layer in range(28)), "thinker.rest"]


@pytest.mark.parametrize("component", ["lm_head", "dit_conditioning", "bigvgan"])
def test_the_other_components_are_one_block(seven_b: Footprint, component: str):
    assert [block.name for block in seven_b.components[component]] == [component]


def test_a_4_bit_layer_keeps_its_packed_bytes(seven_b: Footprint):
    assert seven_b.components["thinker"][0].n_bytes / MIB == pytest.approx(115.5, abs=0.05)


def test_the_vocoders_arithmetic_is_that_of_its_residual_blocks(seven_b: Footprint):
    """By hand: channels squared times positions, of six layers, by (3 + 7 + 11) taps x 6 convolutions x 2."""
    squares = [768**2 * 5, 384**2 * 15, 192**2 * 30, 96**2 * 60, 48**2 * 120, 24**2 * 240]
    assert seven_b.sound is not None
    assert seven_b.sound.vocoder_flops_per_frame == 21 * 6 * 2 * sum(squares)


def test_float32_doubles_float_tensors_but_not_packed_words_nor_token2wav(headers: Headers, config: dict[str, Any]):
    half, full = (read_footprint(headers, config, width_bytes=width) for width in (2, 4))
    assert full.component_bytes("visual") == 2 * half.component_bytes("visual")
    assert full.component_bytes("dit") == half.component_bytes("dit")
    packed = sum(h.n_bytes for h in headers.values() if h.dtype == "I32")
    assert full.component_bytes("thinker") - packed == 2 * (half.component_bytes("thinker") - packed)


def test_in_half_precision_the_dits_layers_weigh_half_and_its_rest_as_much(seven_b: Footprint):
    whole, half = (seven_b.speaking_in(dtype).components["dit"] for dtype in ("float32", "float16"))
    assert [2 * layer.n_bytes for layer in half[:-1]] == [layer.n_bytes for layer in whole[:-1]]
    assert half[-1] == whole[-1]


def test_only_stacks_that_store_packed_linears_dequantize(seven_b: Footprint):
    assert seven_b.talker is not None
    stacks = seven_b.thinker, seven_b.talker, seven_b.visual, seven_b.audio
    assert [stack.unpacked_weights for stack in stacks] == [UNPACKED_WEIGHTS, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("thinker.visual.blocks.0.attn.q.weight", "visual"),
        ("thinker.audio_tower.layers.0.fc1.weight", "audio"),
        ("talker.model.layers.0.mlp.up_proj.weight", "talker"),
        ("thinker.lm_head.weight", "thinker"),
    ],
)
def test_one_packed_linear_is_enough(headers: Headers, config: dict[str, Any], name: str, stack: str):
    floats = {each: header for each, header in headers.items() if header.dtype != "I32"}
    before = read_footprint(floats, config, width_bytes=2)
    after = read_footprint(floats | {name: Stored("I32", (3584, 448), 4 * 3584 * 448)}, config, width_bytes=2)
    names = ("thinker", "talker", "visual", "audio")
    unpacked = {each: getattr(after, each).unpacked_weights for each in names}
    assert unpacked == dict.fromkeys(names, 0) | {stack: UNPACKED_WEIGHTS}
    assert all(getattr(before, each).unpacked_weights == 0 for each in names)


def test_a_tensor_takes_whole_alignment_units(headers: Headers, config: dict[str, Any]):
    before = read_footprint(headers, config, width_bytes=2).component_bytes("thinker")
    odd = headers | {"thinker.model.layers.0.odd": Stored("F16", (129,), 258)}
    assert read_footprint(odd, config, width_bytes=2).component_bytes("thinker") == before + 512


W8, W4 = {"num_bits": 8}, {"num_bits": 4}


@pytest.mark.parametrize(
    ("groups", "scale_bytes"),
    [([W4], 3), ([W8, W4], 3), ([W8], 2), ([W4 | {"symmetric": False}], 2)],
    ids=["symmetric", "of one width of two", "8 bits", "stored"],
)
def test_zero_points_that_a_symmetric_checkpoint_does_not_store_are_beside_its_scales(
    headers: Headers, config: dict[str, Any], seven_b: Footprint, groups: list[dict[str, Any]], scale_bytes: int
):
    entry = {"config_groups": {str(index): {"weights": weights} for index, weights in enumerate(groups)}}
    scaled = headers | {"thinker.model.layers.0.mlp.up_proj.weight_scale": Stored("F16", (256, 4), 2048)}
    read = read_footprint(scaled, config | {"quantization_config": entry}, width_bytes=2)
    assert read.component_bytes("thinker") == seven_b.component_bytes("thinker") + 1024 * scale_bytes


def test_a_tied_head_is_priced_by_the_embedding(headers: Headers, config: dict[str, Any], seven_b: Footprint):
    tied = {name: header for name, header in headers.items() if name != "thinker.lm_head.weight"}
    assert read_footprint(tied, config, width_bytes=2).components == seven_b.components


@pytest.mark.parametrize("silenced_by", ["config", "missing talker"])
def test_a_checkpoint_that_does_not_speak_has_no_speech_components(
    headers: Headers, config: dict[str, Any], silenced_by: str
):
    if silenced_by == "config":
        config = changed(config, "enable_audio_output", False)
    else:
        headers = {name: h for name, h in headers.items() if not name.startswith(("talker.", "token2wav."))}
    silent = read_footprint(headers, config, width_bytes=2)
    assert not silent.speaks
    assert set(silent.components) == {"audio_tower", "visual", "thinker", "lm_head"}


def test_a_tensor_of_another_model_is_refused_by_name(headers: Headers, config: dict[str, Any]):
    with pytest.raises(CheckpointError, match=r"encoder\.block\.0") as refused:
        read_footprint(headers | {"encoder.block.0": Stored("F16", (1,), 2)}, config, width_bytes=2)
    assert refused.value.tensor == "encoder.block.0"


@pytest.mark.parametrize("prefix", ["thinker.visual.", "token2wav.code2wav_dit_model."])
def test_a_missing_component_is_named(headers: Headers, config: dict[str, Any], prefix: str):
    partial = {name: header for name, header in headers.items() if not name.startswith(prefix)}
    with pytest.raises(CheckpointError, match=prefix):
        read_footprint(partial, config, width_bytes=2)


@pytest.mark.parametrize("value", [None, 0, "3584", 3584.0])
@pytest.mark.parametrize("path", ["thinker_config.text_config.hidden_size", "thinker_config.audio_config.n_window"])
def test_a_size_that_the_config_does_not_give_is_named(
    headers: Headers, config: dict[str, Any], path: str, value: object
):
    with pytest.raises(CheckpointError, match=path):
        read_footprint(headers, changed(config, path, value), width_bytes=2)


def test_a_config_without_a_thinker_is_refused(headers: Headers):
    with pytest.raises(CheckpointError, match=r"thinker_config\.text_config"):
        read_footprint(headers, {}, width_bytes=2)


def test_both_spellings_of_the_dit_mean_the_same(headers: Headers, config: dict[str, Any], seven_b: Footprint):
    spelled = {"hidden_size": 1024, "num_hidden_layers": 22, "ff_mult": 2, "block_size": 24, "repeats": 2}
    layers = {"look_backward_layers": [0, 20], "look_ahead_layers": [10]}
    new = changed(config, "token2wav_config.dit_config", spelled | layers)
    assert read_footprint(headers, new, width_bytes=2).sound == seven_b.sound


def test_sizes_of_token2wav_that_a_config_leaves_out_are_the_references(
    headers: Headers, config: dict[str, Any], seven_b: Footprint
):
    written = Qwen2_5OmniToken2WavConfig().to_dict()
    for token2wav in ({}, {part: written[part] for part in ("dit_config", "bigvgan_config")}):
        whole = changed(config, "token2wav_config", token2wav)
        assert read_footprint(headers, whole, width_bytes=2).sound == seven_b.sound


def test_what_the_towers_are_given_at_a_time_is_as_published(seven_b: Footprint):
    assert (seven_b.visual.patch_elements, seven_b.visual.head_dim) == (3 * 2 * 14 * 14, 80)
    assert (seven_b.audio.window_frames, seven_b.audio.mel_bins) == (200, 128)
