"""Footprints: what headers and config say a checkpoint will occupy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import gelu
from transformers import AttentionInterface
from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as configs
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as reference

from lowvram import attention
from lowvram.errors import CheckpointError
from lowvram.flow import PromptEmbeds
from lowvram.kv_cache import Int8KVCache, KVCache
from lowvram.model import Decoder
from lowvram.offload.budget import GIB, KIB, MIB
from lowvram.offload.footprint import (
    AudioShape,
    DecoderShape,
    Decoding,
    Footprint,
    StoredTensor,
    VisionShape,
    read_footprint,
)
from lowvram.offload.meter import LiveBytes
from lowvram.options import KVPrecision
from lowvram.thinker import Thinker, prefill
from lowvram.token2wav.vocoder import StreamingVocoder

Headers = dict[str, StoredTensor]

BF16 = torch.bfloat16
CPU = torch.device("cpu")


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


def test_kv_bytes_per_token_are_the_known_ones(seven_b: Footprint):
    assert seven_b.talker is not None
    assert seven_b.thinker.kv_bytes_per_token(2) == 56 * KIB
    assert seven_b.talker.kv_bytes_per_token(2) == 48 * KIB


def test_an_int8_cache_stores_a_byte_per_element_and_a_scale_per_head(seven_b: Footprint):
    assert seven_b.thinker.kv_bytes_per_token(2, "int8") == 2 * 28 * 4 * (128 + 4)


def test_an_int8_cache_is_priced_as_it_allocates():
    cache = Int8KVCache(3, 4, 64, 100, dtype=torch.bfloat16, device=CPU)
    shape = DecoderShape(3, 256, 256, heads=4, kv_heads=4, head_dim=64, input_size=256, vocab=16)
    assert cache.n_bytes == 100 * shape.kv_bytes_per_token(2, "int8")


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


def test_a_tensor_takes_whole_alignment_units(headers: Headers, config: dict[str, Any]):
    before = read_footprint(headers, config, width_bytes=2).component_bytes("thinker")
    odd = headers | {"thinker.model.layers.0.odd": Stored("F16", (129,), 258)}
    assert read_footprint(odd, config, width_bytes=2).component_bytes("thinker") == before + 512


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


# The formulas against the layers that run, counted. At 7B widths on the meta device the loops are those of the stages,
# and attention is a leaf, as a flash kernel is, which keeps nothing but its result.


def leaf_attention(module: Any, query: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None]:
    return torch.empty_like(query).transpose(1, 2), None


AttentionInterface.register("leaf", leaf_attention)


def peak_bytes(run: Callable[[], object], device: str = "meta") -> int:
    """The most bytes of tensors alive on a device while `run` runs."""
    with torch.device(device), torch.inference_mode(), LiveBytes(device) as ledger:
        run()
    return ledger.peak_bytes


def text_model(device: str, implementation: str, **sizes: Any) -> Any:
    """A thinker's decoder of two layers."""
    config = configs.Qwen2_5OmniTextConfig(num_hidden_layers=2, vocab_size=16, **sizes)
    config._attn_implementation = implementation
    with torch.device(device):
        return reference.Qwen2_5OmniThinkerTextModel(config).to(BF16)


def test_prefill_of_a_7b_is_planned_as_its_wide_mlp_runs():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    model = text_model("meta", "leaf", rope_parameters=rope)
    shape = DecoderShape(2, 3584, 18944, heads=28, kv_heads=4, head_dim=128, input_size=3584, vocab=16)

    def run() -> None:
        cache = KVCache(2, 4, 128, 512, dtype=BF16, device=torch.device("meta"))
        for _ in range(2):
            embeds = hidden = torch.empty(1, 256, 3584, dtype=BF16)
            rotary = model.rotary_emb(embeds, torch.empty(3, 1, 256, dtype=torch.long))
            for layer in model.layers:
                hidden = layer(hidden, position_embeddings=rotary, past_key_values=cache)
            last = model.norm(hidden)
        del last

    planned = shape.activation_bytes(256, 2) + 512 * shape.kv_bytes_per_token(2)
    assert 1 <= planned / peak_bytes(run) < 1.05


