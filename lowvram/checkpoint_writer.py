"""Tensors -> a checkpoint's files: safetensors shards written piece by piece, and their index.

A file appears under its name whole or not at all, so that whatever is there after a stop can be kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .checkpoint import INDEX_FILE, TensorEntry, TensorHeader, TensorReader

MAX_SHARD_BYTES = 5_000_000_000

PIECE_BYTES = 16 * 1024**2
"""How much of a tensor is in memory while it is copied."""

HEADER_ALIGNMENT_BYTES = 8

Pieces = Callable[[str], Iterable[memoryview]]
"""A tensor's bytes by its name, in order."""

DTYPE_CODE = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
}
"""safetensors' names of what is written here from memory."""


def shard_name(number: int, total: int) -> str:
    """The published name of shard `number`, counted from 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def divide(tensors: Mapping[str, TensorHeader], max_bytes: int = MAX_SHARD_BYTES) -> list[dict[str, TensorHeader]]:
    """Tensors in their order, cut into shards of at most `max_bytes` (or of one tensor that is larger)."""
    shards: list[dict[str, TensorHeader]] = []
    filled = max_bytes
    for name, header in tensors.items():
        if not shards or filled + header.n_bytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = header
        filled += header.n_bytes
    return shards


def write_shard(path: Path, tensors: Mapping[str, TensorHeader], pieces: Pieces) -> Iterator[int]:
    """Write a safetensors file of `tensors`, in their order, yielding bytes as they are written."""
    with whole_file(path) as out:
        out.write(_header(tensors))
        for name, header in tensors.items():
            written = 0
            for piece in pieces(name):
                out.write(piece)
                written += piece.nbytes
                yield piece.nbytes
            assert written == header.n_bytes, (name, written, header)


def shard_bytes(tensors: Mapping[str, TensorHeader]) -> int:
    """How long the file of these tensors is."""
    return len(_header(tensors)) + sum(header.n_bytes for header in tensors.values())


def write_index(folder: Path, shards: Mapping[str, Mapping[str, TensorHeader]]) -> None:
    """Write the index of `shards` (file name -> its tensors)."""
    total_bytes = sum(header.n_bytes for tensors in shards.values() for header in tensors.values())
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    with whole_file(path) as out:
        out.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def stored_pieces(reader: TensorReader, entry: TensorEntry) -> Iterator[memoryview]:
    """A stored tensor's bytes; each piece is good until the next one. Raises CheckpointError if it cannot be read."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, entry.n_bytes)))
    for start in range(0, entry.n_bytes, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, entry.n_bytes - start)]
        reader.read_into(entry, piece, start)
        yield piece


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor."""
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def header_of(tensor: Tensor) -> TensorHeader:
    """How a tensor is written."""
    return TensorHeader(DTYPE_CODE[tensor.dtype], tuple(tensor.shape))


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when all of it is on the disk."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, path)


def _header(tensors: Mapping[str, TensorHeader]) -> bytes:
    """Its own length, then JSON padded so that the first tensor begins on 8 bytes."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, header in tensors.items():
        start, end = end, end + header.n_bytes
        fields[name] = {"dtype": header.dtype, "shape": header.shape, "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text
