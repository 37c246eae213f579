"""The shipped shapes equal what the demo's rules make of the published sizes. As a script, writes them anew:

PYTHONPATH=. python tests/test_shapes.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from lowvram import shapes
from lowvram.checkpoint import TensorHeader
from lowvram.demo.config import DemoSize, omni_config
from lowvram.offload.footprint import read_footprint
from lowvram.shapes import expand, shipped_headers

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from synthetic import SHAPES

IDS = dict(zip(SHAPES, ("Qwen/Qwen2.5-Omni-7B-AWQ", "Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen2.5-Omni-3B"), strict=True))
USER_ID = 872
"""The published tokenizer's token "user"."""

NUMBER = re.compile(r"(?<=\.)(\d+|\{\d+\.\.\d+\})(?=\.)")


def derive(size: DemoSize, quantized: bool, dtype: str) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    """Config and headers that the demo's rules make of a size."""
    from lowvram.demo.weights import STORED_AS, stored_tensors

    config = omni_config(size, user_id=USER_ID, quantized=quantized, dtype=dtype)
    stored = stored_tensors(deepcopy(config), size, STORED_AS[dtype])  # the library writes into what it parses
    return config, {tensor.name: TensorHeader(tensor.dtype, tensor.shape) for tensor in stored}


def fold(headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Headers by pattern: names that differ in one number alone become one with a range, place after place."""
    folded = dict(headers)
    for place in range(max(len(NUMBER.findall(name)) for name in headers)):
        folded = _fold_at(folded, place)
    return folded


def _fold_at(headers: Mapping[str, TensorHeader], place: int) -> dict[str, TensorHeader]:
    folded: dict[str, TensorHeader] = {}
    alike: dict[tuple[str, str, TensorHeader], list[int]] = {}
    for name, header in headers.items():
        parts = NUMBER.split(name)
        number = parts[2 * place + 1] if 2 * place + 1 < len(parts) else ""
        if number:
            around = "".join(parts[: 2 * place + 1]), "".join(parts[2 * place + 2 :])
            alike.setdefault((*around, header), []).append(int(number))
        else:
            folded[name] = header
    for (before, after, header), numbers in alike.items():
        for first, last in _runs(numbers):
            number = str(first) if first == last else f"{{{first}..{last}}}"
            folded[before + number + after] = header
    return folded


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    starts = [number for number in numbers if number - 1 not in numbers]
    stops = [number for number in numbers if number + 1 not in numbers]
    return list(zip(starts, stops, strict=True))


def write() -> None:
    folder = Path(shapes.__file__).parent
    for name, made in SHAPES.items():
        config, headers = derive(*made)
        lines = [f'  "{pattern}": ["{h.dtype}", {list(h.shape)}]' for pattern, h in sorted(fold(headers).items())]
        tensors = ",\n".join(lines)
        text = f'{{"config": {json.dumps(config)},\n "tensors": {{\n{tensors}\n }}}}\n'
        (folder / shapes.FILES[IDS[name]]).write_text(text, encoding="utf-8", newline="\n")


@pytest.mark.parametrize("name", SHAPES)
def test_a_shipped_shape_is_what_the_full_size_demo_writes(name: str):
    config, headers = derive(*SHAPES[name])
    shipped = shipped_headers(IDS[name])
    assert shipped is not None
    assert (shipped.config, shipped.tensors) == (config, headers)


def test_the_4_bit_shape_has_the_published_counts_and_sizes():
    """196 quantized linears, 3.16 GiB of thinker layers, and the components of the known sizes."""
    shipped = shipped_headers("Qwen/Qwen2.5-Omni-7B-AWQ")
    assert sum(name.endswith(".qweight") for name in shipped.tensors) == 196
    footprint = read_footprint(shipped.tensors, shipped.config, width_bytes=2)
    gib = {name: round(footprint.component_bytes(name) / 2**30, 2) for name in footprint.components}
    assert gib == {
        "audio_tower": 1.19,
        "visual": 1.26,
        "thinker": 3.16,
        "lm_head": 1.02,
        "talker": 2.46,
        "dit_conditioning": 0.54,
        "dit": 0.71,
        "bigvgan": 0.43,
    }


def test_parameters_of_the_7b_are_the_published_10_7_billion():
    shipped = shipped_headers("Qwen/Qwen2.5-Omni-7B")
    width = {"BF16": 2, "F32": 4}
    parameters = sum(tensor.n_bytes // width[tensor.dtype] for tensor in shipped.tensors.values())
    assert round(parameters / 1e9, 2) == 10.73


def test_a_pattern_with_two_ranges_is_every_pair():
    assert list(expand("a.{0..1}.b.{9..10}.c")) == ["a.0.b.9.c", "a.0.b.10.c", "a.1.b.9.c", "a.1.b.10.c"]


def test_other_models_are_not_shipped():
    assert shipped_headers("owner/omni") is None


def test_shapes_are_read_without_torch():
    code = "import sys, lowvram.shapes as s; s.shipped_headers('Qwen/Qwen2.5-Omni-7B'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


if __name__ == "__main__":
    write()
