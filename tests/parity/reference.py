"""The oracle: transformers' own Qwen2.5-Omni, loaded in float32 with a checkpoint's (dequantized) weights.

It answers with `generate`, from the same model inputs as ours. Two of the library's stumbles (transformers 5.20
to 5.23) are walked around: it hands pixel values on to a talker that refuses them, so they are addressed to the thinker
alone; and it drops a mask of ones, without which the talker forgets its positions and the codec's pad and start rows,
so the mask is put back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniForConditionalGeneration

from lowvram.flow import AudioInput, ModelInputs, VisualInput
from lowvram.quant.packing import unpack_awq
from lowvram.runtime import OmniRuntime


@dataclass(frozen=True)
class Pair:
    """Ours and the reference, from one checkpoint, in float32 on the CPU."""

    omni: OmniRuntime
    reference: Qwen2_5OmniForConditionalGeneration


@dataclass(frozen=True)
class Answer:
    """What the reference said: text ids without the prompt, codec ids without the end."""

    text_ids: list[int]
    codec_ids: list[int]


def load_reference(folder: Path) -> Qwen2_5OmniForConditionalGeneration:
    """The checkpoint in `folder` as the library's own model, float32 on the CPU, every weight in place."""
    published = json.loads((folder / "config.json").read_text())
    group_size = (published.pop("quantization_config", None) or {}).get("group_size", 0)
    model = Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig.from_dict(published)).eval()
    state = _state(folder, group_size)
    if hasattr(model.thinker.model, "language_model"):
        state = ((_renamed(name), tensor) for name, tensor in state)
    model.load_state_dict(dict(state), strict=True)
    model.speaker_map = torch.load(folder / "spk_dict.pt", weights_only=True)
    return model


def _state(folder: Path, group_size: int) -> Iterator[tuple[str, Tensor]]:
    stored: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    for name, tensor in stored.items():
        leaf = name.rpartition(".")[2]
        if leaf == "qweight":
            base = name.removesuffix("qweight")
            words = (tensor, stored[f"{base}qzeros"], stored[f"{base}scales"])
            yield f"{base}weight", unpack_awq(*words, group_size, torch.float32)
        elif leaf not in ("qzeros", "scales", "inv_freq"):
            yield name, tensor.float()


def _renamed(published: str) -> str:
    """Published names to the module tree that transformers has since 5.21; before, the two were one."""
    for tower in ("visual", "audio_tower"):
        published = published.replace(f"thinker.{tower}.", f"thinker.model.{tower}.")
    for part in ("layers.", "embed_tokens.", "norm."):
        published = published.replace(f"thinker.model.{part}", f"thinker.model.language_model.{part}")
    return published


def answer(
    model: Qwen2_5OmniForConditionalGeneration,
    inputs: ModelInputs,
    *,
    voice: str,
    stop_ids: Iterable[int],
    max_tokens: int,
    max_codes: int,
) -> Answer:
    """The reference's greedy answer to a prompt."""
    codes: list[int] = []
    hooks = (
        model.token2wav.register_forward_pre_hook(lambda _module, args: codes.extend(args[0][0].tolist())),
        model.talker.register_forward_pre_hook(_with_mask, with_kwargs=True),
    )
    thinking = {
        **_model_kwargs(model, inputs),
        "thinker_max_new_tokens": max_tokens,
        "thinker_do_sample": False,
        "thinker_eos_token_id": sorted(stop_ids),
    }
    talking = {
        "speaker": voice,
        "talker_max_new_tokens": max_codes,
        "talker_do_sample": False,
        "talker_eos_token_id": [model.talker.codec_pad_token, model.talker.codec_eos_token],
        "token2wav_num_steps": 2,
    }
    try:
        ids, _ = model.generate(**thinking, **talking)
    except ValueError as error:
        # An answer that ends with its first token breaks the reference; what it would say is known all the same.
        assert "expected a non-empty list of Tensors" in str(error)
        ids = model.generate(**thinking, generation_mode="text")
    finally:
        for hook in hooks:
            hook.remove()
    return Answer(ids[0, len(inputs.input_ids) :].tolist(), codes)


def _with_mask(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The talker's arguments with the mask of ones that `generate` was given and dropped."""
    newest = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
    length = kwargs["past_key_values"].get_seq_length() + newest.shape[1]
    return args, kwargs | {"attention_mask": torch.ones(1, length, dtype=torch.long)}


def _model_kwargs(model: Qwen2_5OmniForConditionalGeneration, inputs: ModelInputs) -> dict[str, object]:
    ids = inputs.input_ids[None]
    kwargs: dict[str, object] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if inputs.audios:
        kwargs["input_features"], kwargs["feature_attention_mask"] = _padded(inputs.audios)
    config = model.config.thinker_config
    is_image = [int(inputs.input_ids[visual.rows[0]]) == config.image_token_id for visual in inputs.visuals]
    images = [v for v, image in zip(inputs.visuals, is_image, strict=True) if image]
    videos = [v for v, image in zip(inputs.visuals, is_image, strict=True) if not image]
    if images:
        kwargs |= {"thinker_pixel_values": _patches(images), "image_grid_thw": _grids(images)}
    if videos:
        kwargs |= {"thinker_pixel_values_videos": _patches(videos), "video_grid_thw": _grids(videos)}
        kwargs["video_second_per_grid"] = torch.ones(len(videos))
        kwargs["use_audio_in_video"] = _video_has_sound(inputs, config)
    return kwargs


def _video_has_sound(inputs: ModelInputs, config: object) -> bool:
    """Whether any vision begins with an audio: how a video with its own sound is laid out."""
    ids = inputs.input_ids
    starts = (ids[:-1] == config.vision_start_token_id) & (ids[1:] == config.audio_start_token_id)
    return bool(starts.any())


def _padded(audios: Iterable[AudioInput]) -> tuple[Tensor, Tensor]:
    mels = [audio.mel for audio in audios]
    longest = max(mel.shape[1] for mel in mels)
    features = torch.stack([torch.nn.functional.pad(mel, (0, longest - mel.shape[1])) for mel in mels])
    mask = torch.stack([(torch.arange(longest) < mel.shape[1]).long() for mel in mels])
    return features, mask


def _patches(visuals: Iterable[VisualInput]) -> Tensor:
    return torch.cat([patch for visual in visuals for patch in visual.patches()])


def _grids(visuals: Iterable[VisualInput]) -> Tensor:
    return torch.tensor([visual.grid for visual in visuals])
