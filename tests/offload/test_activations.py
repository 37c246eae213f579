"""What stages are planned to compute with, beside what they do when they run without data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu
from transformers import AttentionInterface
from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as configs
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as reference

from lowvram import attention
from lowvram.flow import PromptEmbeds
from lowvram.kv_cache import Int8KVCache, KVCache
from lowvram.model import Decoder
from lowvram.offload.activations import AudioShape, DecoderShape, Decoding, VisionShape
from lowvram.offload.budget import KIB
from lowvram.offload.footprint import Footprint
from lowvram.offload.meter import LiveBytes
from lowvram.options import KVPrecision
from lowvram.thinker import Thinker, prefill
from lowvram.token2wav.vocoder import StreamingVocoder

BF16 = torch.bfloat16
CPU = torch.device("cpu")


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
