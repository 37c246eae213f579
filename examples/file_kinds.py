"""How files that hold videos, sounds and pictures are usually called: which of them a person is shown.

What a file really is, the runtime finds out.
"""

from __future__ import annotations

ENDINGS = (
    *(".mp4", ".mkv", ".mov", ".webm", ".avi"),
    *(".wav", ".mp3", ".flac", ".ogg", ".m4a"),
    *(".jpg", ".jpeg", ".png", ".webp"),
)
