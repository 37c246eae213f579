from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from lowvram.errors import MediaError, OptionError
from lowvram.options import MediaParams
from lowvram.preprocess.frames import (
    VisionRecipe,
    count_frames,
    every_frame,
    fit_size,
    frame_size,
    frame_span,
    image_size,
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


@given(st.integers(28, 3000), st.integers(28, 3000), st.sampled_from([(3136, 12_845_056), (100_352, 602_112)]))
@example(28, 98, (3136, 12_845_056))  # fits at the very bound, and is not enlarged
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
    assert fit_size(2000, 10, 28, 4 * 28**2, 9 * 28**2) == (1176, 28)


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


@pytest.mark.parametrize(
    ("start_s", "end_s", "where"), [(12.0, None, "from 12 s on"), (3.01, 3.09, "between 3.01 s and 3.09 s")]
)
def test_a_cut_without_a_frame_is_refused_with_the_clips_length(start_s: float, end_s: float | None, where: str):
    with pytest.raises(
        MediaError, match=rf"clip.mp4 has no frame {where}: it is 10.00 s long \(100 frames at 10 frames/s\)"
    ):
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
    assert count_frames(8, 30.0, DEFAULT, n_frames=7) == 8


@pytest.mark.parametrize("n_frames", [1, 12])
def test_a_number_of_frames_that_cannot_be_had_is_refused(n_frames: int):
    with pytest.raises(OptionError, match=f"nframes is {n_frames}, but clip.mp4 can show 2 to 10 frames"):
        count_frames(10, 30.0, DEFAULT, n_frames=n_frames, name="clip.mp4")


def test_of_given_frames_none_is_left_out():
    assert every_frame(3) == [0, 1, 2, 2]
    assert every_frame(4) == [0, 1, 2, 3]
