"""Where this package keeps on the user's disk what it makes itself: the demo model, and the kernel it compiled."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import LowVRAMError


def user_cache() -> Path:
    """This package's folder in the user's cache (XDG_CACHE_HOME, LOCALAPPDATA or ~/.cache); it need not be there.

    Raises LowVRAMError for a user without a home folder. A shared one would not do: code is kept there.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "lowvram"
    except RuntimeError as error:
        raise LowVRAMError(f"no folder to keep files in: {error}", hint="set XDG_CACHE_HOME to one of yours") from error
