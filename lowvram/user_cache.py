"""Where this package keeps on the user's disk what it makes itself: the demo model, and the kernel it compiled."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """This package's folder in the user's cache (XDG_CACHE_HOME, LOCALAPPDATA or ~/.cache); it need not be there."""
    root = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(root) if root else Path.home() / ".cache") / "lowvram"
