"""What a checkpoint will occupy, from its headers and its config alone: weights by block, KV bytes, activations.

Weights are exact: they are what the headers say, laid out as blocks are. Activations are derived from the code that
will run, tensor by tensor at its widest point; each formula stands in the docstring of the method that computes it.
Shapes below: h hidden, i intermediate, d head size, w bytes per element of the compute dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..errors import CheckpointError
from ..options import KVPrecision, SpeechDtype, SpeechMode

BLOCK_ALIGNMENT_BYTES = 256
"""Each tensor of a block starts on a multiple of this: what CUDA's own allocator aligns to."""

TOKEN2WAV_WIDTH_BYTES = 4
"""token2wav computes in float32, as the reference does."""

DIT_LAYER_WIDTH_BYTES: dict[SpeechDtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""But for the DiT's layers, if so asked."""

KV_SCALE_BYTES = 4
"""Of the float32 scale that an int8 cache keeps for each token's key and value, by KV head."""

KV_SLICE_TOKENS = 2048
"""Positions of an int8 cache that are read back at once."""

ON_HOST = (
    "thinker.model.embed_tokens.weight",
    "talker.model.embed_tokens.weight",
    "thinker.audio_tower.audio_bos_eos_token.weight",  # stored, but not even the reference reads it
)
"""Tables that never travel to the device; only their rows do."""

LM_HEAD = "thinker.lm_head.weight"

_NOISE_AND_TURN = 80 + 64
"""Elements that a waiting mel frame has beside its code row: noise for 80 mel bins, a rotary table for heads of 64."""

_PREFIXES = {
    "audio_tower": "thinker.audio_tower.",
    "visual": "thinker.visual.",
    "thinker": "thinker.model.",
    "lm_head": "thinker.lm_head.",
    "talker": "talker.",
    "dit_conditioning": "token2wav.code2wav_dit_model.",
    "dit": "token2wav.code2wav_dit_model.",
    "bigvgan": "token2wav.code2wav_bigvgan_model.",
}
_LAYER = re.compile(r"(?:model\.)?(?:layers|blocks|transformer_blocks)\.(\d+)\.")
_CONDITIONING = re.compile(r"time_embed\.|input_embed\.spk_encoder\.|norm_out\.|transformer_blocks\.\d+\.attn_norm\.")
"""Of the DiT's tensors those that voice and times alone pass through."""
_LAYERED = ("audio_tower", "visual", "thinker", "talker", "dit")
_SPEECH = ("talker", "dit_conditioning", "dit", "bigvgan")
_TOKEN2WAV = ("dit_conditioning", "dit", "bigvgan")
_FLOATS = ("F64", "F32", "F16", "BF16")


class StoredTensor(Protocol):
    """A tensor as a checkpoint's header describes it: `dtype` by safetensors' name, `n_bytes` as stored."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def n_bytes(self) -> int: ...


@dataclass(frozen=True)
class BlockSize:
    """Weights that move as one, and their bytes on the device."""

    name: str
    n_bytes: int


@dataclass(frozen=True)
class DecoderShape:
    """A decoder stack (thinker or talker). `input_size` is the width of the rows it is given, `vocab` of its logits."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    input_size: int
    vocab: int

    def kv_bytes_per_token(self, width_bytes: int, kv: KVPrecision = "16bit") -> int:
        """Keys and values of every layer: 2 x layers x KV heads x (d x w), in int8 (d + 4). 7B thinker: 56 KiB in 16
        bits, 28.9 KiB in int8."""
        head_bytes = self.head_dim * width_bytes if kv == "16bit" else self.head_dim + KV_SCALE_BYTES
        return 2 * self.layers * self.kv_heads * head_bytes

    def activation_bytes(
        self, chunk_tokens: int, width_bytes: int, kv: KVPrecision = "16bit", cache_tokens: int = KV_SLICE_TOKENS
    ) -> int:
        """Prefill of a chunk, or a decode step (a chunk of one) with its logits, whichever is wider.

        Per token, all the time: the chunk's rows as they came (`input_size`), projected if they need to be (h), the
        last chunk's result and the layer's input (2h), cosine and sine (2d), three int64 positions. Beside them the
        widest of some points. MLP: the sum with the attention and its norm (2h), the gate's activation, the up
        projection and their product (3i). Attention: the norm (h), queries, their copy as rows and two partial results
        (4 x heads x d), keys and values (2 x KV heads x d), and the float32 copies that merge the results (3 x heads
        x d at 4 bytes). 7B thinker, 16 bit: 146.5 KiB, of which the three products are 111.

        From an int8 cache attention reads slices of 2048 positions, or of all `cache_tokens` where that is fewer: one
        layer's keys and values (w each) and the float32 of whichever is being scaled; beside them the norm, queries as
        they came and turned (2 x heads x d), keys and values, and the sum of the slices so far (heads x d at 4 bytes).
        7B: 8 MiB a slice.

        The logits are drawn from in float32: penalized, sorted with their indices, summed up; about 48 bytes each.
        """
        slice_tokens = min(KV_SLICE_TOKENS, cache_tokens) if kv == "int8" else 0
        prefill_bytes = self._chunk_bytes(chunk_tokens, width_bytes, slice_tokens)
        return max(prefill_bytes, self._chunk_bytes(1, width_bytes, slice_tokens) + 48 * self.vocab)

    def state_bytes(self, width_bytes: int) -> int:
        """What stays between steps: which ids were drawn (a byte for each there is) and the last position's row."""
        return self.vocab + self.hidden * width_bytes

    def _chunk_bytes(self, chunk_tokens: int, width_bytes: int, slice_tokens: int) -> int:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        always = self.input_size + 2 * self.hidden + 2 * self.head_dim
        if self.input_size != self.hidden:
            always += self.hidden
        mlp = (2 * self.hidden + 3 * self.intermediate) * width_bytes
        merging = (self.hidden + 4 * queries + 2 * keys) * width_bytes + 3 * queries * 4
        widest = chunk_tokens * max(mlp, merging)
        if slice_tokens:
            reading = (self.hidden + 2 * queries + 2 * keys) * width_bytes + queries * 4
            widest = max(widest, chunk_tokens * reading + slice_tokens * keys * (2 * width_bytes + 4))
        return chunk_tokens * (always * width_bytes + 3 * 8) + widest


@dataclass(frozen=True)
class VisionShape:
    """The vision tower. `patch_elements` is one patch's pixels: channels x temporal patch x patch x patch."""

    hidden: int
    intermediate: int
    head_dim: int
    patch_elements: int

    def activation_bytes(self, patches: int, width_bytes: int) -> int:
        """A run of patches through a layer, whichever is wider of two points, beside pixels, rotary table and indices.

        Rotating the keys, in float32: the layer's input, its norm, q, k, v (5h at w) and the float32 copies of q and
        k, the rotated q, and three products on the way to the rotated k (6h at 4 bytes). In the MLP: the layer's
        input, its sum with the attention, the norm (3h) and the three products of gate and up (3i).
        """
        rotating = 5 * self.hidden * width_bytes + 6 * self.hidden * 4
        mlp = (3 * self.hidden + 3 * self.intermediate) * width_bytes
        beside = self.patch_elements * width_bytes + 2 * self.head_dim * 4 + 3 * 8
        return patches * (max(rotating, mlp) + beside)


@dataclass(frozen=True)
class AudioShape:
    """The audio tower. One window is `window_frames` mel frames and half as many positions."""

    hidden: int
    ffn: int
    mel_bins: int
    window_frames: int

    def activation_bytes(self, windows: int, width_bytes: int) -> int:
        """A run of windows through a layer's feed-forward part, its widest point.

        Per position: the convolved window, the layer's input and its sum with the attention (3h), the feed-forward
        product before and after its activation (2f); per mel frame its bins. The convolutions run one window at a
        time: a frame's first convolution and its activation (2h), and those of half as many positions.
        """
        positions = self.window_frames // 2
        layer = windows * (positions * (3 * self.hidden + 2 * self.ffn) + self.window_frames * self.mel_bins)
        convolving = windows * positions * self.hidden + 3 * self.window_frames * self.hidden
        return max(layer, convolving) * width_bytes


@dataclass(frozen=True)
class Decoding:
    """How codes become sound: `chunk_codes` at a time, in `cached` modes solved together with `ahead_codes` after them
    that are solved again; the DiT's layers in `dtype`."""

    mode: SpeechMode = "exact"
    evaluations: int = 9
    chunk_codes: int = 48
    ahead_codes: int = 0
    dtype: SpeechDtype = "float32"

    @property
    def layer_bytes(self) -> int:
        """Per element of the DiT's layers."""
        return DIT_LAYER_WIDTH_BYTES[self.dtype]

    def walks(self, codes: int) -> int:
        """How often a speech of so many codes walks the DiT's layers, at most.

        Each chunk does, then what is left over, then the end: once for every evaluation, but in "offload" once for all
        of them, whose last frames need a walk each.
        """
        chunks = codes // self.chunk_codes
        return chunks + 1 + self.evaluations if self.mode == "offload" else self.evaluations * (chunks + 2)


@dataclass(frozen=True)
class SoundShape:
    """token2wav. The DiT: hidden size, feed-forward size, layers, heads, frames per block, how many of its layers look
    a block back and ahead. The speaker encoder: what it holds per mel frame of a voice. BigVGAN: its widest layer in
    elements, and its operations, per mel frame. `repeats` mel frames are one code."""

    hidden: int
    ff: int
    layers: int
    heads: int
    block_frames: int
    back_layers: int
    ahead_layers: int
    repeats: int
    speaker_elements_per_frame: int
    vocoder_elements_per_frame: int
    vocoder_flops_per_frame: int = 0

    def constants_bytes(self, evaluations: int) -> int:
        """What conditioning leaves: for each ODE evaluation each layer's six modulations, and two for the output."""
        return evaluations * (6 * self.layers + 2) * self.hidden * TOKEN2WAV_WIDTH_BYTES

    def conditioning_bytes(self, voice_frames: int, evaluations: int) -> int:
        """What conditioning computes with: a voice in the speaker encoder beside the constants, and these once more."""
        encoding = voice_frames * self.speaker_elements_per_frame * TOKEN2WAV_WIDTH_BYTES
        return encoding + 2 * self.constants_bytes(evaluations)

    def state_bytes(self, decoding: Decoding) -> int:
        """What is kept between chunks, however long the speech. 7B, exactly: 25.4 MB, in "balanced" 18.0 MB.

        The constants; per evaluation the border of the DiT's layers, and, but for cached modes, frames that wait: a
        block, and in "offload" the chunk that the evaluation before gave. The vocoder's tails together are worth 230
        frames of its widest layer (5.3 MB, as traced).
        """
        tails = 230 * self.vocoder_elements_per_frame * TOKEN2WAV_WIDTH_BYTES
        return self.constants_bytes(decoding.evaluations) + self._border_bytes(decoding) + tails

    def activation_bytes(self, decoding: Decoding) -> int:
        """A chunk in the DiT or in the vocoder, whichever is larger; they take turns.

        At the end of an exact speech the blocks that waited in each evaluation come together, the last of them with the
        newest one; what they waited in is free then. The vocoder's receptive field holds back 34 frames more. Per
        frame, in an anti-aliased activation of its widest layer: the residual, the running sum of three branches, and,
        at twice the rate, input, sine, square and scaled square (10 layers, as traced), and two more to join the chunk
        to its tail.
        """
        chunk_frames = decoding.chunk_codes * self.repeats
        at_once_bytes = self._frames_at_once(decoding) * self._frame_bytes
        end_bytes = 0
        if decoding.mode == "exact":
            ending_frames = self.block_frames * (decoding.evaluations + 1)
            end_bytes = ending_frames * self._frame_bytes - self._border_bytes(decoding)
        vocoder_bytes = (chunk_frames + 34) * 12 * self.vocoder_elements_per_frame * TOKEN2WAV_WIDTH_BYTES
        return max(at_once_bytes, end_bytes, vocoder_bytes)

    def _frames_at_once(self, decoding: Decoding) -> int:
        """The frames that go through a layer of the DiT together."""
        chunk_frames = decoding.chunk_codes * self.repeats
        if decoding.mode == "offload":
            return decoding.evaluations * chunk_frames + self.block_frames
        return chunk_frames + decoding.ahead_codes * self.repeats

    @property
    def _frame_bytes(self) -> int:
        """A frame in the DiT, for two branches of guidance, where a layer attends to two blocks: rows and those that
        waited (3h), q, k, v as they came and joined to what waited (6h), each block of q with two blocks of k and v
        (5h), and, where torch spells attention out, scaled q and k (3h) and scores. 7B: 164 KB; half precision saves
        next to nothing, for that is spelled out in float32. Beside it a wide feed-forward is narrow.
        """
        scores = 4 * self.heads * 2 * self.block_frames
        return 2 * max(17 * self.hidden + scores, 6 * self.hidden + 2 * self.ff) * TOKEN2WAV_WIDTH_BYTES

    def _border_bytes(self, decoding: Decoding) -> int:
        """What each evaluation remembers. For two branches, at the layers that look back a block's keys and values; in
        exact modes at those that look ahead a block's rows, q, k and v; and frames that wait, with their code rows.
        Cached modes have one such queue for all evaluations: the chunk and its look-ahead.
        """
        queued_frame_bytes = (self.hidden + _NOISE_AND_TURN) * TOKEN2WAV_WIDTH_BYTES
        per_row_bytes = 2 * self.back_layers * decoding.layer_bytes
        if decoding.ahead_codes:
            waiting_bytes = self._frames_at_once(decoding) * queued_frame_bytes
            return decoding.evaluations * 2 * self.block_frames * self.hidden * per_row_bytes + waiting_bytes
        per_row_bytes += self.ahead_layers * (3 * decoding.layer_bytes + TOKEN2WAV_WIDTH_BYTES)
        waiting = self.block_frames
        if decoding.mode == "offload":
            waiting += decoding.chunk_codes * self.repeats
        border_bytes = 2 * self.block_frames * self.hidden * per_row_bytes
        return decoding.evaluations * (border_bytes + waiting * queued_frame_bytes)


@dataclass(frozen=True)
class Footprint:
    """Everything a plan needs to know about a checkpoint.

    `components` maps audio_tower, visual, thinker, lm_head and, if the checkpoint speaks, talker, dit_conditioning, dit
    and bigvgan to their blocks in order of use: one per layer and, last, the rest. `host_bytes` are the tables that
    stay behind, as stored. `width_bytes` is the compute dtype's; token2wav has its own, and `half_dit` is what the
    DiT's blocks would be with layers in 16 bits.
    """

    components: Mapping[str, tuple[BlockSize, ...]]
    host_bytes: int
    width_bytes: int
    thinker: DecoderShape
    visual: VisionShape
    audio: AudioShape
    talker: DecoderShape | None = None
    sound: SoundShape | None = None
    half_dit: tuple[BlockSize, ...] = ()

    def speaking_in(self, dtype: SpeechDtype) -> Footprint:
        """The footprint when the DiT's layers are of that dtype."""
        if not self.speaks or DIT_LAYER_WIDTH_BYTES[dtype] == TOKEN2WAV_WIDTH_BYTES:
            return self
        return replace(self, components={**self.components, "dit": self.half_dit})

    @property
    def speaks(self) -> bool:
        return self.talker is not None

    def component_bytes(self, name: str) -> int:
        """All of a component on the device."""
        return sum(block.n_bytes for block in self.components[name])

    def largest_block_bytes(self, name: str) -> int:
        """Room for any one block of a component."""
        return max(block.n_bytes for block in self.components[name])


def read_footprint(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], *, width_bytes: int) -> Footprint:
    """The footprint of a checkpoint whose headers are `tensors` and whose config.json is `config`, as published.

    Float tensors count at `width_bytes` (2 or 4), those of token2wav at 4, packed integers as stored. Raises
    CheckpointError for a tensor of no known component and for sizes that the config does not give.
    """
    speaks = bool(config.get("enable_audio_output", True)) and ON_HOST[1] in tensors
    wanted = {name: tensor for name, tensor in tensors.items() if speaks or _component_of(name) not in _SPEECH}
    sizes: dict[str, dict[str, int]] = {name: {} for name in _PREFIXES if speaks or name not in _SPEECH}
    sizes |= _sizes(wanted, width_bytes)
    if not sizes["lm_head"] and ON_HOST[0] in tensors:  # tied to the embedding, which itself stays on the host
        sizes["lm_head"]["lm_head"] = _device_bytes(tensors[ON_HOST[0]], width_bytes)
    _require_complete(sizes)
    dit = {name: tensor for name, tensor in wanted.items() if _component_of(name) == "dit"}
    return Footprint(
        components={name: tuple(_in_order(blocks)) for name, blocks in sizes.items()},
        host_bytes=sum(tensors[name].n_bytes for name in ON_HOST if name in tensors),
        width_bytes=width_bytes,
        thinker=_decoder_shape(config, "thinker_config.text_config", len(sizes["thinker"]) - 1),
        visual=_vision_shape(config),
        audio=_audio_shape(config),
        talker=_decoder_shape(config, "talker_config", len(sizes["talker"]) - 1) if speaks else None,
        sound=_sound_shape(config) if speaks else None,
        half_dit=tuple(_in_order(_sizes(dit, width_bytes, DIT_LAYER_WIDTH_BYTES["float16"]).get("dit", {}))),
    )


