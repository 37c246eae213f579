from __future__ import annotations

import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from media_files import number_in, numbered_frame, sine, write_video

from lowvram.errors import MediaError
from lowvram.media.sources import open_stored
from lowvram.media.video import SEEK_OVER_FRAMES, Timeline, Video, open_clip, upright
from lowvram.options import Limits

LIMITS = Limits()
REORDERED = {"bf": "3", "g": "20", "b_strategy": "0"}
QUADRANTS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)


def measure(path: Path) -> Video:
    with open_stored(path, LIMITS) as stored:
        return open_clip(stored, LIMITS)


def numbers(path: Path, indices: list[int] | None = None) -> list[int]:
    """The numbers drawn in the frames of `indices` (default: all)."""
    with open_stored(path, LIMITS) as stored:
        video = open_clip(stored, LIMITS)
        return [number_in(frame) for frame in video.frames(range(video.frame_count) if indices is None else indices)]


def count(stop: int) -> list[np.ndarray]:
    return [numbered_frame(number) for number in range(stop)]


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("h264.mp4", "libx264", REORDERED),
        ("h264.mkv", "libx264", REORDERED),
        ("h264.avi", "libx264", REORDERED),
        ("h264.ts", "libx264", REORDERED),
        ("h264.flv", "libx264", REORDERED),
        ("open.mp4", "libx264", {**REORDERED, "x264-params": "open-gop=1"}),
        ("h265.mp4", "libx265", {"x265-params": "log-level=none:pools=none:frame-threads=1"}),
        ("mpeg4.avi", "mpeg4", {"bf": "2", "q:v": "3"}),
        ("mpeg4.mov", "mpeg4", {"bf": "2", "q:v": "3"}),
        ("mjpeg.mov", "mjpeg", {}),
        ("vp8.webm", "libvpx", {"deadline": "realtime"}),
        ("vp9.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_every_frame_is_at_its_index(name: str, codec: str, options: dict[str, str], tmp_path: Path):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / name, count(50), codec, options=options, pix_fmt=pix_fmt)
    video = measure(path)
    assert (video.frame_count, video.fps, video.duration_s) == (50, 25.0, 2.0)
    assert numbers(path) == list(range(50))
    assert numbers(path, [0, 0, 7, 7, 8, 31, 49, 49]) == [0, 0, 7, 7, 8, 31, 49, 49]


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "long.mp4", count(256), options=REORDERED)


@pytest.mark.parametrize("indices", [[255], [100, 101, 200], [0, 99, 99, 255], [39, 40, 41, 79, 80, 81, 159, 160]])
def test_a_seek_shows_what_decoding_from_the_beginning_shows(indices: list[int], long_clip: Path):
    assert numbers(long_clip, indices) == indices


