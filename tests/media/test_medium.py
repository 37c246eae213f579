from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from media_files import number_in, numbered_frame, sine, write_sound, write_video
from PIL import Image

from lowvram.errors import MediaError, OptionError
from lowvram.media import measure_sound, open_medium, open_video, read_image, read_sound
from lowvram.options import Limits

LIMITS = Limits()


def sound_of(source, start_s: float | None = None, end_s: float | None = None) -> np.ndarray:
    """The sound, which must be as long as it was measured to be."""
    with open_medium(source, LIMITS) as medium:
        sound = read_sound(medium, start_s, end_s, LIMITS)
        assert measure_sound(medium, start_s, end_s) == len(sound)
    assert sound.dtype == np.float32 and sound.flags.writeable
    return sound


def shown(source, indices: list[int], fps: float = 2.0) -> list[int]:
    with open_medium(source, LIMITS, frames_fps=fps) as medium:
        return [number_in(frame) for frame in open_video(medium, LIMITS).frames(indices)]


def animation(file_format: str) -> bytes:
    file, frames = io.BytesIO(), [Image.fromarray(numbered_frame(number)) for number in (1, 2, 3)]
    frames[0].save(file, file_format, save_all=True, append_images=frames[1:], duration=200, lossless=True)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    frames = [numbered_frame(number) for number in range(25)]
    write_video(folder / "clip.mp4", frames, sound=sine(48_000))
    write_video(folder / "silent.mp4", frames)
    write_sound(folder / "tone.m4a", sine(44_100)[None], 44_100, "aac", file_format="mp4")
    write_sound(folder / "tone.wav", sine(44_100)[None], 44_100, "pcm_s16le")
    Image.fromarray(frames[7]).save(folder / "still.png")
    return folder


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("clip.mp4", "video"),
        ("silent.mp4", "video"),
        ("tone.m4a", "audio"),
        ("tone.wav", "audio"),
        ("still.png", "image"),
    ],
)
def test_content_says_what_a_medium_is_whatever_its_name(name: str, kind: str, folder: Path, tmp_path: Path):
    disguised = tmp_path / "invoice.txt"
    disguised.write_bytes((folder / name).read_bytes())
    for source in (folder / name, disguised, disguised.read_bytes()):
        with open_medium(source, LIMITS) as medium:
            assert medium.kind == kind


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.zeros((4, 6), np.uint8), "image"),
        (np.zeros((4, 6, 3), np.uint8), "image"),
        (np.zeros((4, 6, 4), np.uint8), "image"),
        (np.zeros((2, 4, 6, 3), np.uint8), "video"),
        (np.zeros(9, np.float64), "audio"),
        (np.zeros(9, np.int16), "audio"),
        (np.zeros(9, np.uint8), "audio"),
        (np.zeros((8, 9), np.int32), "audio"),
        (np.zeros((9, 2), np.float32), "audio"),
        (np.zeros((2, 9), np.uint8), "image"),
    ],
)
def test_shape_and_dtype_say_what_an_array_is(array: np.ndarray, kind: str):
    with open_medium(array, LIMITS) as medium:
        assert medium.kind == kind


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(9, np.int64),
        np.zeros(9, bool),
        np.zeros((2, 2)),
        np.zeros((9, 10), np.int16),
        np.zeros((4, 6, 3)),
        np.zeros((2, 3, 4, 6), np.uint8),
        np.zeros((1, 1, 5), np.uint8),
    ],
)
def test_another_array_is_refused_with_its_shape_and_dtype(array: np.ndarray):
    with pytest.raises(MediaError, match=rf"array \[{', '.join(map(str, array.shape))}\] {array.dtype} is neither"):
        open_medium(array, LIMITS)


def test_an_empty_array_is_refused():
    with pytest.raises(MediaError, match=r"array \[0\] float32 is empty"):
        open_medium(np.empty(0, np.float32), LIMITS)


def test_text_is_no_medium(tmp_path: Path):
    (tmp_path / "notes.mp4").write_text("once upon a time", encoding="utf-8")
    with pytest.raises(MediaError, match=r"notes.mp4, 16 bytes, is not a medium"):
        open_medium(tmp_path / "notes.mp4", LIMITS)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"avif"])
def test_a_photo_in_tiles_is_refused_and_not_taken_for_a_video_of_one_of_them(brand: bytes, folder: Path):
    content = (folder / "clip.mp4").read_bytes().replace(b"ftypisom", b"ftyp" + brand, 1)
    with pytest.raises(MediaError, match=r"bytes, is a picture in HEIC or AVIF that cannot be read here \(save it as"):
        open_medium(content, LIMITS)


