"""Sound: decoded frames of any rate, layout and sample format -> 16 kHz mono, block by block.

Channels are averaged, as `librosa.to_mono` does, and resampled by soxr HQ, librosa's default. The stream of blocks
equals resampling the whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import av
import numpy as np
import soxr

SOUND_RATE_HZ = 16_000
"""What the audio tower hears."""

OFFSET_TOLERANCE_S = 0.040
"""One audio token. Sound that is off the clock of its picture by less is left alone: the model cannot place it finer,
and its samples then equal those of the official utilities, which ignore every offset."""


def mono_blocks(frames: Iterable[av.AudioFrame], rate_hz: int, origin_s: float | None = None) -> Iterator[np.ndarray]:
    """Frames as float32 [n] blocks at `rate_hz`.

    With `origin_s`, the time at which the picture begins, sound is put on the picture's clock: what comes before it is
    dropped, and where sound starts late or has a gap, of `OFFSET_TOLERANCE_S` or more, there is silence.
    """
    tolerance = OFFSET_TOLERANCE_S * rate_hz
    position: int | None = None
    for frame in _uniform(frames, rate_hz):
        place = position or 0
        if origin_s is not None and frame.time is not None:
            place = round((frame.time - origin_s) * rate_hz)
        if position is None:
            position = place if place <= -tolerance else 0
        if place - position >= tolerance:
            yield from _silence(place - position, rate_hz)
            position = place
        block = to_mono(frame)
        yield block[max(0, -position) :]
        position += len(block)


def _silence(samples: int, block_samples: int) -> Iterator[np.ndarray]:
    for done in range(0, samples, block_samples):
        yield np.zeros(min(block_samples, samples - done), np.float32)


def _uniform(frames: Iterable[av.AudioFrame], rate_hz: int) -> Iterator[av.AudioFrame]:
    """All frames at one rate, for a track may change its own, and none that PyAV cannot read: of a planar frame of 8
    channels and more, PyAV (18.1) takes one plane too many and crashes, so that these are interleaved."""
    for (planar, channels, frame_rate_hz, *_), run in itertools.groupby(frames, key=_form):
        if frame_rate_hz == rate_hz and not (planar and channels >= 8):
            yield from run
            continue
        first = next(run)
        converter = av.AudioResampler(first.format.packed, rate=rate_hz)
        for frame in itertools.chain([first], run, [None]):
            yield from converter.resample(frame)


def _form(frame: av.AudioFrame) -> tuple[bool, int, int, str, str]:
    return (
        frame.format.is_planar,
        frame.layout.nb_channels,
        frame.sample_rate,
        frame.format.name,
        frame.layout.name,
    )


def to_mono(frame: av.AudioFrame) -> np.ndarray:
    """float32 [n], full scale at 1: the mean of all channels, whatever the sample format."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    return mix(samples)


def mix(samples: np.ndarray) -> np.ndarray:
    """[C, S] of any PCM dtype to float32 [S]: the mean of all channels, full scale at 1. uint8 rests at 128."""
    if samples.dtype.kind == "f":
        return samples.mean(axis=0, dtype=np.float32)
    full_scale = 1 << (8 * samples.itemsize - 1)
    zero = full_scale if samples.dtype.kind == "u" else 0
    return ((samples.mean(axis=0) - zero) / full_scale).astype(np.float32)


def cut(blocks: Iterable[np.ndarray], rate_hz: int, start_s: float | None, end_s: float | None) -> Iterator[np.ndarray]:
    """The samples from round(start x rate) to round(end x rate): cut before resampling, as librosa does."""
    first = round((start_s or 0) * rate_hz)
    last = None if end_s is None else round(end_s * rate_hz)
    position = 0
    for block in blocks:
        if last is not None and position >= last:
            return
        yield block[max(0, first - position) : None if last is None else last - position]
        position += len(block)


def resample(blocks: Iterable[np.ndarray], rate_hz: int) -> Iterator[np.ndarray]:
    """Blocks at 16 kHz, `resampled_length` samples in all."""
    if rate_hz == SOUND_RATE_HZ:
        yield from blocks
        return
    resampler = soxr.ResampleStream(rate_hz, SOUND_RATE_HZ, 1, dtype="float32", quality="HQ")
    native = made = 0
    for block in blocks:
        piece = resampler.resample_chunk(block)
        native, made = native + len(block), made + len(piece)
        yield piece
    tail = resampler.resample_chunk(np.empty(0, np.float32), last=True)
    missing = resampled_length(native, rate_hz) - made
    yield np.pad(tail[:missing], (0, max(0, missing - len(tail))))


def resampled_length(samples: int, rate_hz: int) -> int:
    """ceil(samples x 16000 / rate), librosa's length."""
    return -(-samples * SOUND_RATE_HZ // rate_hz)
