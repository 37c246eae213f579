"""Media with known contents, made on the spot: pictures, sounds, clips."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def noise_picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chirp(seconds: float, seed: int) -> np.ndarray:
    """A rising tone in noise, float32 at 16 kHz."""
    time_s = np.arange(int(seconds * 16_000)) / 16_000
    noise = np.random.default_rng(seed).normal(0, 0.05, len(time_s))
    return (0.4 * np.sin(2 * np.pi * (200 + 300 * time_s) * time_s) + noise).astype(np.float32)


def write_clip(path: Path, sound: bool) -> None:
    with av.open(str(path), "w") as out:
        picture = out.add_stream("mjpeg", rate=4, width=192, height=144, pix_fmt="yuvj420p")
        voice = out.add_stream("pcm_s16le", rate=16_000, layout="mono") if sound else None
        for index in range(12):
            frame = av.VideoFrame.from_ndarray(noise_picture(144, 192, index), format="rgb24")
            out.mux(picture.encode(frame))
        out.mux(picture.encode())
        if voice:
            samples = (chirp(3.0, 9) * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = 16_000
            out.mux(voice.encode(frame))
            out.mux(voice.encode())
