"""A file that a person chose -> the message part that shows it to the model, by the ending of its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ENDINGS = {
    "video": (".mp4", ".mkv", ".mov", ".webm", ".avi"),
    "audio": (".wav", ".mp3", ".flac", ".ogg", ".m4a"),
    "image": (".jpg", ".jpeg", ".png", ".webp"),
}


def kind_of(path: Path) -> str | None:
    """What the file is called by its ending: video, audio, image, or None."""
    return next((kind for kind, endings in ENDINGS.items() if path.suffix.lower() in endings), None)


def part_of(path: Path) -> dict[str, Any]:
    """The file as a message part. One of an unknown ending is called a video; the runtime says so if it is none."""
    kind = kind_of(path) or "video"
    return {"type": kind, kind: path}
