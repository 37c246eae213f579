"""Decoded pictures -> the patches that the vision tower reads, resized and normalized as the reference does it.

Follows qwen-omni-utils 0.0.9 for the frames of videos, and transformers' `Qwen2VLImageProcessor` for images.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .frames import VisionRecipe


def frame_indices(first: int, last: int, n_frames: int) -> list[int]:
    """`n_frames` frame numbers spread evenly over first..last, both ends included.

    In float32 as the official utilities do, whose halves round differently in other precisions.
    """
    return torch.linspace(first, last, n_frames, dtype=torch.float32, device="cpu").round().long().tolist()


def resize_frame(frame: np.ndarray, size: tuple[int, int]) -> Tensor:
    """A decoded frame [H, W, 3] uint8 as [3, height, width] float32 of whole numbers in 0..255.

    Antialiased bicubic in float32, rounded back to bytes, as torchvision resizes a uint8 tensor.
    """
    pixels = torch.from_numpy(frame).permute(2, 0, 1).float()
    if pixels.shape[1:] == size:
        return pixels
    resized = F.interpolate(pixels.unsqueeze(0), size=size, mode="bicubic", align_corners=False, antialias=True)
    return resized.squeeze(0).clamp_(0, 255).round_()


def resize_image(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """A decoded image [H, W, 3] uint8 as [3, height, width] float32 of whole numbers in 0..255, by Pillow's bicubic."""
    height, width = size
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()


def patchify(frames: Tensor, recipe: VisionRecipe) -> Tensor:
    """One temporal patch: frames [temporal, 3, H, W] in 0..255 -> normalized patches [h*w, 3*temporal*patch*patch].

    Patches of one token are neighbours, tokens go row by row; inside a patch: channel, time, row, column.
    """
    temporal, channels, height, width = frames.shape
    patch, merge = recipe.patch_size, recipe.merge_size
    assert height % recipe.factor == 0 == width % recipe.factor, f"{height}x{width} is not whole tokens"
    mean, std = (frames.new_tensor(values).view(-1, 1, 1) * 255 for values in (recipe.mean, recipe.std))
    blocks = ((frames - mean) / std).view(
        temporal, channels, height // recipe.factor, merge, patch, width // recipe.factor, merge, patch
    )
    ordered = blocks.permute(2, 5, 3, 6, 1, 0, 4, 7)  # token row, token column, merge y, merge x, C, T, y, x
    return ordered.reshape((height // patch) * (width // patch), channels * temporal * patch * patch)
