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
from lowvram.kv_cache import Int8KVCache
from lowvram.model import Decoder
from lowvram.offload.activations import (
    KV_SLICE_TOKENS,
    UNPACKED_WEIGHTS,
    AudioShape,
    DecoderShape,
    Decoding,
)
from lowvram.offload.budget import KIB
from lowvram.offload.footprint import Footprint
from lowvram.offload.meter import LiveBytes
from lowvram.options import KVPrecision, SamplingParams
from lowvram.quant.cuda import SLICE_WEIGHTS as CUDA_SLICE_WEIGHTS
from lowvram.quant.reference import ReferenceBackend
from lowvram.sampling import Sampler
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


def held_bytes(make: Callable[[], object]) -> int:
    """Bytes of tensors on the CPU that what `make` returns keeps alive."""
    with LiveBytes("cpu") as ledger:
        made = make()
        kept_bytes = ledger.live_bytes
    del made
    return kept_bytes


SMALL = DecoderShape(3, 256, 256, heads=4, kv_heads=4, head_dim=64, input_size=256, vocab=1000)


def test_what_a_sampler_keeps_between_draws_is_planned():
    def drawn_from() -> Sampler:
        sampler = Sampler(SamplingParams(temperature=1.0), vocab_size=1000, device=CPU, seed=0)
        sampler(torch.zeros(1000))
        return sampler

    last_row_bytes = 256 * 2
    assert held_bytes(drawn_from) + last_row_bytes == SMALL.state_bytes(2)


def test_what_an_int8_cache_holds_beside_its_positions_is_planned():
    cache_bytes = held_bytes(lambda: Int8KVCache(3, 4, 64, 100, dtype=BF16, device=CPU))
    state_bytes = SMALL.state_bytes(2, "int8") - SMALL.state_bytes(2)
    assert cache_bytes == 100 * SMALL.kv_bytes_per_token(2, "int8") + state_bytes


@pytest.mark.parametrize(("decoding", "megabytes"), [(Decoding(), 24.2), (Decoding("balanced", ahead_codes=24), 16.8)])
def test_what_a_7b_keeps_between_chunks_of_speech_is_the_known_amount(
    seven_b: Footprint, decoding: Decoding, megabytes: float
):
    assert seven_b.sound is not None
    assert seven_b.sound.state_bytes(decoding) / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_a_slice_of_an_int8_cache_is_as_long_as_the_one_that_attention_reads():
    assert KV_SLICE_TOKENS == attention.SLICE_POSITIONS


def test_slices_of_an_int8_cache_are_planned_for_as_many_positions_as_there_are():
    def reads(prompt_tokens: int, cache_tokens: int) -> int:
        many_heads = DecoderShape(1, 64, 64, heads=64, kv_heads=64, head_dim=64, input_size=64, vocab=16)
        return many_heads.activation_bytes(16, 2, "int8", prompt_tokens, cache_tokens)

    position_bytes = 64 * 64 * (2 * 2 + 4)
    assert reads(1016, 0) - reads(516, 0) == 500 * position_bytes
    assert reads(16, 1000) - reads(16, 500) == 500 * position_bytes
    assert reads(9000, 0) == reads(2064, 0) > reads(2063, 0)


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


def prefilled(shape: DecoderShape, device: str, tokens: int, kv: KVPrecision) -> Callable[[], None]:
    """The thinker's own loop reading a prompt in chunks of 256."""
    attention.register()
    sections = [shape.head_dim // 8, shape.head_dim * 3 // 16, shape.head_dim * 3 // 16]
    config = configs.Qwen2_5OmniTextConfig(
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
    )
    config._attn_implementation = attention.NAME
    with torch.device(device):
        model: Any = reference.Qwen2_5OmniThinkerTextModel(config).to(BF16)
    decoder = Decoder(model.rotary_emb, shape.layers, shape.kv_heads, shape.head_dim, BF16)
    rest: Any = nullcontext(torch.nn.ModuleDict({"norm": model.norm}))
    thinker = Thinker(decoder, [nullcontext(layer) for layer in model.layers], rest, lm_head=rest, embed_tokens=None)
    embeds, no_media = torch.zeros(tokens, shape.hidden, dtype=BF16), torch.zeros(tokens, dtype=torch.bool)
    prompt = PromptEmbeds(embeds, no_media, torch.zeros(3, tokens).long(), tokens)

    def run() -> None:
        place = torch.device(device)
        cache = decoder.new_cache(tokens, place, kv)
        for _ in prefill(thinker, prompt, cache, chunk_tokens=lambda: 256, talker_rows=None, device=place):
            pass

    return run


def test_prefill_of_a_7b_is_planned_as_its_wide_mlp_runs():
    shape = DecoderShape(2, 3584, 18944, heads=28, kv_heads=4, head_dim=128, input_size=3584, vocab=16)
    planned = shape.activation_bytes(256, 2) + shape.state_bytes(2) + 512 * shape.kv_bytes_per_token(2)
    assert 1 <= planned / peak_bytes(prefilled(shape, "meta", 512, "16bit")) < 1.01


@pytest.mark.parametrize(("kv", "tokens"), [("16bit", 1024), ("int8", 1024), ("int8", 4096)])
def test_prefill_of_a_narrow_mlp_is_planned_as_its_attention_runs(kv: KVPrecision, tokens: int):
    """On the CPU, where merging two parts in float32 is the widest point, or reading slices of an int8 cache."""
    shape = DecoderShape(2, 128, 128, heads=4, kv_heads=2, head_dim=32, input_size=128, vocab=16)
    planned = shape.activation_bytes(256, 2, kv, tokens, 0) + shape.state_bytes(2, kv)
    planned += tokens * shape.kv_bytes_per_token(2, kv)
    assert 1 <= planned / peak_bytes(prefilled(shape, "cpu", tokens, kv), "cpu") < 1.15


@pytest.mark.parametrize(("in_features", "out_features"), [(3584, 18944), (18944, 3584)], ids=["wide", "long"])
def test_a_4_bit_linear_is_planned_as_the_reference_backend_unpacks_it(in_features: int, out_features: int):
    shape = DecoderShape(1, 3584, 18944, 28, 4, 128, input_size=3584, vocab=16, unpacked_weights=UNPACKED_WEIGHTS)
    backend = ReferenceBackend()

    def run() -> None:
        layout = backend.layout(in_features, out_features, 128, torch.float16)
        weights = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in layout.items()}
        packed_bytes.append(sum(weight.nbytes for weight in weights.values()))
        backend.matmul(torch.empty(1, in_features, dtype=torch.float16), weights, 128)

    packed_bytes: list[int] = []
    traced = peak_bytes(run) - packed_bytes[0]
    assert 1 <= shape.activation_bytes(1, 2) / traced < 1.05


def test_the_cuda_backend_unpacks_less_than_is_planned():
    shape = DecoderShape(1, 3584, 18944, 28, 4, 128, input_size=3584, vocab=16, unpacked_weights=UNPACKED_WEIGHTS)
    assert shape.activation_bytes(1, 2) > 2 * CUDA_SLICE_WEIGHTS


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
