"""Encoders: chunks of any size give the same features, and what had no room is tried again in smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_turn import MEDIA, MESSAGES, SAMPLING, SPEECH, STAGES, answer, plan_of, run
from torch import Tensor, nn
from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as configs
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as reference

from lowvram import attention, encoders
from lowvram.encoders import AudioTower, VisionTower, encode_visuals
from lowvram.flow import VisualInput
from lowvram.model import Vision
from lowvram.offload.budget import Budget
from lowvram.recall import Reading
from lowvram.room import Control
from lowvram.runtime import OmniRuntime
from lowvram.turn import Request, Turn


@pytest.fixture
def eyes() -> reference.Qwen2_5OmniVisionEncoder:
    """A small tower of the library's, of which every second layer attends to whole frames."""
    torch.manual_seed(0)
    config = configs.Qwen2_5OmniVisionEncoderConfig(
        depth=4, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=24, fullatt_block_indexes=[1, 3]
    )
    config._attn_implementation = attention.NAME
    attention.register()
    return reference.Qwen2_5OmniVisionEncoder(config).double().eval()


def tower_of(eyes: reference.Qwen2_5OmniVisionEncoder) -> VisionTower:
    config = eyes.config
    vision = Vision(
        rotary=eyes.rotary_pos_emb,
        merge_size=config.spatial_merge_size,
        window_size=config.window_size,
        patch_size=config.patch_size,
        full_attention_layers=frozenset(config.fullatt_block_indexes),
        dtype=torch.float64,
    )
    rest = nn.ModuleDict({"patch_embed": eyes.patch_embed, "merger": eyes.merger})
    return VisionTower(vision, [nullcontext(layer) for layer in eyes.blocks], nullcontext(rest))


def pixels_of(grid: tuple[int, int, int]) -> list[Tensor]:
    """Random temporal patches, one after another."""
    times, height, width = grid
    return list(torch.randn(times, height * width, 1176, dtype=torch.float64))


def features(tower: VisionTower, grid: tuple[int, int, int], pixels: Sequence[Tensor], chunk_patches: int) -> Tensor:
    rows = torch.arange(grid[0] * grid[1] * grid[2] // 4)
    embeds = torch.full((len(rows), 24), torch.nan, dtype=torch.float64)
    visual = VisualInput(grid, rows, lambda: iter(pixels))
    steps = encode_visuals([visual], tower, embeds, chunk_patches=lambda: chunk_patches, device=torch.device("cpu"))
    assert sum(steps) == len(rows)
    return embeds


@pytest.mark.parametrize("grid", [(1, 20, 28), (3, 6, 10)], ids=["a picture", "a video"])
@pytest.mark.parametrize("chunk_patches", [1, 30, 64, 100, 130, 560, 4096])
def test_seeing_in_chunks_of_any_size_is_the_librarys_tower(
    eyes: reference.Qwen2_5OmniVisionEncoder, grid: tuple[int, int, int], chunk_patches: int
):
    """Smaller than a window, which has 64 patches or what is left at an edge; several windows; or all there is."""
    pixels = pixels_of(grid)
    with torch.inference_mode():
        eyes.config._attn_implementation = "sdpa"
        seen = eyes(torch.cat(pixels), torch.tensor([grid])).pooler_output
        eyes.config._attn_implementation = attention.NAME
    assert torch.allclose(features(tower_of(eyes), grid, pixels, chunk_patches), seen, rtol=0, atol=1e-12)


def test_no_more_of_a_picture_than_a_chunk_is_computed_at_once(eyes: reference.Qwen2_5OmniVisionEncoder):
    sizes: list[int] = []
    for layer in eyes.blocks:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    grid = (1, 20, 28)
    features(tower_of(eyes), grid, pixels_of(grid), 100)
    assert max(sizes) <= 100


def test_a_picture_whose_slice_found_no_room_begins_anew_in_smaller_ones(eyes: reference.Qwen2_5OmniVisionEncoder):
    grid, chunks, sizes = (1, 20, 28), [100, 30], []
    pixels = pixels_of(grid)

    def run_out(_: nn.Module, inputs: tuple[Tensor]) -> None:
        sizes.append(len(inputs[0]))
        if len(sizes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except torch.OutOfMemoryError:
            chunks.pop(0)
            return step()

    seen = features(tower_of(eyes), grid, pixels, 4096)
    eyes.blocks[1].mlp.register_forward_pre_hook(run_out)
    embeds = torch.full_like(seen, torch.nan)
    visual = VisualInput(grid, torch.arange(len(seen)), lambda: iter(pixels))
    tower = replace(tower_of(eyes), attempt=attempt)
    list(encode_visuals([visual], tower, embeds, chunk_patches=lambda: chunks[0], device=torch.device("cpu")))
    assert torch.allclose(embeds, seen, rtol=0, atol=1e-12)
    assert sizes == [100] * 3 + [30] * 18 + [20]


def several_frames(patches: Tensor, grid: tuple[int, int, int], *_: object) -> bool:
    return grid[0] > 1


def several_windows(mel: Tensor, tower: AudioTower, *_: object) -> bool:
    return mel.shape[1] > tower.hearing.window_frames


@pytest.mark.parametrize(
    ("name", "is_too_much"), [("_see", several_frames), ("_hear", several_windows)], ids=["video", "sound"]
)
def test_a_chunk_for_which_there_is_no_room_is_cut_smaller(
    omni: OmniRuntime, name: str, is_too_much: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
):
    least = plan_of([STAGES], vision_chunk_patches=1, audio_chunk_windows=1)
    encode, refused = getattr(encoders, name), list[bool]()
    whole, samples = answer(run(omni, plan_of([STAGES])))

    def in_little_room(*inputs: Any) -> Tensor:
        refused.append(is_too_much(*inputs))
        if refused[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        features: Tensor = encode(*inputs)
        return features

    monkeypatch.setattr(encoders, name, in_little_room)
    with omni.preprocessor.open(MESSAGES, MEDIA) as prompt:
        voice = omni._voices["Chelsie"]
        request = Request(Reading(prompt.inputs), plan_of([STAGES]), lambda *_: least, SAMPLING, SPEECH, voice)
        cut, cut_samples = answer(Turn(omni._machine, request, Control(Budget()), started_s=0.0).run())
    assert any(refused) and not refused[-1]
    assert (cut.text_ids, cut.codec_ids) == (whole.text_ids, whole.codec_ids)
    assert np.array_equal(cut_samples, samples)
