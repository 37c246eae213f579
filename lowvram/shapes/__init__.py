"""The published checkpoints' configs and tensor headers, shipped with the package: a model id -> `Headers`, no network.

Derived, not copied: names and shapes are the reference's own modules at the sizes of the published configs, as
`demo` stores them, and were never compared with the real files. The talker of the 3B is taken to have the shape of
Qwen2.5-0.5B. tests/test_shapes.py derives them and, run as a script, writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files

from ..checkpoint import Headers, TensorHeader

FILES = {
    "Qwen/Qwen2.5-Omni-7B-AWQ": "7b-awq.json",
    "Qwen/Qwen2.5-Omni-7B": "7b.json",
    "Qwen/Qwen2.5-Omni-3B": "3b.json",
}

ORIGIN = "shapes shipped with lowvram, not compared with the published files"

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def shipped_headers(model_id: str) -> Headers | None:
    """The headers of a published model, or None for one that is not known here."""
    if model_id not in FILES:
        return None
    shape = json.loads((files(__package__) / FILES[model_id]).read_text(encoding="utf-8"))
    tensors = {
        name: TensorHeader(dtype, tuple(sides))
        for pattern, (dtype, sides) in shape["tensors"].items()
        for name in expand(pattern)
    }
    return Headers(model_id, shape["config"], tensors, None, ORIGIN)


def expand(pattern: str) -> Iterator[str]:
    """All names that a pattern stands for: `layers.{0..27}.norm` is 28 of them, each range counts on its own."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    for number in range(int(found[1]), int(found[2]) + 1):
        yield from expand(f"{pattern[: found.start()]}{number}{pattern[found.end() :]}")
