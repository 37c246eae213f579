from __future__ import annotations

import pytest

from lowvram.demo.config import PREPROCESSOR_CONFIG
from lowvram.media.video import Video
from lowvram.options import MediaParams
from lowvram.preprocess.counts import audio_tokens, audio_windows, count_image, count_video, mel_frames, read_recipe
from lowvram.preprocess.messages import MediaPart

RECIPE = read_recipe(PREPROCESSOR_CONFIG)


def part(kind: str, **options: object) -> MediaPart:
    return MediaPart(kind, "", MediaParams(**options), "message 1, part 1")  # type: ignore[arg-type]


def clip(n_frames: int, fps: float = 30.0, height: int = 720, width: int = 1280) -> Video:
    return Video("clip", n_frames, fps, width, height, has_sound=True, show=lambda indices: iter(()))


@pytest.mark.parametrize(("frames", "tokens"), [(3, 1), (4, 1), (100, 25), (101, 25), (103, 26), (30_000, 7500)])
def test_a_second_of_sound_is_25_tokens(frames: int, tokens: int):
    assert audio_tokens(frames) == tokens


@pytest.mark.parametrize(("samples", "frames"), [(1, 3), (480, 3), (481, 4), (16_000, 100), (16_001, 101)])
def test_a_frame_is_begun_every_10_ms_and_3_make_a_token(samples: int, frames: int):
    assert mel_frames(samples, 160) == frames


@pytest.mark.parametrize(("frames", "windows"), [(0, 0), (1, 1), (200, 1), (201, 2)])
def test_a_window_that_is_begun_counts(frames: int, windows: int):
    assert audio_windows(frames, 200) == windows


def test_a_second_of_720p_is_720_tokens_and_a_picture_of_it_1196():
    """Two frames of 36 x 20 tokens in one temporal patch; an image may be larger, 46 x 26."""
    video = count_video(part("video"), clip(450), 0, RECIPE, picked=False)
    assert (video.grid, video.tokens) == ((15, 40, 72), 15 * 20 * 36)
    image = count_image(part("image"), "p", 720, 1280, RECIPE)
    assert (image.grid, image.tokens) == ((1, 52, 92), 26 * 46)


def test_the_sound_of_a_video_adds_to_its_pictures():
    silent = count_video(part("video"), clip(300), 0, RECIPE, picked=False)
    heard = count_video(part("video"), clip(300), 160_000, RECIPE, picked=False)
    assert heard.tokens - silent.tokens == 250
    assert (silent.mel_frames, heard.mel_frames) == (0, 1000)


def test_frames_picked_by_hand_are_all_seen():
    assert count_video(part("video"), clip(7), 0, RECIPE, picked=True).grid[0] == 4


def test_a_size_is_what_its_grid_was_made_of():
    shape = count_image(part("image"), "p", 100, 300, RECIPE)
    assert RECIPE.size(shape) == (112, 308)


def test_newer_files_write_pixel_bounds_as_a_size():
    newer = {key: value for key, value in PREPROCESSOR_CONFIG.items() if key not in ("min_pixels", "max_pixels")}
    assert read_recipe(newer | {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}) == RECIPE


def test_pixel_bounds_of_their_own_go_before_those_of_a_size():
    assert read_recipe(PREPROCESSOR_CONFIG | {"size": {"shortest_edge": 1, "longest_edge": 2}}) == RECIPE