def _sizes(
    tensors: Mapping[str, StoredTensor], width_bytes: int, dit_layer_bytes: int = TOKEN2WAV_WIDTH_BYTES
) -> dict[str, dict[str, int]]:
    """Bytes on the device by component and block; float tensors of the DiT's layers have a width of their own."""
    sizes: dict[str, dict[str, int]] = {}
    for name, tensor in tensors.items():
        if name in ON_HOST:
            continue
        component = _component_of(name)
        block = _block_of(name, component)
        width = TOKEN2WAV_WIDTH_BYTES if component in _TOKEN2WAV else width_bytes
        if component == "dit" and not block.endswith(".rest"):
            width = dit_layer_bytes
        # Beside every scale of compressed-tensors lies half a byte of zero point on the device, stored or not.
        width += name.endswith(".weight_scale")
        blocks = sizes.setdefault(component, {})
        blocks[block] = blocks.get(block, 0) + _device_bytes(tensor, width)
    return sizes


def _component_of(name: str) -> str:
    for component, prefix in _PREFIXES.items():
        if name.startswith(prefix):
            is_stepped = component == "dit_conditioning" and not _CONDITIONING.match(name, len(prefix))
            return "dit" if is_stepped else component
    raise CheckpointError(
        f"tensor {name} belongs to no part of a Qwen2.5-Omni",
        tensor=name,
        hint="weights and config.json belong to different models, or the checkpoint is of a newer kind",
    )