def test_a_container_without_tracks_has_neither_picture_nor_sound(folder: Path):
    with pytest.raises(MediaError, match="neither picture nor sound"):
        open_medium((folder / "silent.mp4").read_bytes().replace(b"trak", b"free"), LIMITS)


def test_an_image_is_read_from_a_file_an_array_or_pillow(folder: Path):
    for source in (folder / "still.png", numbered_frame(7), Image.fromarray(numbered_frame(7))):
        with open_medium(source, LIMITS) as medium:
            assert np.array_equal(read_image(medium, LIMITS), numbered_frame(7))


def test_a_pillow_image_above_the_limit_is_refused():
    with (
        open_medium(Image.new("L", (40, 30)), LIMITS) as medium,
        pytest.raises(MediaError, match="40 x 30 pixels, where at most 1,199"),
    ):
        read_image(medium, Limits(max_source_pixels=1199))


def test_a_video_is_no_image_and_a_sound_no_video(folder: Path):
    with (
        open_medium(folder / "clip.mp4", LIMITS) as medium,
        pytest.raises(MediaError, match=r"clip.mp4 is a video, not an"),
    ):
        read_image(medium, LIMITS)
    with (
        open_medium(folder / "tone.wav", LIMITS) as medium,
        pytest.raises(MediaError, match=r"wav is a sound, not a video"),
    ):
        open_video(medium, LIMITS)


def test_a_clip_is_read_more_than_once(folder: Path):
    with open_medium(folder / "clip.mp4", LIMITS) as medium:
        video = open_video(medium, LIMITS)
        assert (video.frame_count, video.has_sound) == (25, True)
        together = zip(video.frames([0, 5, 24]), video.frames([1, 5, 6]), strict=True)
        assert [(number_in(a), number_in(b)) for a, b in together] == [(0, 1), (5, 5), (24, 6)]


def test_pictures_in_a_row_are_a_video(folder: Path):
    pictures = [numbered_frame(3), Image.fromarray(numbered_frame(5)), folder / "still.png"]
    assert shown(pictures, [0, 1, 1, 2]) == [3, 5, 5, 7]
    assert shown(np.stack([numbered_frame(3), numbered_frame(5)]), [0, 1]) == [3, 5]


def test_pictures_in_a_row_run_at_the_rate_they_are_given():
    with open_medium([numbered_frame(1)] * 6, LIMITS, frames_fps=3.0) as medium:
        video = open_video(medium, LIMITS)
    assert (video.frame_count, video.fps, video.duration_s, video.has_sound) == (6, 3.0, 2.0, False)
    with pytest.raises(OptionError, match="frames_fps is 0"):
        open_medium([numbered_frame(1)], LIMITS, frames_fps=0)


def test_no_pictures_in_a_row_are_a_video_of_0_frames():
    with open_medium([], LIMITS) as medium, pytest.raises(MediaError, match="a video of 0 frames"):
        open_video(medium, LIMITS)


def test_pictures_in_a_row_have_one_size():
    with pytest.raises(MediaError, match="frame 1 of list is 32 x 48 pixels, not 64 x 48"):
        shown([numbered_frame(1), numbered_frame(2, width=32)], [0, 1])


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_an_animated_picture_is_a_video_and_its_first_picture_an_image(file_format: str):
    content = animation(file_format)
    assert shown(content, [0, 1, 2, 2]) == [1, 2, 3, 3]
    with open_medium(content, LIMITS) as medium:
        video = open_video(medium, LIMITS)
        assert (medium.kind, video.frame_count, video.fps, video.width, video.height) == ("video", 3, 5.0, 64, 48)
        assert number_in(read_image(medium, LIMITS)) == 1


def test_an_animation_keeps_its_size_where_a_picture_reaches_over_its_edge():
    file, shades = io.BytesIO(), [Image.new("L", (64, 48), shade) for shade in (0, 100, 200)]
    shades[0].save(file, "GIF", save_all=True, append_images=shades[1:], duration=200)
    content = bytearray(file.getvalue())
    content[content.rindex(b"\x2c\0\0\0\0\x40\0\x30\0") + 1] = 10
    with open_medium(bytes(content), LIMITS) as medium:
        assert [frame.shape for frame in open_video(medium, LIMITS).frames([0, 1, 2])] == [(48, 64, 3)] * 3