@pytest.mark.parametrize(
    ("kv", "tokens", "loosest"), [("16bit", 1024, 1.15), ("int8", 1024, 1.3), ("int8", 4096, 1.15)]
)
def test_prefill_of_a_narrow_mlp_is_planned_as_its_attention_runs(kv: KVPrecision, tokens: int, loosest: float):
    """The thinker's own loop and attention on the CPU, where merging two parts in float32 is the widest point. With
    fewer positions than a slice of an int8 cache has, the newest are read apart, and so not twice as planned."""
    attention.register()
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = text_model("cpu", attention.NAME, rope_parameters=rope, **sizes)
    shape = DecoderShape(2, 128, 128, heads=4, kv_heads=2, head_dim=32, input_size=128, vocab=16)
    layers = [nullcontext(layer) for layer in model.layers]
    rest: Any = nullcontext(torch.nn.ModuleDict({"norm": model.norm}))
    thinker = Thinker(Decoder(model.rotary_emb, 2, 2, 32, BF16), layers, rest, lm_head=rest, embed_tokens=None)
    prompt = PromptEmbeds(
        torch.zeros(tokens, 128, dtype=BF16),
        torch.zeros(tokens, dtype=torch.bool),
        torch.zeros(3, tokens).long(),
        tokens,
    )

    def run() -> None:
        cache = thinker.decoder.new_cache(tokens, CPU, kv)
        for _ in prefill(thinker, prompt, cache, chunk_tokens=lambda: 256, talker_rows=None, device=CPU):
            pass

    planned = shape.activation_bytes(256, 2, kv, tokens) + tokens * shape.kv_bytes_per_token(2, kv)
    assert 1 <= planned / peak_bytes(run, "cpu") < loosest


def test_seeing_is_planned_as_the_vision_layers_run():
    config = configs.Qwen2_5OmniVisionEncoderConfig(depth=2, hidden_size=1280)
    config._attn_implementation = "leaf"
    with torch.device("meta"):
        tower = reference.Qwen2_5OmniVisionEncoder(config).to(BF16)
    shape = VisionShape(hidden=1280, intermediate=3420, head_dim=80, patch_elements=1176)

    def run() -> None:
        pixels = torch.empty(1024, 1176, dtype=BF16)
        hidden, rotary = tower.patch_embed(pixels), (torch.empty(1024, 80), torch.empty(1024, 80))
        bounds = torch.arange(0, 1025, 64, device="cpu")
        for block in tower.blocks:
            hidden = block(hidden, cu_seqlens=bounds, position_embeddings=rotary)
        tower.merger(hidden)

    assert 1 <= shape.activation_bytes(1024, 2) / peak_bytes(run) < 1.05


def test_hearing_is_planned_as_the_audio_layers_run():
    config = configs.Qwen2_5OmniAudioEncoderConfig(encoder_layers=2)
    config._attn_implementation = "leaf"
    with torch.device("meta"):
        tower = reference.Qwen2_5OmniAudioEncoder(config).to(BF16)
    shape = AudioShape(hidden=1280, ffn=5120, mel_bins=128, window_frames=200)

    def run() -> None:
        mel = torch.empty(128, 800, dtype=BF16)
        rows = [gelu(tower.conv2(gelu(tower.conv1(window[None]))))[0].T for window in mel.split(200, dim=1)]
        hidden, bounds = torch.cat(rows), torch.arange(0, 401, 100, device="cpu")
        for layer in tower.layers:
            (hidden,) = layer(hidden, cu_seqlens=bounds)

    assert 1 <= shape.activation_bytes(4, 2) / peak_bytes(run) < 1.05


def test_sounding_is_planned_as_the_vocoder_runs(seven_b: Footprint):
    """In chunks of 120 codes, which the DiT of one evaluation is narrower for."""
    assert seven_b.sound is not None
    decoding = Decoding(chunk_codes=120, evaluations=1)
    with torch.device("meta"):
        vocoder = reference.Qwen2_5OmniToken2WavBigVGANModel(configs.Qwen2_5OmniBigVGANConfig()).eval()

    def run() -> None:
        stream = StreamingVocoder(vocoder)
        for last in (False, False, True):
            stream.push(torch.empty(1, 80, 240), last)

    planned = seven_b.sound.activation_bytes(decoding) + seven_b.sound.state_bytes(replace(decoding, evaluations=0))
    assert 1 <= planned / peak_bytes(run) < 1.15
