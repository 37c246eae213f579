"""The checkpoint that a run reads: whether it can be quantized, what tells it from others, and what it is called."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..checkpoint import DEMO, Checkpoint, TensorReader, read_config
from ..errors import CheckpointError, OptionError

SAMPLED_BYTES = 4096
"""Of each tensor, by which a checkpoint is known again: training leaves hardly any of them as they were."""


def refuse_demo(source: str | Path) -> None:
    """Raise OptionError for the built-in demo by its name, which is no folder here and nobody's on the hub."""
    if source == DEMO and not Path(DEMO).is_dir():
        raise OptionError("the demo is in 4 bits already", hint="lowvram demo-model DIR --16bit writes one to quantize")


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a checkpoint that is not in 16 bit any more."""
    if checkpoint.quantization:
        method = checkpoint.quantization.get("quant_method", "a method without a name")
        bits = checkpoint.quantization.get("bits")
        raise CheckpointError(
            f"{checkpoint.name} is quantized already, by {method}" + (f" in {bits} bits" if bits else ""),
            path=str(checkpoint.folder),
            hint="name the 16-bit checkpoint that it was made from",
        )


def published_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Its config.json, read anew: the modelling library writes into what it is given."""
    return read_config(checkpoint.folder / "config.json", checkpoint.name)


def fingerprint(checkpoint: Checkpoint, reader: TensorReader) -> str:
    """Of its config, its headers and the beginning of each tensor."""
    entries = checkpoint.tensors.values()
    headers = [(e.name, e.dtype, e.shape, e.path.name, e.offset, e.file_bytes) for e in entries]
    told = hashlib.sha256(json.dumps([published_config(checkpoint), headers], sort_keys=True).encode())
    for entry in entries:
        beginning = memoryview(bytearray(min(SAMPLED_BYTES, entry.n_bytes)))
        reader.read_into(entry, beginning)
        told.update(beginning)
    return told.hexdigest()[:16]


def name_only(source: str) -> str:
    """A file or folder without where it lies, which is nobody else's business; a hub id as it is."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source
