from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
import soxr
from hypothesis import given
from hypothesis import strategies as st
from media_files import sine

from lowvram.media.sound import cut, mono_blocks, resample, resampled_length, to_mono

RATE_HZ = 1000
"""One sample is one millisecond."""

ROUNDING = {"u8": 2**-7, "s16": 2**-15, "s32": 2**-23, "flt": 0, "dbl": 0}
"""What each sample format may cost a value in -1..1."""


def frame(samples: np.ndarray, start_ms: int | None = 0, rate_hz: int = RATE_HZ, layout: str = "mono") -> av.AudioFrame:
    made = av.AudioFrame.from_ndarray(np.atleast_2d(samples).astype(np.float32), format="fltp", layout=layout)
    made.sample_rate, made.pts, made.time_base = rate_hz, start_ms, Fraction(1, 1000)
    return made


def heard(starts_ms: Sequence[int | None], origin_s: float | None) -> list[float]:
    """What becomes of 100 ms frames of 1, 2, 3, ... that start at these times."""
    frames = [frame(np.full(100, number), start_ms) for number, start_ms in enumerate(starts_ms, 1)]
    return np.concatenate(list(mono_blocks(frames, RATE_HZ, origin_s))).tolist()


@pytest.mark.parametrize("planar", ["", "p"])
@pytest.mark.parametrize("sample_format", ROUNDING)
def test_every_sample_format_has_full_scale_at_1(sample_format: str, planar: str):
    channels = np.stack([sine(48_000, 0.01), 0.25 * sine(48_000, 0.01)])
    resampler = av.AudioResampler(sample_format + planar, "stereo")
    (converted,) = resampler.resample(frame(channels, rate_hz=48_000, layout="stereo"))
    assert converted.format.name == sample_format + planar
    assert np.abs(to_mono(converted) - channels.mean(axis=0)).max() <= ROUNDING[sample_format]


@pytest.mark.parametrize("sample_format", ["flt", "fltp"])
@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1", "7.1", "hexadecagonal"])
def test_channels_are_averaged(layout: str, sample_format: str):
    channels = np.arange(av.AudioLayout(layout).nb_channels, dtype=np.float32)
    interleaved = av.AudioFrame.from_ndarray(np.tile(channels, 5)[None], format="flt", layout=layout)
    interleaved.sample_rate = RATE_HZ
    converted = av.AudioResampler(sample_format).resample(interleaved)
    assert np.concatenate(list(mono_blocks(converted, RATE_HZ))).tolist() == [channels.mean()] * 5


def test_sound_without_a_picture_ignores_its_timestamps():
    assert heard([5000, 9000], origin_s=None) == [1] * 100 + [2] * 100


def test_sound_on_time_is_left_alone():
    assert heard([2000, 2100], origin_s=2.0) == [1] * 100 + [2] * 100


def test_late_sound_begins_with_silence():
    assert heard([4020, 4120], origin_s=2.0) == [0] * 2020 + [1] * 100 + [2] * 100


def test_early_sound_loses_what_comes_before_the_picture():
    assert heard([1850, 1950, 2050], origin_s=2.0) == [2] * 50 + [3] * 100


@pytest.mark.parametrize("offset_ms", [-39, 39])
def test_an_offset_below_one_audio_token_is_left_alone(offset_ms: int):
    assert heard([offset_ms, offset_ms + 100], origin_s=0.0) == [1] * 100 + [2] * 100


def test_a_gap_is_silent():
    assert heard([0, 100, 260], origin_s=0.0) == [1] * 100 + [2] * 100 + [0] * 60 + [3] * 100


def test_frames_that_overlap_follow_one_another():
    assert heard([0, 50], origin_s=0.0) == [1] * 100 + [2] * 100


def test_frames_without_a_timestamp_follow_one_another():
    assert heard([None, None], origin_s=0.0) == [1] * 100 + [2] * 100


def test_a_rate_that_changes_midway_is_brought_to_the_first():
    frames = [frame(np.ones(100)), frame(np.ones(400), rate_hz=4000), frame(np.ones(100))]
    blocks = list(mono_blocks(frames, RATE_HZ))
    assert sum(map(len, blocks)) == pytest.approx(300, abs=1)
    assert np.concatenate(blocks)[120:180] == pytest.approx(1, abs=1e-3)


@given(st.lists(st.integers(0, 50)), st.none() | st.integers(0, 300), st.none() | st.integers(0, 300))
def test_a_cut_of_blocks_is_the_cut_of_the_whole(lengths: list[int], first: int | None, last: int | None):
    whole = np.arange(sum(lengths))
    blocks = np.split(whole, np.cumsum(lengths))
    start_s, end_s = (None if at is None else at / RATE_HZ for at in (first, last))
    assert [sample for block in cut(blocks, RATE_HZ, start_s, end_s) for sample in block] == whole[first:last].tolist()


def test_a_cut_stops_reading_at_its_end():
    blocks = iter([np.ones(100), np.ones(100), np.ones(100)])
    list(cut(blocks, RATE_HZ, None, 0.1))
    assert len(list(blocks)) == 1


@pytest.mark.parametrize("rate_hz", [8000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampled_blocks_equal_the_whole_resampled(rate_hz: int):
    whole = np.random.default_rng(0).standard_normal(rate_hz + 123).astype(np.float32)
    streamed = np.concatenate(list(resample(np.array_split(whole, 17), rate_hz)))
    at_once = soxr.resample(whole, rate_hz, 16_000, quality="HQ")
    assert len(streamed) == resampled_length(len(whole), rate_hz)
    assert np.array_equal(streamed[: len(at_once)], at_once[: len(streamed)])


@given(st.integers(0, 300), st.sampled_from([8000, 44_100, 96_000]))
def test_a_resampled_length_is_exact_for_the_shortest_sounds(samples: int, rate_hz: int):
    made = sum(map(len, resample([np.zeros(samples, np.float32)], rate_hz)))
    assert made == resampled_length(samples, rate_hz) == -(-samples * 16_000 // rate_hz)


def test_16_khz_is_not_touched():
    block = sine(16_000)
    assert next(resample([block], 16_000)) is block
