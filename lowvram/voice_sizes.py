"""A checkpoint's spk_dict.pt -> how long its longest voice is, read without torch and without reading any voice.

torch saves a zip whose pickle names each tensor's storage, size and strides; the numbers lie in other members. Here the
pickle is read by a reader that knows nothing but sizes, and can make nothing else.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from .checkpoint import SPEAKERS_FILE

MOST_PICKLE_BYTES = 1_000_000
"""Two voices take about 700 bytes."""

UNREADABLE = (
    OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, BadZipFile,
    pickle.UnpicklingError,
)  # fmt: skip
"""What zips and pickles fail with. `checkpoint.load_speakers` will say what is wrong with the file."""


def longest_voice_frames(folder: Path | None) -> int:
    """Mel frames (10 ms each) of the longest voice's sample; 0 where there are no voices, or none that can be read."""
    if folder is None:
        return 0
    try:
        with ZipFile(folder / SPEAKERS_FILE) as saved:
            voices = _read_sizes(saved)
        return max((int(voice["ref_mel"][1]) for voice in voices.values()), default=0)
    except UNREADABLE:
        return 0


def _read_sizes(saved: ZipFile) -> Mapping[str, Mapping[str, Any]]:
    """What was saved, with its size in place of every tensor."""
    name = next((name for name in saved.namelist() if name.endswith("/data.pkl")), "data.pkl")
    if saved.getinfo(name).file_size > MOST_PICKLE_BYTES:
        raise ValueError(f"{name} has {saved.getinfo(name).file_size:,} bytes")
    with saved.open(name) as pickled:
        voices: Mapping[str, Mapping[str, Any]] = _SizeReader(pickled).load()
    return voices


class _SizeReader(pickle.Unpickler):
    """Makes plain values, and of a tensor its size."""

    def persistent_load(self, pid: Any) -> None:
        """A storage, of which nothing is wanted."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        match module, name:
            case "torch._utils", "_rebuild_tensor_v2":
                return _size
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch", _ if name.endswith("Storage"):
                return _size  # named by a storage's description, never called
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a voice")


def _size(storage: None, offset: int, size: tuple[int, ...], *_: Any) -> tuple[int, ...]:
    return size
