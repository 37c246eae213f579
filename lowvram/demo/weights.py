"""The demo's tensors: published names and shapes from the reference's own modules, values drawn from a seed, on disk
as sharded safetensors.

Each tensor has a random stream of its own (seed and name), and is drawn and written in pieces, so that memory stays
flat at any size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..checkpoint import INDEX_FILE, ITEM_BYTES
from .config import (
    CODEC_EOS,
    CODEC_IDS,
    DIT_ROPE_THETA,
    IM_END,
    MEL_BINS,
    SPEAKER_WIDTH,
    UPSAMPLE_RATES,
    VOICE_BOS,
    DemoSize,
)
from .tokenizer import bpe, spoken_tokens, write_json

STORED_AS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
TORCH_DTYPE = {code: getattr(torch, name) for name, code in STORED_AS.items()}

PIECE_BYTES = 64 * 1024**2
"""How much of a tensor is in memory at a time."""

NIBBLE_SPREAD = math.sqrt((16**2 - 1) / 12 + (4**2 - 1) / 12)
"""Standard deviation of q - z for q uniform in 0..15 and z uniform in 6..9, which has mean 0."""

GAINS = {
    ".q_proj.": 2.0,  # attention that looks somewhere: logits of deviation 4
    ".k_proj.": 2.0,
    ".o_proj.": 1.5,  # and says what it saw, lest the next word depend on the last one only
    ".attn.q.": 1.4,
    ".attn.k.": 1.4,
    ".to_q.": 1.4,
    ".to_k.": 1.4,
    ".to_out.": 2.0,  # so that neighbouring DiT blocks are heard
    ".convs2.": 0.5,  # six residual steps per stage
    "conv_post.": 0.07,  # sound well inside -1..1
}
"""Deviation of a weight's output relative to its input, where it is not 1."""

QUIET = 0.1
"""Gain of output rows that the demo should not choose: all but whole words, codes that sound, and the ends of both."""


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def write_weights(folder: Path, config: dict[str, Any], size: DemoSize, seed: int, dtype: str) -> None:
    """Write model-0000i-of-0000n.safetensors and their index into `folder`; `dtype` as in `STORED_AS`."""
    shards = _shards(list(stored_tensors(config, size, STORED_AS[dtype])), size.shard_bytes)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}

    def write(file: str, shard: list[Stored]) -> None:
        with open(folder / file, "wb") as out:
            _write_header(out, shard)
            for tensor in shard:
                for piece in draw(tensor, size, seed):
                    out.write(piece.view(torch.uint8).numpy().data)

    with ThreadPoolExecutor() as pool:  # NumPy draws without the interpreter's lock
        list(pool.map(write, files, shards))
    total_bytes = sum(tensor.n_bytes for shard in shards for tensor in shard)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def write_speakers(path: Path, size: DemoSize, seed: int) -> None:
    """Write spk_dict.pt: per voice the text id before its replies, `cond` [1, 192] and `ref_mel` [1, 60, 80]."""
    voices = {}
    for name, bos_distance in VOICE_BOS.items():
        rng = _random_stream(seed, name)
        voices[name] = {
            "bos_token": size.first_special_id + bos_distance,
            "cond": torch.from_numpy(rng.standard_normal((1, SPEAKER_WIDTH), dtype=np.float32)),
            "ref_mel": torch.from_numpy(rng.standard_normal((1, 60, MEL_BINS), dtype=np.float32) * 2 - 4),
        }
    torch.save(voices, path)


