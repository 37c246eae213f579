"""The headers and config of a checkpoint of the true 7B-AWQ shape, made by formula: nothing is downloaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from lowvram.offload.footprint import Footprint, read_footprint

ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4}
GROUP_SIZE = 128


@dataclass(frozen=True)
class Header:
    """One tensor of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


CONFIG: dict[str, Any] = {
    "enable_audio_output": True,
    "thinker_config": {
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        "vision_config": {
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "temporal_patch_size": 2,
        },
        "audio_config": {"d_model": 1280, "encoder_ffn_dim": 5120, "num_mel_bins": 128, "n_window": 100},
    },
    "talker_config": {
        "embedding_size": 3584,
        "head_dim": 128,
        "hidden_size": 896,
        "intermediate_size": 18944,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 8448,
    },
    "token2wav_config": {"dit_config": {"dim": 1024, "depth": 22, "ff_mult": 2}, "bigvgan_config": {}},
}


def dense(name: str, *shape: int, bias: bool = True, dtype: str = "F16") -> Iterator[tuple[str, Header]]:
    yield f"{name}.weight", Header(dtype, shape)
    if bias:
        yield f"{name}.bias", Header(dtype, shape[:1])


def awq(name: str, n_out: int, n_in: int, bias: bool) -> Iterator[tuple[str, Header]]:
    yield f"{name}.qweight", Header("I32", (n_in, n_out // 8))
    yield f"{name}.qzeros", Header("I32", (n_in // GROUP_SIZE, n_out // 8))
    yield f"{name}.scales", Header("F16", (n_in // GROUP_SIZE, n_out))
    if bias:
        yield f"{name}.bias", Header("F16", (n_out,))


def decoder_layer(
    name: str, hidden: int, heads: int, quantized: bool, intermediate: int = 18944
) -> Iterator[tuple[str, Header]]:
    linears = {
        "self_attn.q_proj": (heads * 128, hidden, True),
        "self_attn.k_proj": (512, hidden, True),
        "self_attn.v_proj": (512, hidden, True),
        "self_attn.o_proj": (hidden, heads * 128, False),
        "mlp.gate_proj": (intermediate, hidden, False),
        "mlp.up_proj": (intermediate, hidden, False),
        "mlp.down_proj": (hidden, intermediate, False),
    }
    for linear, (n_out, n_in, bias) in linears.items():
        make = awq if quantized else dense
        yield from make(f"{name}.{linear}", n_out, n_in, bias=bias)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield from dense(f"{name}.{norm}", hidden, bias=False)


def thinker() -> Iterator[tuple[str, Header]]:
    for layer in range(28):
        yield from decoder_layer(f"thinker.model.layers.{layer}", 3584, 28, quantized=True)
    yield from dense("thinker.model.norm", 3584, bias=False)
    yield from dense("thinker.model.embed_tokens", 152064, 3584, bias=False)
    yield from dense("thinker.lm_head", 152064, 3584, bias=False)


def visual() -> Iterator[tuple[str, Header]]:
    for layer in range(32):
        block = f"thinker.visual.blocks.{layer}"
        for linear in ("q", "k", "v", "proj"):
            yield from dense(f"{block}.attn.{linear}", 1280, 1280)
        for linear in ("gate_proj", "up_proj"):
            yield from dense(f"{block}.mlp.{linear}", 3420, 1280)
        yield from dense(f"{block}.mlp.down_proj", 1280, 3420)
        yield from dense(f"{block}.norm1", 1280, bias=False)
        yield from dense(f"{block}.norm2", 1280, bias=False)
    yield from dense("thinker.visual.patch_embed.proj", 1280, 3, 2, 14, 14, bias=False)
    yield from dense("thinker.visual.merger.ln_q", 1280, bias=False)
    yield from dense("thinker.visual.merger.mlp.0", 5120, 5120)
    yield from dense("thinker.visual.merger.mlp.2", 3584, 5120)


def audio_tower() -> Iterator[tuple[str, Header]]:
    for layer in range(32):
        block = f"thinker.audio_tower.layers.{layer}"
        for linear in ("q_proj", "v_proj", "out_proj"):
            yield from dense(f"{block}.self_attn.{linear}", 1280, 1280)
        yield from dense(f"{block}.self_attn.k_proj", 1280, 1280, bias=False)
        yield from dense(f"{block}.fc1", 5120, 1280)
        yield from dense(f"{block}.fc2", 1280, 5120)
        yield from dense(f"{block}.self_attn_layer_norm", 1280)
        yield from dense(f"{block}.final_layer_norm", 1280)
    yield from dense("thinker.audio_tower.conv1", 1280, 128, 3)
    yield from dense("thinker.audio_tower.conv2", 1280, 1280, 3)
    yield from dense("thinker.audio_tower.ln_post", 1280)
    yield from dense("thinker.audio_tower.proj", 3584, 1280)
    yield from dense("thinker.audio_tower.audio_bos_eos_token", 2, 3584, bias=False)


def talker() -> Iterator[tuple[str, Header]]:
    for layer in range(24):
        yield from decoder_layer(f"talker.model.layers.{layer}", 896, 12, quantized=False)
    yield from dense("talker.model.norm", 896, bias=False)
    yield from dense("talker.model.embed_tokens", 8448, 3584, bias=False)
    yield from dense("talker.codec_head", 8448, 896, bias=False)
    yield from dense("talker.thinker_to_talker_proj", 896, 3584)


def token2wav() -> Iterator[tuple[str, Header]]:
    """The DiT's 333.6 M parameters by what they are for, and BigVGAN's 115.4 M as one tensor."""
    dit = "token2wav.code2wav_dit_model"
    for layer in range(22):
        block = f"{dit}.transformer_blocks.{layer}"
        yield from dense(f"{block}.attn_norm.linear", 6144, 1024)
        for linear in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"):
            yield from dense(f"{block}.{linear}", 1024, 1024)
        yield from dense(f"{block}.ff.ff.0", 2048, 1024)
        yield from dense(f"{block}.ff.ff.3", 1024, 2048)
    yield from dense(f"{dit}.time_embed.time_mlp.0", 1024, 256)
    yield from dense(f"{dit}.time_embed.time_mlp.2", 1024, 1024)
    yield from dense(f"{dit}.input_embed.spk_encoder.fc", 864_640, 1)
    yield from dense(f"{dit}.norm_out.linear", 2048, 1024)
    yield from dense(f"{dit}.text_embed.codec_embed", 8194, 512, bias=False)
    yield from dense(f"{dit}.input_embed.proj", 1024, 912)
    yield from dense(f"{dit}.proj_out", 80, 1024)
    yield "token2wav.code2wav_bigvgan_model.conv_pre.weight", Header("F16", (115_400_000,))


@pytest.fixture(scope="session")
def headers() -> dict[str, Header]:
    """The published 7B-AWQ tensors, by name."""
    return {name: header for part in (thinker, visual, audio_tower, talker, token2wav) for name, header in part()}


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    """The published 7B-AWQ config, as far as memory cares."""
    return CONFIG


@pytest.fixture(scope="session")
def seven_b(headers: dict[str, Header], config: dict[str, Any]) -> Footprint:
    """The footprint of 7B-AWQ computed in 16 bit."""
    return read_footprint(headers, config, width_bytes=2)