@pytest.mark.parametrize(
    ("name", "codec", "rate_hz", "tolerance"),
    [
        ("tone.wav", "pcm_s16le", 44_100, 1e-3),
        ("tone.wav", "pcm_s24le", 8000, 1e-3),
        ("tone.aiff", "pcm_s16be", 22_050, 1e-3),
        ("tone.flac", "flac", 96_000, 1e-3),
        ("tone.mp3", "libmp3lame", 44_100, 0.02),
        ("tone.m4a", "aac", 48_000, 0.02),
        ("tone.mka", "flac", 44_100, 1e-3),
        ("tone.ogg", "libopus", 48_000, 0.1),
        ("tone.opus", "libopus", 48_000, 0.1),
        ("tone.webm", "libopus", 48_000, 0.1),
    ],
)
def test_a_tone_in_any_container_is_the_tone_at_16_khz(
    name: str, codec: str, rate_hz: int, tolerance: float, tmp_path: Path
):
    file_format = "mp4" if name.endswith("m4a") else None
    sound = sound_of(write_sound(tmp_path / name, sine(rate_hz)[None], rate_hz, codec, file_format=file_format))
    middle = slice(3200, 12_800)  # codecs ring at the ends
    assert 16_000 <= len(sound) <= 16_000 + 1024
    assert np.abs(sound[middle] - sine(16_000)[middle]).max() < tolerance


def test_vorbis_is_read_too(tmp_path: Path):
    soundfile.write(tmp_path / "tone.ogg", sine(44_100), 44_100, subtype="VORBIS")
    assert np.abs(sound_of(tmp_path / "tone.ogg")[3200:12_800] - sine(16_000)[3200:12_800]).max() < 0.1


@pytest.mark.parametrize("channels", [1, 2, 6, 8])
def test_every_channel_counts_alike(channels: int, tmp_path: Path):
    levels = np.arange(channels, dtype=np.float32) / 10
    soundfile.write(tmp_path / "room.wav", np.tile(levels, (16_000, 1)), 16_000, subtype="FLOAT")
    assert sound_of(tmp_path / "room.wav") == pytest.approx(levels.mean())


def test_a_lossy_track_of_7_1_is_heard(tmp_path: Path):
    channels = np.tile(sine(48_000), (8, 1))
    channels[3] = 0  # low frequencies only
    path = write_sound(tmp_path / "cinema.m4a", channels, 48_000, "aac", "7.1", file_format="mp4")
    assert np.abs(sound_of(path)[3200:12_800] - 7 / 8 * sine(16_000)[3200:12_800]).max() < 0.02


def test_sound_equals_reading_all_and_resampling_at_once(tmp_path: Path):
    noise = np.random.default_rng(0).uniform(-1, 1, (44_100 * 3 + 77, 2)).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", noise, 44_100, subtype="FLOAT")
    expected = soxr.resample(noise.mean(axis=1), 44_100, 16_000, quality="HQ")
    assert np.array_equal(sound_of(tmp_path / "noise.wav"), expected)
    cut = soxr.resample(noise[22_050:66_150].mean(axis=1), 44_100, 16_000, quality="HQ")
    assert np.array_equal(sound_of(tmp_path / "noise.wav", 0.5, 1.5), cut)


def test_an_array_is_heard_as_it_is():
    samples = np.linspace(-1, 1, 16_000)
    assert np.array_equal(sound_of(samples), samples.astype(np.float32))
    assert np.array_equal(sound_of(samples, 0.25, 0.5), samples[4000:8000].astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "lowest", "silent"), [("int16", -(2**15), 0), ("int32", -(2**31), 0), ("uint8", 0, 128)]
)
def test_whole_numbers_are_heard_on_their_own_scale(dtype: str, lowest: int, silent: int):
    half = (lowest + silent) // 2
    assert sound_of(np.array([lowest, half, silent, silent + (silent - half)], dtype)).tolist() == [-1, -0.5, 0, 0.5]


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_channels_of_an_array_are_averaged_whichever_side_they_are(dtype: str):
    left, right = np.arange(100, dtype=dtype), np.arange(0, 300, 3, dtype=dtype)
    full_scale = 2**15 if dtype == "int16" else 1
    mono = (np.arange(100) * 2 / full_scale).astype(np.float32)
    assert np.array_equal(sound_of(np.stack([left, right])), mono)
    assert np.array_equal(sound_of(np.stack([left, right], axis=1)), mono)