def stored_tensors(config: dict[str, Any], size: DemoSize, dtype: str) -> Iterator[Stored]:
    """All tensors of the checkpoint, the thinker's linears as AWQ stores them when `config` says so."""
    quantized = "quantization_config" in config
    for name, shape in _float_tensors(config, size):
        if quantized and name.startswith("thinker.model.layers.") and name.endswith("_proj.weight"):
            n, k = shape
            path, groups = name.removesuffix("weight"), k // size.group_size
            yield Stored(f"{path}qweight", "I32", (k, n // 8))
            yield Stored(f"{path}qzeros", "I32", (groups, n // 8))
            yield Stored(f"{path}scales", "F16", (groups, n))
        elif name.startswith("token2wav.") and not quantized:
            yield Stored(name, "F32", shape)
        else:
            yield Stored(name, dtype, shape)


def _float_tensors(config: dict[str, Any], size: DemoSize) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published names and shapes before quantization."""
    from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as configs
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modules

    from ..model import without_vocabulary_warnings

    with without_vocabulary_warnings():
        parsed: Any = configs.Qwen2_5OmniConfig.from_dict(config)
    thinker, talker, token2wav = parsed.thinker_config, parsed.talker_config, parsed.token2wav_config
    with torch.device("meta"):
        parts = {
            "thinker.audio_tower.": modules.Qwen2_5OmniAudioEncoder(thinker.audio_config),
            "thinker.visual.": modules.Qwen2_5OmniVisionEncoder(thinker.vision_config),
            "thinker.model.": modules.Qwen2_5OmniThinkerTextModel(thinker.text_config),
            "talker.model.": modules.Qwen2_5OmniTalkerModel(talker),
            "token2wav.code2wav_dit_model.": modules.Qwen2_5OmniToken2WavDiTModel(token2wav.dit_config),
            "token2wav.code2wav_bigvgan_model.": modules.Qwen2_5OmniToken2WavBigVGANModel(token2wav.bigvgan_config),
        }
    for prefix, module in parts.items():
        yield from ((prefix + path, tuple(value.shape)) for path, value in module.state_dict().items())
    yield "thinker.lm_head.weight", (size.vocab_size, size.hidden)
    yield "talker.thinker_to_talker_proj.weight", (size.talker_hidden, size.hidden)
    yield "talker.thinker_to_talker_proj.bias", (size.talker_hidden,)
    yield "talker.codec_head.weight", (talker.vocab_size, size.talker_hidden)
    # Every reader computes it, but releases of the reference from the model's time stored it too.
    yield "token2wav.code2wav_dit_model.rotary_embed.inv_freq", (token2wav.dit_config.head_dim // 2,)


def draw(tensor: Stored, size: DemoSize, seed: int) -> Iterator[torch.Tensor]:
    """The tensor's values, some rows at a time; the same whatever the piece size."""
    rng = _random_stream(seed, tensor.name)
    gains = _row_gains(tensor.name, size)
    rows = max(1, PIECE_BYTES // (4 * math.prod(tensor.shape[1:])))
    for first in range(0, tensor.shape[0], rows):
        shape = (min(rows, tensor.shape[0] - first), *tensor.shape[1:])
        if tensor.dtype == "I32":
            yield torch.from_numpy(_nibbles(rng, shape, zeros=tensor.name.endswith("qzeros")))
            continue
        values = _floats(tensor, rng, shape, size)
        if gains is not None:
            values *= gains[first : first + len(values), None]
        yield torch.from_numpy(values).to(TORCH_DTYPE[tensor.dtype])


def _random_stream(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _nibbles(rng: np.random.Generator, shape: tuple[int, ...], *, zeros: bool) -> np.ndarray:
    """Words of eight 4-bit values: 0..15 for weights, 6..9 for zero points. Any order of nibbles is as random."""
    words = rng.integers(0, 2**32, size=shape, dtype=np.uint32)
    if zeros:
        words &= np.uint32(0x33333333)
        words += np.uint32(0x66666666)
    return words.view(np.int32)


def _floats(tensor: Stored, rng: np.random.Generator, shape: tuple[int, ...], size: DemoSize) -> np.ndarray:
    """The next rows of a float tensor."""
    if tensor.name.endswith("inv_freq"):
        return DIT_ROPE_THETA ** (-np.arange(shape[0], dtype=np.float32) / shape[0])
    mean, deviation = _spread(tensor, size)
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= deviation
    values += mean
    return values


def _spread(tensor: Stored, size: DemoSize) -> tuple[float, float]:
    """Mean and standard deviation of a float tensor's values."""
    name, shape = tensor.name, tensor.shape
    if name.endswith(("embed_tokens.weight", "codec_embed.weight", "audio_bos_eos_token.weight")):
        return 0.0, 1.0
    gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
    if name.endswith(".scales"):
        scale = gain / (NIBBLE_SPREAD * math.sqrt(shape[0] * size.group_size))
        return scale, 0.1 * scale
    if len(shape) > 1:
        return 0.0, gain / math.sqrt(_fan_in(name, shape))
    if name.endswith(".weight"):
        return 1.0, 0.1  # a norm
    return 0.0, 0.3 if "attn_norm" in name or name.endswith((".alpha", ".beta")) else 0.1


def _fan_in(name: str, shape: tuple[int, ...]) -> float:
    """How many inputs one output sums: of a transposed convolution, stride outputs share a kernel."""
    if ".ups." in name:
        stage = int(name.split(".ups.")[1].split(".")[0])
        return shape[0] * shape[2] / UPSAMPLE_RATES[stage]
    return math.prod(shape[1:])


def _row_gains(name: str, size: DemoSize) -> np.ndarray | None:
    """Per row of an output head: what makes words, real codes, and the ends of both likelier than the rest."""
    if name == "thinker.lm_head.weight":
        gains = np.full(size.vocab_size, QUIET, dtype=np.float32)
        vocabulary, _ = bpe(size.first_special_id)
        gains[[vocabulary[token] for token in spoken_tokens()]] = 1.0
        gains[size.first_special_id + IM_END] = 1.15
        return gains
    if name == "talker.codec_head.weight":
        gains = np.full(size.codes + CODEC_IDS, QUIET, dtype=np.float32)
        gains[: size.codes] = 1.0
        gains[size.codes + CODEC_EOS] = 1.0
        return gains
    return None


def _shards(tensors: list[Stored], shard_bytes: int) -> list[list[Stored]]:
    """Tensors in order, a new shard whenever the next would take the last beyond `shard_bytes`."""
    shards: list[list[Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.n_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.n_bytes
    return shards


def _write_header(out: BinaryIO, shard: list[Stored]) -> None:
    """The safetensors header: its length, then JSON padded so that the first tensor begins on 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.n_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
