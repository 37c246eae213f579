"""Make clip.mp4: four seconds of a ball that goes round, and a tone that rises and falls with it.

`python examples/make_clip.py [FILE]` writes the same bytes every time on the same build of PyAV.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SECONDS = 4
FPS = 25
WIDTH, HEIGHT = 320, 240
RATE_HZ = 48_000
TURNS_PER_S = 0.5
BALL_PIXELS = 28


def ball_at(time_s: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Where the ball is: right and up, each in -1..1."""
    angle = 2 * np.pi * TURNS_PER_S * np.asarray(time_s)
    return np.sin(angle), np.cos(angle)


def picture(time_s: float) -> np.ndarray:
    """One frame, uint8 [H, W, 3]: a yellow ball over a blue-green sky."""
    right, up = ball_at(time_s)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    frame = np.stack([20 + 0 * x, 60 + 100 * y / HEIGHT, 160 - 80 * x / WIDTH], axis=-1)
    distance = np.hypot(x - WIDTH / 2 - 90 * right, y - HEIGHT / 2 + 75 * up)
    ball = np.clip(BALL_PIXELS - distance, 0, 1)[..., None]
    return (frame * (1 - ball) + np.array([250, 210, 40]) * ball).astype(np.uint8)


def tone() -> np.ndarray:
    """The whole sound, float32 [1, S]: 330 to 660 Hz with the ball's height, fading in and out at the ends."""
    time_s = np.arange(SECONDS * RATE_HZ) / RATE_HZ
    _, up = ball_at(time_s)
    phase = 2 * np.pi * np.cumsum(330 * 2 ** ((up + 1) / 2)) / RATE_HZ
    fade = np.minimum(1, 20 * np.minimum(time_s, SECONDS - time_s))
    return (0.3 * fade * np.sin(phase)).astype(np.float32)[None]


def write_clip(path: Path) -> None:
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as clip:
        video = clip.add_stream(codec, rate=FPS, options={"crf": "23", "threads": "1", "flags": "+bitexact"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = clip.add_stream("aac", rate=RATE_HZ, layout="mono", options={"flags": "+bitexact"})
        audio.bit_rate = 64_000
        for number in range(SECONDS * FPS):
            frame = av.VideoFrame.from_ndarray(picture(number / FPS), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            clip.mux(video.encode(frame))
        clip.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(tone(), format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = RATE_HZ, 0, Fraction(1, RATE_HZ)
        packer = av.AudioResampler("fltp", "mono", RATE_HZ, frame_size=audio.frame_size)
        for piece in [*packer.resample(sound), *packer.resample(None)]:
            clip.mux(audio.encode(piece))
        clip.mux(audio.encode(None))


if __name__ == "__main__":
    write_clip(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("clip.mp4"))
