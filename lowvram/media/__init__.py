"""Media as people have them -> frames, waveform, picture: bytes from anywhere, read by what they are."""

from .medium import (
    SOUND_RATE_HZ,
    Kind,
    Medium,
    Slides,
    Video,
    measure_sound,
    open_medium,
    open_video,
    read_image,
    read_sound,
)

__all__ = [
    "SOUND_RATE_HZ",
    "Kind",
    "Medium",
    "Slides",
    "Video",
    "measure_sound",
    "open_medium",
    "open_video",
    "read_image",
    "read_sound",
]
