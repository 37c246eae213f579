"""Media with known contents for tests: frames that carry their own number, tones of known pitch."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BARS = 8
"""A frame carries its number (0-255) as eight black or white bars: legible after any codec."""


def numbered_frame(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    bits = np.unpackbits(np.array([number], np.uint8)) * 255
    row = bits[np.arange(width) * BARS // width]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def number_in(frame: np.ndarray) -> int:
    bars = np.array_split(frame.mean(axis=(0, 2)), BARS)
    return int(np.packbits([bar.mean() > 127 for bar in bars])[0])


def sine(rate_hz: int, seconds: float = 1.0, pitch_hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch_hz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "libx264",
    *,
    fps: int = 25,
    ticks: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
    sound: np.ndarray | None = None,
    sound_codec: str = "aac",
    sound_start_s: float = 0.0,
    sound_gap_s: float = 0.0,
) -> Path:
    """Encode `frames` at `ticks` / fps seconds (default: one after the other), with a 48 kHz mono sound if given.

    `sound_gap_s` is a hole in the sound's timestamps, half-way through.
    """
    with av.open(str(path), "w", options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"threads": "1", **(options or {})})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, fps)
        audio = container.add_stream(sound_codec, rate=48_000, layout="mono") if sound is not None else None
        for tick, frame in zip(ticks or range(len(frames)), frames, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[2] == 4 else "rgb24")
            picture.pts, picture.time_base = tick, Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        if audio is not None and sound is not None:
            _encode(container, audio, sound[None], 48_000, sound_start_s, sound_gap_s)
    return path


def write_sound(
    path: Path, channels: np.ndarray, rate_hz: int, codec: str, layout: str = "mono", *, file_format: str | None = None
) -> Path:
    """Encode float32 `channels` [C, S]."""
    with av.open(str(path), "w", format=file_format) as container:
        _encode(container, container.add_stream(codec, rate=rate_hz, layout=layout), channels, rate_hz)
    return path


def _encode(
    container: av.container.OutputContainer,
    stream: av.AudioStream,
    channels: np.ndarray,
    rate_hz: int,
    start_s: float = 0.0,
    gap_s: float = 0.0,
) -> None:
    if not channels.size:
        return container.mux(stream.encode(None))
    stream.bit_rate = 192_000 * len(channels)
    layout = stream.codec_context.layout
    interleaved = np.ascontiguousarray(channels.T, np.float32).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
    packer = av.AudioResampler(stream.format, layout, rate_hz, frame_size=stream.frame_size or 960)
    for piece in [*packer.resample(frame), *packer.resample(None)]:
        late_s = start_s + (gap_s if piece.pts >= channels.shape[1] / 2 else 0)
        piece.pts += round(late_s * rate_hz)
        container.mux(stream.encode(piece))
    container.mux(stream.encode(None))
