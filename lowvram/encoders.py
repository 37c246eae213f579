"""Prompt media to prompt rows: the vision and audio towers, a few windows at a time.

Exact, because attention never leaves a window: a temporal patch of a video (or an image) attends within itself, and
two seconds of sound within themselves. Of a picture that is more than is computed at once, a layer has all queries,
keys and values, and the rest slice by slice. What is decoded is encoded and forgotten; only the features stay, on the
host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend
from .flow import Attempt, AudioInput, ModelInputs, PromptEmbeds, VisualInput, Weights, at_once
from .model import Hearing, Vision
from .weights import HostRows

BlockContext = AbstractContextManager[nn.Module]
Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [rows, head dim], float32."""


@dataclass(frozen=True)
class VisionTower:
    """The vision tower: its layout rules, its layers, and the rest (patch embedding, merger)."""

    vision: Vision
    layers: Weights
    rest: BlockContext
    attempt: Attempt = at_once


@dataclass(frozen=True)
class AudioTower:
    """The audio tower: its tables, its layers, and the rest (convolutions, final norm, projection)."""

    hearing: Hearing
    layers: Weights
    rest: BlockContext
    attempt: Attempt = at_once


def embed_prompt(inputs: ModelInputs, embed_tokens: HostRows) -> PromptEmbeds:
    """The prompt's rows [T, H] on the host: text in place, media rows still to be filled by the encoders."""
    is_media = torch.zeros(len(inputs.input_ids), dtype=torch.bool, device="cpu")
    for rows in (*(visual.rows for visual in inputs.visuals), *(audio.rows for audio in inputs.audios)):
        is_media[rows] = True
    embeds = torch.zeros(len(inputs.input_ids), embed_tokens.width, dtype=embed_tokens.dtype, device="cpu")
    embeds[~is_media] = embed_tokens(inputs.input_ids[~is_media])
    return PromptEmbeds(embeds, is_media, inputs.position_ids, inputs.next_position)


@torch.inference_mode()
def encode_visuals(
    visuals: Sequence[VisualInput],
    tower: VisionTower,
    embeds: Tensor,
    *,
    chunk_patches: Callable[[], int],
    device: torch.device,
) -> Iterator[int]:
    """Fill the rows of images and videos in `embeds` [T, H], yielding how many rows each step filled.

    At most `chunk_patches` patches are computed at once. Those of a temporal patch pass through the tower together.
    """
    for visual in visuals:
        filled = 0
        for features in _see_all(visual, tower, chunk_patches, device):
            embeds[visual.rows[filled : filled + len(features)]] = features
            filled += len(features)
            yield len(features)
        assert filled == len(visual.rows), f"{filled} features for {len(visual.rows)} placeholders"


@torch.inference_mode()
def encode_audios(
    audios: Sequence[AudioInput],
    tower: AudioTower,
    embeds: Tensor,
    *,
    chunk_windows: Callable[[], int],
    device: torch.device,
) -> Iterator[int]:
    """Fill the rows of sounds in `embeds` [T, H], `chunk_windows` windows at a time, yielding rows filled."""
    for audio in audios:
        filled = 0
        for features in _hear_all(audio.mel, tower, chunk_windows, device):
            embeds[audio.rows[filled : filled + len(features)]] = features
            filled += len(features)
            yield len(features)
        assert filled == len(audio.rows), f"{filled} features for {len(audio.rows)} placeholders"


