from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from lowvram.errors import MediaError, OptionError
from lowvram.options import MediaParams
from lowvram.preprocess.frames import (
    VisionRecipe,
    count_frames,
    every_frame,
    fit_size,
    frame_indices,
    frame_size,
    frame_span,
    image_size,
    patchify,
    resize_frame,
    resize_image,
)

RECIPE = VisionRecipe(
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    min_pixels=4 * 28**2,
    max_pixels=16_384 * 28**2,
)
DEFAULT = MediaParams()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(st.integers(28, 3000), st.integers(28, 3000), st.sampled_from([(3136, 12_845_056), (100_352, 602_112)]))
def test_sizes_equal_the_reference_processors(height: int, width: int, bounds: tuple[int, int]):
    assert fit_size(height, width, 28, *bounds) == smart_resize(height, width, 28, *bounds)


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_a_fitted_size_is_whole_tokens_and_fits_again(height: int, width: int):
    if max(height, width) > 200 * min(height, width):
        return
    fitted = fit_size(height, width, 28, 100_352, 602_112)
    assert fitted[0] % 28 == fitted[1] % 28 == 0
    assert 100_352 <= fitted[0] * fitted[1] <= 602_112
    assert fit_size(*fitted, 28, 100_352, 602_112) == fitted


def test_a_side_is_never_pressed_to_nothing():
    assert fit_size(10, 2000, 28, 4 * 28**2, 9 * 28**2) == (28, 1176)


def test_a_caller_cannot_make_an_image_smaller_than_the_checkpoint_does():
    assert image_size(20, 20, RECIPE, MediaParams(image_min_pixels=1), None, "") == (56, 56)


def test_a_ribbon_is_refused_with_its_size():
    with pytest.raises(MediaError, match=r"wall\.png is 2010x10 pixels"):
        fit_size(10, 2010, 28, 3136, 12_845_056, "wall.png")


@pytest.mark.parametrize(
    ("params", "resized", "expected"),
    [
        (DEFAULT, None, (476, 644)),
        (MediaParams(image_max_pixels=100_000), None, (252, 364)),
        (MediaParams(image_min_pixels=1_000_000), None, (868, 1176)),
        (DEFAULT, (300, 200), (308, 196)),
    ],
)
def test_an_image_is_as_large_as_it_is_unless_told(
    params: MediaParams, resized: tuple[int, int] | None, expected: tuple[int, int]
):
    assert image_size(480, 640, RECIPE, params, resized, "") == expected


@pytest.mark.parametrize(
    ("n_frames", "params", "expected"),
    [
        (8, DEFAULT, (560, 1008)),  # 768 tokens at most
        (768, DEFAULT, (336, 644)),  # 90 % of 128,000 tokens, shared by 384 pairs
        (8, MediaParams(max_pixels=200_000), (308, 588)),
        (8, MediaParams(max_pixels=10_000_000), (560, 1008)),
        (8, MediaParams(min_pixels=3136, max_pixels=50_000), (140, 280)),
    ],
)
def test_a_frame_of_full_hd_is_shrunk_to_its_share(n_frames: int, params: MediaParams, expected: tuple[int, int]):
    assert frame_size(1080, 1920, n_frames, RECIPE, params, None, "") == expected


def test_no_share_is_below_1_05_times_the_smallest_frame():
    crowded = MediaParams(total_pixels=DEFAULT.min_pixels)
    assert frame_size(480, 640, 768, RECIPE, crowded, None, "") == (280, 364)
    assert fit_size(480, 640, 28, DEFAULT.min_pixels, DEFAULT.min_pixels) == (252, 364)


def test_a_frame_size_asked_for_is_rounded_to_tokens_and_capped():
    assert frame_size(1080, 1920, 8, RECIPE, DEFAULT, (100, 150), "") == (112, 140)
    assert frame_size(1080, 1920, 8, RECIPE, DEFAULT, (1080, 1920), "") == (560, 1008)


@pytest.mark.parametrize(
    ("start_s", "end_s", "expected"),
    [(None, None, (0, 99)), (1.04, None, (11, 99)), (None, 2.09, (0, 20)), (0.5, 99.0, (5, 99)), (0.5, 0.55, (5, 5))],
)
def test_a_cut_begins_at_the_frame_after_and_ends_at_the_frame_before(
    start_s: float | None, end_s: float | None, expected: tuple[int, int]
):
    assert frame_span(100, 10.0, start_s, end_s) == expected


@pytest.mark.parametrize(("start_s", "end_s"), [(12.0, None), (3.01, 3.09)])
def test_a_cut_without_a_frame_is_refused_with_the_clips_length(start_s: float, end_s: float | None):
    with pytest.raises(MediaError, match=r"clip.mp4 has no frame .* 10.00 s long \(100 frames at 10 frames/s\)"):
        frame_span(100, 10.0, start_s, end_s, "clip.mp4")


@pytest.mark.parametrize(
    ("available", "fps", "params", "expected"),
    [
        (300, 30.0, DEFAULT, 20),
        (315, 30.0, DEFAULT, 20),  # 21 frames are an odd number
        (30, 30.0, DEFAULT, 4),  # at least 4
        (3, 30.0, DEFAULT, 2),  # of 3 frames, 2
        (1, 30.0, DEFAULT, 2),  # one frame twice
        (30_000, 30.0, DEFAULT, 768),
        (300, 30.0, MediaParams(fps=60), 300),  # no more than there are
        (300, 30.0, MediaParams(min_frames=31), 32),
        (300, 30.0, MediaParams(max_frames=7), 6),
    ],
)
def test_two_frames_a_second_within_bounds(available: int, fps: float, params: MediaParams, expected: int):
    assert count_frames(available, fps, params) == expected


@given(st.integers(1, 10_000), st.floats(1, 120), st.floats(0.1, 30))
def test_frames_are_in_pairs_and_never_more_than_there_are(available: int, fps: float, wanted_fps: float):
    n_frames = count_frames(available, fps, MediaParams(fps=wanted_fps))
    assert n_frames % 2 == 0
    assert 2 <= n_frames <= max(available, 2)


def test_a_number_of_frames_asked_for_is_rounded_to_pairs():
    assert count_frames(300, 30.0, DEFAULT, n_frames=7) == 8


@pytest.mark.parametrize("n_frames", [1, 12])
def test_a_number_of_frames_that_cannot_be_had_is_refused(n_frames: int):
    with pytest.raises(OptionError, match=f"nframes is {n_frames}, but clip.mp4 can show 2 to 10 frames"):
        count_frames(10, 30.0, DEFAULT, n_frames=n_frames, name="clip.mp4")


def test_frames_are_spread_from_the_first_to_the_last():
    assert frame_indices(0, 29, 6) == [0, 6, 12, 17, 23, 29]
    assert frame_indices(5, 5, 2) == [5, 5]


@settings(deadline=None)
@given(st.integers(0, 50_000), st.integers(0, 50_000), st.integers(1, 384))
def test_frame_numbers_never_go_back(first: int, length: int, pairs: int):
    indices = frame_indices(first, first + length, 2 * pairs)
    assert indices == sorted(indices)
    assert (indices[0], indices[-1]) == (first, first + length)


def test_of_given_frames_none_is_left_out():
    assert every_frame(3) == [0, 1, 2, 2]
    assert every_frame(4) == [0, 1, 2, 3]


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
    size = image_size(150, 230, RECIPE, DEFAULT, None, "")
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