def onset(sound: np.ndarray) -> float:
    return float(np.flatnonzero(np.abs(sound) > 0.1)[0]) / 16_000


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.mov"])
def test_sound_that_starts_late_is_late(name: str, tmp_path: Path):
    frames = [numbered_frame(number) for number in range(50)]
    sound = sound_of(write_video(tmp_path / name, frames, sound=sine(48_000), sound_start_s=0.5))
    assert onset(sound) == pytest.approx(0.5, abs=0.003)
    assert len(sound) / 16_000 == pytest.approx(1.5, abs=0.03)
    assert not sound[:7000].any()


def test_a_hole_in_a_track_is_silent(tmp_path: Path):
    frames = [numbered_frame(number) for number in range(50)]
    path = write_video(tmp_path / "call.mkv", frames, sound=sine(48_000), sound_codec="pcm_s16le", sound_gap_s=0.5)
    sound = sound_of(path)
    assert len(sound) / 16_000 == pytest.approx(1.5, abs=0.01)
    assert abs(sound[9000:15_000]).max() < 1e-3 < abs(sound[17_000:]).max()


def test_sound_that_ends_early_ends_early(tmp_path: Path):
    frames = [numbered_frame(number) for number in range(50)]
    path = write_video(tmp_path / "short.mkv", frames, sound=sine(48_000, 0.5), sound_codec="pcm_s16le")
    assert len(sound_of(path)) == 8000
    assert len(sound_of(path, 1.0, 2.0)) == 0


def test_a_cut_after_the_end_of_a_sound_is_refused(folder: Path):
    for read in (read_sound, lambda medium, start_s, end_s, limits: measure_sound(medium, start_s, end_s)):
        with (
            open_medium(folder / "tone.wav", LIMITS) as medium,
            pytest.raises(MediaError, match=r"0 samples of sound between 2 s and 3 s: it is 1\.00 s long"),
        ):
            read(medium, 2.0, 3.0, LIMITS)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP"])
def test_an_animation_has_no_sound_to_read(file_format: str):
    with (
        open_medium(animation(file_format), LIMITS) as medium,
        pytest.raises(MediaError, match="a video without sound"),
    ):
        read_sound(medium, None, None, LIMITS)


@pytest.mark.parametrize("name", ["silent.mp4", "still.png"])
def test_what_is_silent_has_no_sound_to_read(name: str, folder: Path):
    with open_medium(folder / name, LIMITS) as medium, pytest.raises(MediaError, match="without sound"):
        read_sound(medium, None, None, LIMITS)


def test_a_sound_file_without_samples_is_refused(tmp_path: Path):
    soundfile.write(tmp_path / "void.wav", np.empty(0), 16_000)
    with open_medium(tmp_path / "void.wav", LIMITS) as medium, pytest.raises(MediaError, match="0 samples of sound"):
        read_sound(medium, None, None, LIMITS)


def test_samples_that_are_no_numbers_are_refused():
    with (
        open_medium(np.array([0.0, np.nan]), LIMITS) as medium,
        pytest.raises(MediaError, match=r"array \[2\] float64 has samples that are no numbers"),
    ):
        read_sound(medium, None, None, LIMITS)


def test_more_sound_than_the_limit_is_refused(folder: Path):
    with open_medium(folder / "tone.wav", LIMITS) as medium, pytest.raises(MediaError, match="more than 1 s of sound"):
        read_sound(medium, None, None, Limits(max_media_bytes=63_000))


def test_reading_sound_holds_little_more_than_the_sound(tmp_path: Path):
    write_sound(tmp_path / "long.wav", np.zeros((1, 48_000 * 60), np.float32), 48_000, "pcm_s16le")
    with open_medium(tmp_path / "long.wav", LIMITS) as medium:
        tracemalloc.start()
        sound = read_sound(medium, None, None, LIMITS)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(sound) == 960_000
    assert peak_bytes < 1.25 * sound.nbytes + 1_000_000


def test_a_long_sound_is_not_cut(tmp_path: Path):
    write_sound(tmp_path / "lecture.wav", np.zeros((1, 8000 * 400), np.float32), 8000, "pcm_s16le")
    assert len(sound_of(tmp_path / "lecture.wav")) == 400 * 16_000


def test_closing_a_medium_closes_its_file(folder: Path):
    with open_medium(folder / "tone.wav", LIMITS) as medium:
        pass
    with pytest.raises(MediaError, match="closed file"):
        read_sound(medium, None, None, LIMITS)
