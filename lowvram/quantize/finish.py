"""Written shards -> a checkpoint: the source's other files, the index, the report, and config.json last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import TensorHeader
from ..checkpoint_writer import whole_file, write_index, write_json
from ..quant.recipe import LINEARS, compressed_config, quantization_config
from ..quant.storage import Storage
from .layout import layer_prefix
from .options import QuantizeOptions, QuantizeReport
from .parts import HEAD_PART, Part, any_layer

REPORT_FILE = "quantize_report.json"

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".gguf", ".onnx", ".index.json")
"""Weights of the source in any format: they would contradict the new ones."""


def finish_checkpoint(
    source: Path,
    target: Path,
    shards: Mapping[str, Mapping[str, TensorHeader]],
    report: QuantizeReport,
    config: Mapping[str, Any],
) -> None:
    """Write all but the `shards` (file name -> its tensors), which are in the folder `target` by now."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != "config.json" and not path.name.endswith(WEIGHT_SUFFIXES):
            with open(path, "rb") as original, whole_file(target / path.name) as copy:
                shutil.copyfileobj(original, copy)
    write_index(target, shards)
    write_json(target / REPORT_FILE, report.to_json())
    write_json(target / "config.json", config)


def quantized_config(
    published: dict[str, Any], options: QuantizeOptions, thinker: Storage, parts: Sequence[Part]
) -> dict[str, Any]:
    """config.json of the new checkpoint, made of the published one."""
    if any(part.name == HEAD_PART for part in parts):  # no longer the embedding table, where it was that
        for place in _places_of_tying(published):
            place["tie_word_embeddings"] = False
    return published | {"quantization_config": _entry(options, thinker, parts)}


def _entry(options: QuantizeOptions, thinker: Storage, parts: Sequence[Part]) -> dict[str, object]:
    if options.follows_the_recipe:
        return quantization_config(options.group_size)
    paths = {thinker: [any_layer(layer_prefix(0) + path) for path in LINEARS]}
    for part in parts:
        paths.setdefault(part.storage, []).extend(part.paths)
    return compressed_config(paths)


def _places_of_tying(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Wherever a config says that the output head is the embedding table."""
    thinker = config.get("thinker_config", {})
    places = (config, thinker, thinker.get("text_config", {}))
    return [place for place in places if place.get("tie_word_embeddings")]
