"""A checkpoint as the parts that stages work with. The only room that knows the modelling library's tree.

The library's modules are built as skeletons without memory, packed linears are fitted where the checkpoint stores
them, and every weight is handed out in blocks. Nothing of the library is subclassed or changed: its layers, norms and
rotary tables are used as they are, its loops are not.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniTalkerModel,
    Qwen2_5OmniThinkerTextModel,
    Qwen2_5OmniToken2WavBigVGANModel,
    Qwen2_5OmniToken2WavDiTModel,
    Qwen2_5OmniVisionEncoder,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from . import attention
from .checkpoint import Checkpoint, TensorReader, find_tensor
from .device import float32_by_default
from .errors import CheckpointError
from .kv_cache import Int8KVCache, KVCache
from .offload.transfer import TORCH_DTYPE, Transfer
from .options import KVPrecision
from .quant.fitting import Fitter
from .quant.matmul import Backend
from .quant.scheme import read_scheme
from .weights import HostRows, WeightBlock

EMBED_TOKENS = "thinker.model.embed_tokens.weight"
LM_HEAD = "thinker.lm_head.weight"
CODEC_EMBED = "talker.model.embed_tokens.weight"
NEVER_READ = ("thinker.audio_tower.audio_bos_eos_token.weight", EMBED_TOKENS, CODEC_EMBED)
"""Published tensors outside all blocks: one the reference never uses either, and the tables that stay in files."""

DIT_PREFIX = "token2wav.code2wav_dit_model."

Paths = tuple[str, ...]
"""Beginnings of parameters' names."""

STEPPING_LAYER: Paths = ("attn.", "ff.")
STEPPING_REST: Paths = ("text_embed.", "input_embed.proj.", "proj_out.")
"""The DiT's parameters that every evaluation computes with, of a decoder layer and around them."""

CONDITIONING: Paths = ("time_embed.", "input_embed.spk_encoder.", "norm_out.")
"""With each layer's `attn_norm`, those that see nothing but the voice and the times of the evaluations."""


