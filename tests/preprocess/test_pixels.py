from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lowvram.options import MediaParams
from lowvram.preprocess.frames import VisionRecipe, image_size
from lowvram.preprocess.pixels import frame_indices, patchify, resize_frame, resize_image

RECIPE = VisionRecipe(
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    min_pixels=4 * 28**2,
    max_pixels=16_384 * 28**2,
)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_frames_are_spread_from_the_first_to_the_last():
    assert frame_indices(0, 29, 6) == [0, 6, 12, 17, 23, 29]
    assert frame_indices(5, 5, 2) == [5, 5]


@settings(deadline=None)
@given(st.integers(0, 50_000), st.integers(0, 50_000), st.integers(1, 384))
def test_frame_numbers_never_go_back(first: int, length: int, pairs: int):
    indices = frame_indices(first, first + length, 2 * pairs)
    assert indices == sorted(indices)
    assert (indices[0], indices[-1]) == (first, first + length)


@pytest.mark.parametrize("size", [(56, 84), (112, 140)])
def test_a_frame_is_resized_as_pillow_would_but_for_rounding(size: tuple[int, int]):
    x, y = np.mgrid[0:90, 0:120] / 15
    frame = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=2) * 100 + 128
    frame = frame.astype(np.uint8)  # soft: Pillow also rounds and clips between rows and columns
    pillow = np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float32)
    resized = resize_frame(frame, size).permute(1, 2, 0).numpy()
    assert np.abs(resized - pillow).max() <= 1


def test_a_resized_frame_is_bytes_again():
    resized = resize_frame(noise(90, 120) // 128 * 255, (112, 140))
    assert torch.equal(resized, resized.byte().float())


def test_a_frame_of_the_right_size_is_left_alone():
    frame = noise(56, 84)
    assert np.array_equal(resize_frame(frame, (56, 84)).permute(1, 2, 0).numpy(), frame)


def test_patches_of_an_image_equal_the_reference_processors():
    image = noise(150, 230)
    size = image_size(150, 230, RECIPE, MediaParams(), None, "")
    still = resize_image(image, size)
    reference = Qwen2VLImageProcessorPil(min_pixels=RECIPE.min_pixels, max_pixels=RECIPE.max_pixels)
    expected = reference(Image.fromarray(image), return_tensors="pt")
    patches = patchify(torch.stack([still, still]), RECIPE)
    assert expected["image_grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]]
    torch.testing.assert_close(patches, expected["pixel_values"], atol=2e-6, rtol=0)


def test_a_patch_holds_both_frames_channel_by_channel():
    frames = torch.stack([torch.full((3, 28, 28), 51.0), torch.full((3, 28, 28), 204.0)])
    patches = patchify(frames, RECIPE).view(4, 3, 2, 14, 14)
    for channel, (mean, std) in enumerate(zip(RECIPE.mean, RECIPE.std, strict=True)):
        expected = (torch.tensor([0.2, 0.8]) - mean) / std
        torch.testing.assert_close(patches[:, channel, :, 5, 7], expected.expand(4, 2))
