"""What a checkpoint will occupy, from its headers and its config alone: weights by block, KV bytes, activations.

Weights are exact: they are what the headers say, laid out as blocks are. What stages compute with beside them is worked
out by `activations` from shapes that are read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Set, Sized
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..errors import CheckpointError
from ..options import SpeechDtype
from .activations import (
    DIT_LAYER_WIDTH_BYTES,
    TOKEN2WAV_WIDTH_BYTES,
    UNPACKED_WEIGHTS,
    AudioShape,
    DecoderShape,
    SoundShape,
    VisionShape,
)
from .allocator import held_bytes

BLOCK_ALIGNMENT_BYTES = 256
"""Each tensor of a block starts on a multiple of this: what CUDA's own allocator aligns to."""

ON_HOST = (
    "thinker.model.embed_tokens.weight",
    "talker.model.embed_tokens.weight",
    "thinker.audio_tower.audio_bos_eos_token.weight",  # stored, but not even the reference reads it
)
"""Tables that never travel to the device; only their rows do."""

LM_HEAD = "thinker.lm_head.weight"

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
    """Weights that move as one, and their bytes."""

    name: str
    n_bytes: int

    @property
    def device_bytes(self) -> int:
        """What they take of a card."""
        return held_bytes(self.n_bytes)


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
        """All of a component, as it crosses the bus."""
        return sum(block.n_bytes for block in self.components[name])

    def device_bytes(self, name: str) -> int:
        """All of a component on the device."""
        return sum(block.device_bytes for block in self.components[name])


def read_footprint(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], *, width_bytes: int) -> Footprint:
    """The footprint of a checkpoint whose headers are `tensors` and whose config.json is `config`, as published.

    Float tensors count at `width_bytes` (2 or 4), those of token2wav at 4, packed integers as stored. Raises
    CheckpointError for a tensor of no known component and for sizes that the config does not give.
    """
    speaks = bool(config.get("enable_audio_output", True)) and ON_HOST[1] in tensors
    wanted = {name: tensor for name, tensor in tensors.items() if speaks or _component_of(name) not in _SPEECH}
    sizes: dict[str, dict[str, int]] = {name: {} for name in _PREFIXES if speaks or name not in _SPEECH}
    sizes |= _sizes(wanted, width_bytes, implied_zero_points=_implies_zero_points(config))
    if not sizes["lm_head"] and ON_HOST[0] in tensors:  # tied to the embedding, which itself stays on the host
        sizes["lm_head"]["lm_head"] = _device_bytes(tensors[ON_HOST[0]], width_bytes)
    _require_complete(sizes)
    dit = {name: tensor for name, tensor in wanted.items() if _component_of(name) == "dit"}
    packed = {_component_of(name) for name, tensor in wanted.items() if tensor.dtype not in _FLOATS}
    return Footprint(
        components={name: tuple(_in_order(blocks)) for name, blocks in sizes.items()},
        host_bytes=sum(tensors[name].n_bytes for name in ON_HOST if name in tensors),
        width_bytes=width_bytes,
        thinker=_decoder_shape(config, "thinker_config.text_config", sizes["thinker"], packed & {"thinker", "lm_head"}),
        visual=_vision_shape(config, is_packed="visual" in packed),
        audio=_audio_shape(config, is_packed="audio_tower" in packed),
        talker=_decoder_shape(config, "talker_config", sizes["talker"], packed & {"talker"}) if speaks else None,
        sound=_sound_shape(config) if speaks else None,
        half_dit=tuple(_in_order(_sizes(dit, width_bytes, DIT_LAYER_WIDTH_BYTES["float16"]).get("dit", {}))),
    )


def _sizes(
    tensors: Mapping[str, StoredTensor],
    width_bytes: int,
    dit_layer_bytes: int = TOKEN2WAV_WIDTH_BYTES,
    *,
    implied_zero_points: bool = False,
) -> dict[str, dict[str, int]]:
    """Bytes on the device by component and block; float tensors of the DiT's layers have a width of their own."""
    sizes: dict[str, dict[str, int]] = {}
    for name, tensor in tensors.items():
        if name in ON_HOST or name.endswith(".weight_shape"):  # which no kernel reads
            continue
        component = _component_of(name)
        block = _block_of(name, component)
        width = TOKEN2WAV_WIDTH_BYTES if component in _TOKEN2WAV else width_bytes
        if component == "dit" and not block.endswith(".rest"):
            width = dit_layer_bytes
        if implied_zero_points and name.endswith(".weight_scale"):
            width += 1  # half a byte of zero point, which the device has beside every scale of 4 bits
        blocks = sizes.setdefault(component, {})
        blocks[block] = blocks.get(block, 0) + _device_bytes(tensor, width)
    return sizes


def _implies_zero_points(config: Mapping[str, Any]) -> bool:
    """Whether a group of 4-bit linears is symmetric: compressed-tensors then stores no zero points."""
    thinker = config.get("thinker_config") or {}
    entry = config.get("quantization_config") or thinker.get("quantization_config") or {}
    groups = [group.get("weights") or {} for group in (entry.get("config_groups") or {}).values()]
    return any(weights.get("num_bits") == 4 and weights.get("symmetric", True) for weights in groups)


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


def _decoder_shape(config: Mapping[str, Any], path: str, blocks: Sized, packed: Set[str]) -> DecoderShape:
    """`blocks` are its layers and, last, the rest; `packed` the components of it that store packed linears."""
    hidden, heads = _number(config, f"{path}.hidden_size"), _number(config, f"{path}.num_attention_heads")
    intermediate, vocab = _number(config, f"{path}.intermediate_size"), _number(config, f"{path}.vocab_size")
    widest = max(intermediate, vocab) if "lm_head" in packed else intermediate
    return DecoderShape(
        layers=len(blocks) - 1,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=_number(config, f"{path}.num_key_value_heads"),
        head_dim=_number(config, f"{path}.head_dim", hidden // heads),
        input_size=_number(config, f"{path}.embedding_size", hidden),
        vocab=vocab,
        unpacked_weights=min(UNPACKED_WEIGHTS, hidden * widest) if packed else 0,
    )


def _vision_shape(config: Mapping[str, Any], *, is_packed: bool) -> VisionShape:
    path = "thinker_config.vision_config"
    hidden, patch = _number(config, f"{path}.hidden_size"), _number(config, f"{path}.patch_size")
    intermediate = _number(config, f"{path}.intermediate_size")
    return VisionShape(
        hidden=hidden,
        intermediate=intermediate,
        head_dim=hidden // _number(config, f"{path}.num_heads"),
        patch_elements=3 * _number(config, f"{path}.temporal_patch_size", 2) * patch**2,
        unpacked_weights=min(UNPACKED_WEIGHTS, hidden * intermediate) if is_packed else 0,
    )


def _audio_shape(config: Mapping[str, Any], *, is_packed: bool) -> AudioShape:
    path = "thinker_config.audio_config"
    hidden, ffn = _number(config, f"{path}.d_model"), _number(config, f"{path}.encoder_ffn_dim")
    return AudioShape(
        hidden=hidden,
        ffn=ffn,
        mel_bins=_number(config, f"{path}.num_mel_bins"),
        window_frames=2 * _number(config, f"{path}.n_window"),
        unpacked_weights=min(UNPACKED_WEIGHTS, hidden * ffn) if is_packed else 0,
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