@dataclass(frozen=True)
class Decoder:
    """What a decoder stack (thinker or talker) is apart from its weights."""

    rotary: nn.Module
    n_layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def new_cache(self, max_tokens: int, device: torch.device, kv: KVPrecision = "16bit") -> KVCache:
        """An empty cache for a turn of at most `max_tokens` positions: in the compute dtype, or in 8 bits."""
        make = Int8KVCache if kv == "int8" else KVCache
        return make(self.n_layers, self.kv_heads, self.head_dim, max_tokens, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class VisionLayout:
    """How one run of temporal patches of a common height and width is laid out for the vision tower.

    `window_index` [n] orders merged patches by window, `position_ids` [4n, 2] are (row, column); the boundaries say
    where attention stops: `frame_bounds` in full-attention layers, `window_bounds` in the others. All on the host.
    """

    window_index: Tensor
    position_ids: Tensor
    frame_bounds: Tensor
    window_bounds: Tensor


@dataclass(frozen=True)
class Vision:
    """What the vision tower is apart from its weights."""

    rotary: nn.Module
    merge_size: int
    window_size: int
    patch_size: int
    full_attention_layers: frozenset[int]
    dtype: torch.dtype

    def rotate(self, queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [n, heads, d], turned by where they are: cosines and sines [n, d]."""
        turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb_vision(queries, keys, cosines, sines)
        return turned

    def layout(self, grid: tuple[int, int, int]) -> VisionLayout:
        """The layout for `grid` (temporal, height, width) patches."""
        with torch.device("cpu"):  # an application may have set another default
            grid_thw = torch.tensor([grid])
            window_index, window_bounds = get_vision_window_index(
                grid_thw, self.merge_size, self.window_size, self.patch_size
            )
            return VisionLayout(
                window_index=window_index,
                position_ids=get_vision_position_ids(grid_thw, self.merge_size),
                frame_bounds=get_vision_cu_seqlens(grid_thw),
                window_bounds=window_bounds,
            )


@dataclass(frozen=True)
class Hearing:
    """What the audio tower is apart from its weights: `positions` [max, D] is its sinusoidal table, and one window is
    `window_frames` mel frames."""

    positions: Tensor
    window_frames: int
    dtype: torch.dtype


@dataclass(frozen=True)
class CodecIds:
    """The codec ids that are not sound: `pad` and `end` stop the speech, `start` is never drawn, `mask` stands for
    the prompt in the repetition penalty's eyes."""

    mask: int
    pad: int
    start: int
    end: int


@dataclass(frozen=True)
class Speech:
    """What a checkpoint that speaks has besides its decoder: the codec's embedding table and ids, and the text ids
    whose rows end a reply and pad it out."""

    decoder: Decoder
    codec_embed: HostRows
    codec_ids: CodecIds
    text_end: int
    text_pad: int


@dataclass(frozen=True)
class OmniModel:
    """A checkpoint's skeletons, block by block, with the tables that stay on the host.

    `components` maps dit_conditioning, audio_tower, visual, thinker, lm_head, talker, dit and bigvgan to their blocks:
    one per layer and, last, one with the rest of the component. Those of speech are absent when the checkpoint does not
    speak. The DiT's two components share its modules: what conditions it, and what each evaluation computes with.
    """

    components: Mapping[str, tuple[WeightBlock, ...]]
    embed_tokens: HostRows
    thinker: Decoder
    vision: Vision
    hearing: Hearing
    speech: Speech | None
    dtype: torch.dtype
    kernel: str
    transfer: Transfer

    @property
    def dit_layers(self) -> tuple[WeightBlock, ...]:
        """The DiT's decoder layers, the only weights whose precision a turn chooses."""
        return self.components["dit"][:-1] if self.speech else ()

    def speak_in(self, dtype: torch.dtype) -> None:
        """Lay the DiT's layers out in another dtype. None of them is on the device, nor copied on the host."""
        for layer in self.dit_layers:
            layer.store_as(dtype)

    def close(self) -> None:
        """Let go of the tables' files and of the staging buffer; blocks are the residency's to release."""
        self.embed_tokens.close()
        if self.speech:
            self.speech.codec_embed.close()
        self.transfer.release()


def build_model(
    checkpoint: Checkpoint, reader: TensorReader, *, device: torch.device, dtype: torch.dtype, backend: Backend
) -> OmniModel:
    """Build the skeletons of `checkpoint` and account for every stored tensor; no weight is read.

    Thinker, talker and encoders compute in `dtype`; token2wav in float32, as the reference does, unless the DiT's
    layers are told otherwise (`OmniModel.speak_in`). Raises CheckpointError for missing, surplus, misshapen or mistyped
    tensors, UnsupportedQuantError for a quantization that `read_scheme` does not know.
    """
    attention.register()
    builder = _Builder(checkpoint, Transfer(reader, device), device, dtype, backend)
    with torch.device("meta"):  # holds for this thread only: whatever the host application builds meanwhile is real
        model = builder.build(reader)
    _refuse_surplus(checkpoint, model)
    return model


class _Builder:
    """Builds one component after another; lives only inside `build_model`."""

    def __init__(
        self, checkpoint: Checkpoint, transfer: Transfer, device: torch.device, dtype: torch.dtype, backend: Backend
    ) -> None:
        self.config = _read_config(checkpoint)
        self.tensors = checkpoint.tensors
        self.transfer = transfer
        self.device = device
        self.dtype = dtype
        self.fitter = Fitter(checkpoint.tensors, read_scheme(checkpoint.quantization), backend, device, dtype)

    def build(self, reader: TensorReader) -> OmniModel:
        thinker_config, talker_config = self.config.thinker_config, self.config.talker_config
        audio, hearing = self._audio_tower(thinker_config.audio_config)
        visual, vision = self._visual(thinker_config.vision_config)
        thinker, thinking = self._thinker(thinker_config.text_config)
        components = {"audio_tower": audio, "visual": visual, "thinker": thinker, "lm_head": self._lm_head()}
        speech = None
        if self.config.enable_audio_output and CODEC_EMBED in self.tensors:
            components["talker"], talking = self._talker(talker_config)
            components |= self._token2wav(self.config.token2wav_config)
            speech = _speech(talker_config, talking, self._host_rows(reader, CODEC_EMBED))
        return OmniModel(
            components=components,
            embed_tokens=self._host_rows(reader, EMBED_TOKENS),
            thinker=thinking,
            vision=vision,
            hearing=hearing,
            speech=speech,
            dtype=self.dtype,
            kernel=self.fitter.kernel,
            transfer=self.transfer,
        )

    def _audio_tower(self, config: Any) -> tuple[tuple[WeightBlock, ...], Hearing]:
        tower = Qwen2_5OmniAudioEncoder(config)
        rest = nn.ModuleDict({name: getattr(tower, name) for name in ("conv1", "conv2", "ln_post", "proj")})
        blocks = self._blocks("audio_tower", tower.layers, "thinker.audio_tower.layers", rest, "thinker.audio_tower.")
        tables = _computed_tables(tower.positional_embedding, self.device)
        return blocks, Hearing(tables.positional_embedding, 2 * config.n_window, self.dtype)

    def _visual(self, config: Any) -> tuple[tuple[WeightBlock, ...], Vision]:
        tower = Qwen2_5OmniVisionEncoder(config)
        rest = nn.ModuleDict({"patch_embed": tower.patch_embed, "merger": tower.merger})
        blocks = self._blocks("visual", tower.blocks, "thinker.visual.blocks", rest, "thinker.visual.")
        return blocks, Vision(
            rotary=_computed_tables(tower.rotary_pos_emb, self.device),
            merge_size=config.spatial_merge_size,
            window_size=config.window_size,
            patch_size=config.patch_size,
            full_attention_layers=frozenset(config.fullatt_block_indexes),
            dtype=self.dtype,
        )

    def _thinker(self, config: Any) -> tuple[tuple[WeightBlock, ...], Decoder]:
        model = Qwen2_5OmniThinkerTextModel(config)
        rest = nn.ModuleDict({"norm": model.norm})
        blocks = self._blocks("thinker", model.layers, "thinker.model.layers", rest, "thinker.model.")
        return blocks, self._decoder(model.rotary_emb, config)

    def _lm_head(self) -> tuple[WeightBlock, ...]:
        config = self.config.thinker_config.text_config
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        own, shared = LM_HEAD.removesuffix("weight"), EMBED_TOKENS.removesuffix("weight")
        if self.fitter.stores(own):
            return (self._block("lm_head", self.fitter.fitted(head, own), own),)
        tied = LM_HEAD not in self.tensors and config.tie_word_embeddings
        return (self._block("lm_head", head, shared if tied else own),)

    def _talker(self, config: Any) -> tuple[tuple[WeightBlock, ...], Decoder]:
        model = Qwen2_5OmniTalkerModel(config)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        projection = nn.Linear(config.embedding_size, config.hidden_size)
        layers = self._layer_blocks("talker", model.layers, "talker.model.layers")
        # Their published names share only the prefix "talker.", so the norm's path spells out the rest.
        rest = nn.ModuleDict(
            {
                "model": nn.ModuleDict({"norm": model.norm}),
                "thinker_to_talker_proj": projection,
                "codec_head": head,
            }
        )
        return (*layers, self._block("talker.rest", rest, "talker.")), self._decoder(model.rotary_emb, config)

    def _token2wav(self, config: Any) -> dict[str, tuple[WeightBlock, ...]]:
        dit = _computed_tables(Qwen2_5OmniToken2WavDiTModel(config.dit_config), self.device)
        bigvgan = _computed_tables(Qwen2_5OmniToken2WavBigVGANModel(config.bigvgan_config), self.device)
        modulating = tuple(f"transformer_blocks.{i}.attn_norm." for i in range(len(dit.transformer_blocks)))
        return {
            "dit_conditioning": (self._dit_block("dit_conditioning", dit, (*CONDITIONING, *modulating)),),
            "dit": (*self._dit_layers(dit), self._dit_block("dit.rest", dit, STEPPING_REST)),
            "bigvgan": (self._block("bigvgan", bigvgan, "token2wav.code2wav_bigvgan_model.", torch.float32),),
        }

    def _dit_layers(self, dit: Any) -> Iterator[WeightBlock]:
        for i, layer in enumerate(dit.transformer_blocks):
            prefix = f"{DIT_PREFIX}transformer_blocks.{i}."
            yield self._block(f"dit.{i}", layer, prefix, torch.float32, STEPPING_LAYER)

    def _dit_block(self, name: str, dit: nn.Module, paths: Paths) -> WeightBlock:
        return self._block(name, dit, DIT_PREFIX, torch.float32, paths)

    def _blocks(
        self, component: str, layers: nn.ModuleList, layers_prefix: str, rest: nn.Module, rest_prefix: str
    ) -> tuple[WeightBlock, ...]:
        return (
            *self._layer_blocks(component, layers, layers_prefix),
            self._block(f"{component}.rest", rest, rest_prefix),
        )

    def _layer_blocks(self, component: str, layers: nn.ModuleList, prefix: str) -> list[WeightBlock]:
        self.fitter.fit(layers, f"{prefix}.")
        return [self._block(f"{component}.{i}", layer, f"{prefix}.{i}.") for i, layer in enumerate(layers)]

    def _block(
        self, name: str, module: nn.Module, prefix: str, dtype: torch.dtype | None = None, paths: Paths = ("",)
    ) -> WeightBlock:
        return WeightBlock(name, module.eval(), prefix, self.tensors, self.transfer, dtype or self.dtype, paths=paths)

    def _decoder(self, rotary: nn.Module, config: Any) -> Decoder:
        return Decoder(
            rotary=_computed_tables(rotary, self.device),
            n_layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=self.dtype,
        )

    def _host_rows(self, reader: TensorReader, name: str) -> HostRows:
        entry = find_tensor(self.tensors, name)
        # A copy-on-write view of the file: torch wants writable memory, and only rows that are read are loaded.
        rows = torch.from_numpy(reader.rows(entry)).view(TORCH_DTYPE[entry.dtype])
        return HostRows(rows, self.dtype)


def _speech(config: Any, decoder: Decoder, codec_embed: HostRows) -> Speech:
    return Speech(
        decoder,
        codec_embed,
        CodecIds(
            mask=config.tts_codec_mask_token_id,
            pad=config.tts_codec_pad_token_id,
            start=config.tts_codec_start_token_id,
            end=config.tts_codec_end_token_id,
        ),
        text_end=config.tts_text_end_token_id,
        text_pad=config.tts_text_pad_token_id,
    )


def _read_config(checkpoint: Checkpoint) -> Any:
    """The library's config of a published one, old key spellings included, with our attention chosen."""
    published = copy.deepcopy(dict(checkpoint.config))  # the library writes into what it is given
    try:
        with without_vocabulary_warnings():
            config: Any = Qwen2_5OmniConfig.from_dict(published)
    except (StrictDataclassError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json of {checkpoint.name} makes no sense: {' '.join(str(error).split())}",
            path=str(checkpoint.folder / "config.json"),
            hint="download it again",
        ) from error
    thinker = config.thinker_config
    for part in (thinker.text_config, thinker.vision_config, thinker.audio_config, config.talker_config):
        part._attn_implementation = attention.NAME
    return config


@contextmanager
def without_vocabulary_warnings() -> Iterator[None]:
    """The library warns, 7 times a checkpoint, that the talker's text ids lie outside its codec vocabulary. They do."""
    log = logging.getLogger("transformers.configuration_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "within the vocabulary" not in record.getMessage()

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


def _computed_tables(module: Any, device: torch.device) -> Any:
    """`module` with the tables that constructors compute (rotary, sinusoids, filters; no weights) on `device`.

    A skeleton has them on `meta`, so the small modules that own one are made again, for real, and lend theirs.
    """
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None:
                with torch.device("cpu"), float32_by_default():
                    child._buffers[name] = _again(child).get_buffer(name).to(device)
    return module


def _again(owner: Any) -> nn.Module:
    """A second module like `owner`, whose only contents are computed tables."""
    if hasattr(owner, "config"):
        return type(owner)(config=owner.config)
    if hasattr(owner, "max_timescale"):
        return type(owner)(owner.length, owner.channels, owner.max_timescale)
    return type(owner)(owner.stride, owner.kernel_size)


def _refuse_surplus(checkpoint: Checkpoint, model: OmniModel) -> None:
    """Raise for stored tensors that nothing reads, apart from those that a constructor computes anyway."""
    read = {name for blocks in model.components.values() for block in blocks for name in block.stored_names}
    silent = () if model.speech else ("talker.", "token2wav.")
    computed = _computed_leaves(model.components.values())
    for name, entry in checkpoint.tensors.items():
        leaf = name.rsplit(".", 1)[-1]
        if name not in read and name not in NEVER_READ and leaf not in computed and not name.startswith(silent or "\0"):
            raise CheckpointError(
                f"tensor {name} in {entry.path.name} belongs to no part of this model",
                path=str(entry.path),
                tensor=name,
                hint="weights and config.json belong to different models, or the checkpoint is of a newer kind",
            )


def _computed_leaves(components: Iterable[Iterable[WeightBlock]]) -> set[str]:
    """Names of buffers (rotary tables, resampling filters) that older checkpoints also store."""
    buffers = {
        name.rsplit(".", 1)[-1] for blocks in components for block in blocks for name, _ in block.module.named_buffers()
    }
    return buffers | {"inv_freq"}
