"""A file that somebody gave -> its text, or a sentence about why there is none."""

from __future__ import annotations

from pathlib import Path

from lowvram.errors import OptionError


def read_text(path: Path, hint: str) -> str:
    """What stands in the file, in UTF-8. Raises OptionError, with the `hint`, where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} cannot be read: {error}", hint=hint) from error