def _block_of(name: str, component: str) -> str:
    if component not in _LAYERED:
        return component
    layer = _LAYER.match(name.removeprefix(_PREFIXES[component]))
    return f"{component}.{layer[1]}" if layer else f"{component}.rest"


def _device_bytes(tensor: StoredTensor, width_bytes: int) -> int:
    n_bytes = math.prod(tensor.shape) * width_bytes if tensor.dtype in _FLOATS else tensor.n_bytes
    return -(-n_bytes // BLOCK_ALIGNMENT_BYTES) * BLOCK_ALIGNMENT_BYTES


def _in_order(blocks: Mapping[str, int]) -> Iterable[BlockSize]:
    """Layers by number, then the rest."""

    def position(name: str) -> float:
        number = name.rpartition(".")[2]
        return int(number) if number.isdigit() else math.inf

    return (BlockSize(name, blocks[name]) for name in sorted(blocks, key=position))


def _require_complete(sizes: Mapping[str, Mapping[str, int]]) -> None:
    for component, blocks in sizes.items():
        if not blocks:
            raise CheckpointError(
                f"the checkpoint has no {component}: no tensor begins with {_PREFIXES[component]}",
                hint="download it again, or check its index",
            )


def _decoder_shape(config: Mapping[str, Any], path: str, layers: int) -> DecoderShape:
    hidden, heads = _number(config, f"{path}.hidden_size"), _number(config, f"{path}.num_attention_heads")
    return DecoderShape(
        layers=layers,
        hidden=hidden,
        intermediate=_number(config, f"{path}.intermediate_size"),
        heads=heads,
        kv_heads=_number(config, f"{path}.num_key_value_heads"),
        head_dim=_number(config, f"{path}.head_dim", hidden // heads),
        input_size=_number(config, f"{path}.embedding_size", hidden),
        vocab=_number(config, f"{path}.vocab_size"),
    )


def _vision_shape(config: Mapping[str, Any]) -> VisionShape:
    path = "thinker_config.vision_config"
    hidden, patch = _number(config, f"{path}.hidden_size"), _number(config, f"{path}.patch_size")
    return VisionShape(
        hidden=hidden,
        intermediate=_number(config, f"{path}.intermediate_size"),
        head_dim=hidden // _number(config, f"{path}.num_heads"),
        patch_elements=3 * _number(config, f"{path}.temporal_patch_size", 2) * patch**2,
    )


def _audio_shape(config: Mapping[str, Any]) -> AudioShape:
    path = "thinker_config.audio_config"
    return AudioShape(
        hidden=_number(config, f"{path}.d_model"),
        ffn=_number(config, f"{path}.encoder_ffn_dim"),
        mel_bins=_number(config, f"{path}.num_mel_bins"),
        window_frames=2 * _number(config, f"{path}.n_window"),
    )


def _sound_shape(config: Mapping[str, Any]) -> SoundShape:
    """The published config spells the DiT's sizes `dim` and `depth` and leaves its block structure to the reference's
    defaults; the modelling library writes `hidden_size` and `num_hidden_layers`."""
    path = "token2wav_config.dit_config"
    hidden = _number(config, f"{path}.hidden_size", _number(config, f"{path}.dim", 1024))
    dit, vocoder = (config.get("token2wav_config", {}).get(f"{part}_config", {}) for part in ("dit", "bigvgan"))
    return SoundShape(
        hidden=hidden,
        ff=hidden * _number(config, f"{path}.ff_mult", 2),
        layers=_number(config, f"{path}.num_hidden_layers", _number(config, f"{path}.depth", 22)),
        heads=_number(config, f"{path}.num_attention_heads", _number(config, f"{path}.heads", 16)),
        block_frames=_number(config, f"{path}.block_size", 24),
        back_layers=len(dit.get("look_backward_layers", (0, 20))),
        ahead_layers=len(dit.get("look_ahead_layers", (10,))),
        repeats=_number(config, f"{path}.repeats", 2),
        speaker_elements_per_frame=_speaker_elements(dit),
        vocoder_elements_per_frame=max(channels * positions for channels, positions in _vocoder_layers(vocoder)),
        vocoder_flops_per_frame=_vocoder_flops(vocoder),
    )


def _speaker_elements(dit: Mapping[str, Any]) -> int:
    """Of the speaker encoder (ECAPA-TDNN) where it pools over time, per mel frame: the mel as it came, turned and
    padded, all layers' results but the last, and of the last layer's width its result, the spread mean and deviation,
    weights and products (9.1 in all, as traced)."""
    *earlier, last = dit.get("enc_channels", (256, 256, 256, 256, 768))
    return 3 * int(dit.get("mel_dim", 80)) + sum(earlier) + 91 * int(last) // 10


def _vocoder_layers(vocoder: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Channels and positions per mel frame of each layer: each halves the channels and adds positions."""
    channels, positions = vocoder.get("upsample_initial_channel", 1536), 1
    for rate in vocoder.get("upsample_rates", (5, 3, 2, 2, 2, 2)):
        channels, positions = channels // 2, positions * rate
        yield channels, positions


def _vocoder_flops(vocoder: Mapping[str, Any]) -> int:
    """Of the residual blocks, nearly all there is: for each kernel and dilation two convolutions of all channels."""
    kernels = vocoder.get("resblock_kernel_sizes", (3, 7, 11))
    dilations = vocoder.get("resblock_dilation_sizes", ((1, 3, 5),) * 3)
    taps = sum(kernel * 2 * len(some) for kernel, some in zip(kernels, dilations, strict=False))
    return sum(2 * taps * channels**2 * positions for channels, positions in _vocoder_layers(vocoder))


def _number(config: Mapping[str, Any], path: str, default: int | None = None) -> int:
    """A positive whole number of the config, by dotted path; null counts as absent."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"config.json gives {value!r} for {path}, which must be a positive whole number",
            path="config.json",
            hint="the checkpoint is incomplete or not a Qwen2.5-Omni",
        )
    return value