def test_a_seek_saves_decoding(long_clip: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []
    number = Timeline.number
    monkeypatch.setattr(Timeline, "number", lambda *args: drawn.append(number(*args)) or drawn[-1])
    assert numbers(long_clip, [10, 250]) == [10, 250]
    assert len(drawn) < 50


def test_a_seek_that_lands_elsewhere_falls_back_to_the_beginning(long_clip: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowvram.media.video._seek", lambda *_: None)
    assert numbers(long_clip, [10, 100, 250, 251]) == [10, 100, 250, 251]


def test_a_transport_stream_is_sought_exactly_too(tmp_path: Path):
    assert numbers(write_video(tmp_path / "long.ts", count(200), options=REORDERED), [3, 150, 199]) == [3, 150, 199]


@given(st.lists(st.integers(1, 500), unique=True), st.lists(st.integers(0, 500)))
def test_runs_cover_the_wanted_indices_from_keys_before_them(keys: list[int], wanted: list[int]):
    keys, wanted = sorted([0, *keys]), sorted(wanted)
    runs = Timeline(501, np.arange(501), keys).runs(wanted)
    assert [index for _, run in runs for index in run] == wanted
    for (start, run), (_, before) in zip(runs, [(0, [0]), *runs], strict=False):
        assert start in keys
        assert start <= run[0]
        assert start == 0 or start - before[-1] > SEEK_OVER_FRAMES


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_a_variable_rate_counts_frames_as_they_are(name: str, tmp_path: Path):
    path = write_video(tmp_path / name, count(8), ticks=[0, 1, 2, 3, 20, 21, 60, 79], options={"bf": "0"})
    assert numbers(path) == list(range(8))
    assert measure(path).fps == pytest.approx(8 / (80 / 25), rel=0.02)


@pytest.mark.parametrize(("name", "codec"), [("short.flv", "flv1"), ("short.wmv", "wmv2")])
def test_a_short_clip_without_durations_keeps_its_stated_rate(name: str, codec: str, tmp_path: Path):
    assert measure(write_video(tmp_path / name, count(12), codec)).fps == 25.0


def test_a_clip_that_states_no_rate_has_that_of_its_timestamps(tmp_path: Path):
    """ASF does not, of a single frame."""
    assert measure(write_video(tmp_path / "clip.wmv", count(1), "mpeg4", fps=10)).fps == pytest.approx(10)


def test_a_clip_that_begins_late_begins_with_frame_0(tmp_path: Path):
    assert numbers(write_video(tmp_path / "late.mkv", count(5), ticks=[50, 51, 52, 53, 54])) == list(range(5))


def test_a_clip_of_one_frame_is_a_clip(tmp_path: Path):
    path = write_video(tmp_path / "one.mp4", [numbered_frame(77)])
    assert measure(path).frame_count == 1
    assert numbers(path, [0, 0, 0]) == [77, 77, 77]


def test_a_repeated_index_is_decoded_once(tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", count(3))
    with open_stored(path, LIMITS) as stored:
        first, second = open_clip(stored, LIMITS).frames([1, 1])
    assert first is second


def test_indices_that_fall_are_our_own_mistake(tmp_path: Path):
    video = measure(write_video(tmp_path / "clip.mp4", count(3)))
    for indices in ([1, 0], [3], [-1]):
        with pytest.raises(AssertionError):
            video.frames(indices)


def test_odd_sizes_keep_every_pixel(tmp_path: Path):
    frame = numbered_frame(0b10101010, 63, 47)
    video = measure(write_video(tmp_path / "odd.mkv", [frame], "ffv1", pix_fmt="bgr0"))
    assert (video.width, video.height) == (63, 47)
    with open_stored(tmp_path / "odd.mkv", LIMITS) as stored:
        assert np.array_equal(next(open_clip(stored, LIMITS).frames([0])), frame)


def test_a_size_that_changes_midway_is_scaled_to_the_first(tmp_path: Path):
    small = write_video(tmp_path / "small.avi", [numbered_frame(1)], "mjpeg", pix_fmt="yuvj420p")
    large = write_video(tmp_path / "large.avi", [numbered_frame(2, 128, 96)] * 2, "mjpeg", pix_fmt="yuvj420p")
    with av.open(str(small)) as one, av.open(str(large)) as two, av.open(str(tmp_path / "both.avi"), "w") as both:
        stream = both.add_stream_from_template(one.streams.video[0])
        for number, packet in enumerate([next(one.demux(video=0)), *two.demux(video=0)][:3]):
            packet.pts = packet.dts = number
            packet.stream = stream
            both.mux(packet)
    with open_stored(tmp_path / "both.avi", LIMITS) as stored:
        frames = list(open_clip(stored, LIMITS).frames([0, 1, 2]))
    assert [number_in(frame) for frame in frames] == [1, 2, 2]
    assert {frame.shape for frame in frames} == {(48, 64, 3)}


def test_10_bits_become_8(tmp_path: Path):
    path = write_video(tmp_path / "deep.mkv", [np.full((48, 64, 3), 128, np.uint8)], "ffv1", pix_fmt="yuv420p10le")
    with open_stored(path, LIMITS) as stored:
        frame = next(open_clip(stored, LIMITS).frames([0]))
    assert frame.dtype == np.uint8
    assert abs(frame.astype(int) - 128).max() <= 2


def test_grey_is_three_equal_channels(tmp_path: Path):
    path = write_video(tmp_path / "grey.mkv", [numbered_frame(77)], "ffv1", pix_fmt="gray")
    assert numbers(path) == [77]


def test_transparency_lies_on_white(tmp_path: Path):
    frame = np.zeros((48, 64, 4), np.uint8)
    frame[:, 32:, 3] = 255
    path = write_video(tmp_path / "cutout.mov", [frame], "png", pix_fmt="rgba")
    with open_stored(path, LIMITS) as stored:
        shown = next(open_clip(stored, LIMITS).frames([0]))
    assert (shown[:, :32] == 255).all() and (shown[:, 32:] == 0).all()


def rotated(path: Path, matrix: list[int]) -> Path:
    """Write a, b, c, d (16.16 fixed point) into the track header of an MP4 (ISO 14496-12, 8.3.2: 40 bytes in)."""
    content = path.read_bytes()
    a, b, c, d = (value.to_bytes(4, "big", signed=True) for value in np.multiply(matrix, 1 << 16).tolist())
    at = content.index(b"tkhd") + 4 + 40
    path.write_bytes(content[:at] + a + b + bytes(4) + c + d + content[at + 20 :])
    return path


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ([1, 0, 0, 1], QUADRANTS),
        ([0, 1, -1, 0], np.rot90(QUADRANTS, -1)),
        ([-1, 0, 0, -1], np.rot90(QUADRANTS, 2)),
        ([0, -1, 1, 0], np.rot90(QUADRANTS)),
        ([-1, 0, 0, 1], QUADRANTS[:, ::-1]),
        ([0, 1, 1, 0], QUADRANTS.swapaxes(0, 1)),
    ],
)
def test_a_rotation_flag_turns_the_picture(matrix: list[int], shown: np.ndarray, tmp_path: Path):
    path = write_video(tmp_path / "phone.mp4", [QUADRANTS.repeat(24, 0).repeat(32, 1)])
    with open_stored(rotated(path, matrix), LIMITS) as stored:
        video = open_clip(stored, LIMITS)
        frame = next(video.frames([0]))
    assert (video.height, video.width) == frame.shape[:2] == ((48, 64) if matrix[0] else (64, 48))
    centres = frame[video.height // 4 :: video.height // 2, video.width // 4 :: video.width // 2]
    assert abs(centres.astype(int) - shown).max() < 40


def test_a_slanted_matrix_is_taken_for_the_nearest_right_angle():
    pixels = QUADRANTS.copy()
    assert np.array_equal(upright(pixels, [60_000, 20_000, 0, -20_000, 60_000, 0, 0, 0, 1 << 30]), pixels)


def test_hidden_frames_of_vp8_are_not_counted(tmp_path: Path):
    path = write_video(tmp_path / "seen.webm", count(12), "libvpx", options={"deadline": "realtime"})
    with av.open(str(path)) as source, av.open(str(tmp_path / "hidden.webm"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                frame = bytearray(bytes(packet))
                frame[0] &= ~0x10 if number == 6 else 0xFF
                hidden = av.Packet(bytes(frame))
                hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
                hidden.is_keyframe, hidden.stream = packet.is_keyframe, stream
                target.mux(hidden)
    assert numbers(tmp_path / "hidden.webm") == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]


def test_a_torn_clip_has_the_frames_that_are_there(tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", count(100), options={"bf": "0"}, muxing={"movflags": "+faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    seen = numbers(path)
    assert 10 < len(seen) < 100
    assert seen == list(range(len(seen)))


def test_damage_in_the_middle_leaves_the_rest_in_place(tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", count(100), options={"g": "10", "bf": "0"})
    content = path.read_bytes()
    begin = content.index(b"mdat") + 4 + (content.index(b"moov") - content.index(b"mdat")) // 2
    path.write_bytes(content[:begin] + b"\xff" * 60 + content[begin + 60 :])
    seen = numbers(path)
    assert len(seen) == 100
    assert seen[:30] == list(range(30)) and seen[-30:] == list(range(70, 100))


def test_a_clip_without_a_frame_that_decodes_has_0_frames(tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", count(3))
    content = path.read_bytes()
    begin, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    path.write_bytes(content[:begin] + bytes(end - begin) + content[end:])
    with pytest.raises(MediaError, match=r"clip.mp4 is a video of 0 frames"):
        measure(path)


def test_frames_above_the_limit_are_refused(tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", count(2))
    with open_stored(path, LIMITS) as stored, pytest.raises(MediaError, match="64 x 48 pixels") as caught:
        open_clip(stored, Limits(max_source_pixels=64 * 48 - 1))
    assert caught.value.limit == "max_source_pixels"


def test_a_clip_knows_whether_it_has_sound(tmp_path: Path):
    assert measure(write_video(tmp_path / "talk.mp4", count(5), sound=sine(48_000))).has_sound
    assert not measure(write_video(tmp_path / "empty.mp4", count(5), sound=np.empty(0, np.float32))).has_sound
    assert not measure(write_video(tmp_path / "silent.mp4", count(5))).has_sound


def test_memory_does_not_grow_with_the_clip(tmp_path: Path):
    frame_bytes = 320 * 240 * 3
    frames = [np.full((240, 320, 3), shade, np.uint8) for shade in range(100)]
    path = write_video(tmp_path / "clip.mp4", frames, options={"preset": "ultrafast"})
    with open_stored(path, LIMITS) as stored:
        video = open_clip(stored, LIMITS)
        tracemalloc.start()
        assert sum(1 for _ in video.frames(range(100))) == 100
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 4 * frame_bytes + 1_000_000
