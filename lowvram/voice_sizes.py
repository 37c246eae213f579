"""A checkpoint's spk_dict.pt -> how long its longest voice is, read without torch and without reading any voice.

torch saves a zip whose pickle names each tensor's storage, size and strides; the numbers lie in other members. Here the
pickle's steps are followed by a reader that knows nothing but sizes, and can make nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickletools import OpcodeInfo, genops
from typing import Any
from zipfile import BadZipFile, ZipFile

from .checkpoint import SPEAKERS_FILE

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
"""What such steps of a pickle put on its stack."""

MOST_PICKLE_BYTES = 1_000_000
"""Two voices take about 700 bytes."""

UNREADABLE = (
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    BadZipFile,
    zlib.error,
)
"""What zips and pickles fail with. `voices.load_speakers` will say what is wrong with the file."""


def longest_voice_frames(folder: Path | None) -> int:
    """Mel frames (10 ms each) of the longest voice's sample; 0 where there are no voices, or none that can be read."""
    if folder is None:
        return 0
    try:
        with ZipFile(folder / SPEAKERS_FILE) as saved:
            voices = _read_sizes(saved)
        return max(map(_frames, voices.values()), default=0)
    except UNREADABLE:
        return 0


def _frames(voice: Mapping[str, Any]) -> int:
    frames = voice["ref_mel"][1]
    if not isinstance(frames, int) or frames < 0:
        raise ValueError("a voice's length is no number")
    return frames


def _read_sizes(saved: ZipFile) -> Any:
    """What was saved, with its size in place of every tensor."""
    name = next((name for name in saved.namelist() if name.endswith("/data.pkl")), "data.pkl")
    if saved.getinfo(name).file_size > MOST_PICKLE_BYTES:
        raise ValueError(f"{name} has {saved.getinfo(name).file_size:,} bytes")
    return _follow(genops(saved.read(name)))


def _follow(steps: Iterable[tuple[OpcodeInfo, Any, int | None]]) -> Any:
    """Do what a pickle's steps say, as far as torch writes such for a dictionary of tensors. Words alone are keys, and
    what is not known here fails: nothing can run, nor take more memory or time than the pickle is long."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for opcode, value, _ in steps:
        match opcode.name:
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "GLOBAL":
                stack.append(value)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "TUPLE":
                mark = marks.pop()
                stack[mark:] = [tuple(stack[mark:])]
            case "SETITEM":
                _add(stack[-3], stack[-2:])
                del stack[-2:]
            case "SETITEMS":
                mark = marks.pop()
                _add(stack[mark - 1], stack[mark:])
                del stack[mark:]
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "BINPERSID":
                stack[-1] = None  # a storage, of which nothing is wanted
            case "REDUCE":
                arguments, what = stack.pop(), stack.pop()
                stack.append(_made(what, arguments))
            case "STOP":
                return stack.pop()
            case name if name != "PROTO":
                raise ValueError(f"{name} is no part of a voice")
    raise EOFError("the pickle ends without saying so")


def _add(target: dict[str, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise TypeError(f"a {type(key).__name__} names no voice")
        target[key] = value


def _made(what: str, arguments: tuple[Any, ...]) -> Any:
    """Of a tensor its size."""
    match what:
        case "torch._utils _rebuild_tensor_v2":
            return arguments[2]
        case "collections OrderedDict":
            return {}
    raise ValueError("what is made is no part of a voice")  # nor named: words for it can be longer than any memory