def _see_all(
    visual: VisualInput, tower: VisionTower, chunk_patches: Callable[[], int], device: torch.device
) -> Iterator[Tensor]:
    """Features of a visual, run by run of its temporal patches; how many make a run is decided at each attempt."""
    _, height, width = visual.grid
    coming, waiting = visual.patches(), list[Tensor]()

    def most_times() -> int:
        return max(1, chunk_patches() // (height * width))

    def see_run() -> tuple[Tensor, int]:
        run = waiting[: most_times()]
        return _see(torch.cat(run), (len(run), height, width), tower, chunk_patches(), device), len(run)

    while True:
        waiting += islice(coming, max(0, most_times() - len(waiting)))
        if not waiting:
            return
        features, seen = tower.attempt(see_run)
        del waiting[:seen]
        yield features


def _hear_all(
    mel: Tensor, tower: AudioTower, chunk_windows: Callable[[], int], device: torch.device
) -> Iterator[Tensor]:
    """Features of a sound's mel frames, chunk by chunk; how many make a chunk is decided at each attempt."""
    heard_frames, n_frames = 0, mel.shape[1]

    def hear_chunk() -> tuple[Tensor, int]:
        end = min(n_frames, heard_frames + chunk_windows() * tower.hearing.window_frames)
        return _hear(mel[:, heard_frames:end], tower, device), end

    while heard_frames < n_frames:
        features, heard_frames = tower.attempt(hear_chunk)
        yield features


def _see(
    patches: Tensor, grid: tuple[int, int, int], tower: VisionTower, most_patches: int, device: torch.device
) -> Tensor:
    """Features [n, H] of a run of temporal patches [4n, 3*2*14*14], in merge order; both on the host.

    Between the two, rows are in the order of windows.
    """
    vision, layout = tower.vision, tower.vision.layout(grid)
    order, per_row = layout.window_index, vision.merge_size**2
    pixels = patches.view(len(order), per_row, -1)
    with tower.rest as rest:
        embed = rest.get_submodule("patch_embed")
        slices = order.split(max(1, most_patches // per_row))
        hidden = torch.cat([embed(pixels[rows].flatten(0, 1).to(device, vision.dtype)) for rows in slices])
    places = layout.position_ids.view(len(order), per_row, -1)[order].flatten(0, 1)
    rotary = vision.rotary(hidden, places.to(device))
    for index, block in enumerate(tower.layers):
        bounds = layout.frame_bounds if index in vision.full_attention_layers else layout.window_bounds
        with block as layer:
            for group in _groups(bounds, most_patches):
                _see_in_layer(layer, vision, hidden, group, rotary, most_patches)
    with tower.rest as rest:
        merger = rest.get_submodule("merger")
        slices = hidden.split(max(1, most_patches // per_row) * per_row)
        merged = torch.cat([merger(rows).to(patches.device) for rows in slices])
    return merged[order.argsort()]


def _groups(bounds: Tensor, most_patches: int) -> Iterator[Tensor]:
    """Boundaries of runs of neighbouring windows: of as many as `most_patches` has room for, but at least one."""
    first, rows = 0, bounds.tolist()
    for last in range(1, len(rows)):
        if last == len(rows) - 1 or rows[last + 1] - rows[first] > most_patches:
            yield bounds[first : last + 1]
            first = last


def _see_in_layer(
    layer: nn.Module, vision: Vision, hidden: Tensor, bounds: Tensor, rotary: Rotary, most_patches: int
) -> None:
    """Change the rows of `hidden` [4n, D] in these windows as the layer does."""
    rows = slice(int(bounds[0]), int(bounds[-1]))
    own_rotary = (rotary[0][rows], rotary[1][rows])
    if rows.stop - rows.start > most_patches:
        _see_one_window(layer, vision, hidden[rows], own_rotary, most_patches)
    else:
        hidden[rows] = layer(hidden[rows], **_windows(bounds), position_embeddings=own_rotary)


def _windows(bounds: Tensor) -> dict[str, Any]:
    """How a layer is told of windows: of all as one, and of their lengths, which our attention takes together.

    Bounds stay on the host: the layer reads them, and a device copy would cost a sync per layer.
    """
    return {"cu_seqlens": bounds[[0, -1]] - bounds[0], "windows": tuple(bounds.diff().tolist())}


def _see_one_window(layer: nn.Module, vision: Vision, hidden: Tensor, rotary: Rotary, most_patches: int) -> None:
    """What the layer does to one window [m, D] in place: `most_patches` at once but for queries, keys and values."""
    norm1, norm2, mlp = (layer.get_submodule(name) for name in ("norm1", "norm2", "mlp"))
    attn: Any = layer.get_submodule("attn")
    slices = [slice(start, start + most_patches) for start in range(0, len(hidden), most_patches)]
    queries, keys, values = (torch.empty_like(hidden).unflatten(1, (attn.num_heads, -1)) for _ in range(3))
    for rows in slices:
        normed = norm1(hidden[rows])
        values[rows] = attn.v(normed).view_as(values[rows])
        q, k = attn.q(normed).view_as(queries[rows]), attn.k(normed).view_as(keys[rows])
        queries[rows], keys[rows] = vision.rotate(q, k, rotary[0][rows], rotary[1][rows])
    q, k, v = (heads.transpose(0, 1).unsqueeze(0) for heads in (queries, keys, values))
    for rows in slices:
        seen = attend(q[:, :, rows], k, v, causal=False, scale=attn.scaling)
        hidden[rows] += attn.proj(seen.squeeze(0).transpose(0, 1).flatten(1))
        hidden[rows] += mlp(norm2(hidden[rows]))


def _hear(mel: Tensor, tower: AudioTower, device: torch.device) -> Tensor:
    """Features [n, H] of mel frames [128, F] that start on a window boundary; both on the host."""
    window_frames = tower.hearing.window_frames
    with tower.rest as rest:
        frames = mel.to(device, tower.hearing.dtype).split(window_frames, dim=1)
        windows = [_convolve(window, rest, tower.hearing.positions) for window in frames]
        del frames
    lengths = torch.tensor([0, *(len(window) for window in windows)], device="cpu")
    hidden, bounds = torch.cat(windows), lengths.cumsum(0)
    for block in tower.layers:
        with block as layer:
            (hidden,) = layer(hidden, **_windows(bounds))
    # Two neighbours are averaged; a window's length is even but for the last, whose odd frame has no partner.
    pairs = hidden[: len(hidden) // 2 * 2].view(-1, 2, hidden.shape[1])
    with tower.rest as rest:
        normed = rest.get_submodule("ln_post")((pairs[:, 0] + pairs[:, 1]) / 2)
        return rest.get_submodule("proj")(normed).to(mel.device)


def _convolve(mel: Tensor, rest: nn.Module, positions: Tensor) -> Tensor:
    """One window's mel frames [128, f] as rows [ceil(f / 2), D] with their positions added."""
    hidden = F.gelu(rest.get_submodule("conv1")(mel.unsqueeze(0)))
    hidden = F.gelu(rest.get_submodule("conv2")(hidden)).squeeze(0).T
    return hidden + positions[: len(hidden)].to(hidden.dtype)
