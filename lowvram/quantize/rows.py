"""Calibration samples as rows in a file between two layers, and as chunks on the device inside one.

Only files grow with the number of samples. Plain reads and writes: pages of a mapping would count as this process's
memory, while the system keeps as much of a file in memory as it can spare.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.layer import Chunk, Parameters, run_layer

CHUNK_TOKENS = 2048
"""Rows on the device at once: a layer of a 7B then takes 2.1 GiB there (simulated). With twice as many it would take
0.6 GiB more; with half as many, rounding weights for each candidate would take as long as multiplying by them."""

SIXTEEN_BIT, ROUNDED, QUANTIZED = range(3)
"""Held-out rows pass through three models side by side; their tracks lie one after another in a file."""

TRACKS = 3


class RowFile:
    """Rows [n, width] of floats in a file, stored in `dtype`."""

    def __init__(self, path: Path, mode: str, width: int, dtype: torch.dtype) -> None:
        self._file: Any = open(path, mode)  # noqa: SIM115 (closed on leaving)
        self._width = width
        self._dtype = dtype

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, width], float32 on the host."""
        rows = torch.empty(stop - start, self._width, dtype=self._dtype, device="cpu")
        self._file.seek(start * self._row_bytes)
        n_bytes = self._file.readinto(rows.view(torch.uint8).numpy().data)
        assert n_bytes == rows.nbytes, (self._file.name, start, stop, n_bytes)
        return rows.float()

    def write(self, start: int, rows: Tensor) -> None:
        """Put `rows` [n, width], rounded to the file's dtype, at row `start`."""
        stored = rows.to("cpu", self._dtype).contiguous()
        self._file.seek(start * self._row_bytes)
        self._file.write(stored.view(torch.uint8).numpy().data)

    def sync(self) -> None:
        """Return once all that was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def _row_bytes(self) -> int:
        return self._width * self._dtype.itemsize


@dataclass(frozen=True)
class Samples:
    """Samples one after another: how long each is, the positions [3, N] of all, and the model's `rotary` for those."""

    lengths: tuple[int, ...]
    positions: Tensor
    rotary: nn.Module
    device: torch.device

    @property
    def tokens(self) -> int:
        """Rows of all samples."""
        return sum(self.lengths)

    def chunks(self, rows: RowFile, first: int = 0) -> Iterator[tuple[int, Chunk]]:
        """Chunks of samples whose rows begin at row `first` of their file, with the row that each begins at."""
        for start, count, length in self._batches():
            stop = start + count * length
            hidden = rows.read(first + start, first + stop).view(count, length, -1).to(self.device)
            positions = self.positions[:, start:stop].view(3, count, length).to(self.device)
            yield first + start, Chunk(hidden, self.rotary(hidden, positions))

    def _batches(self) -> Iterator[tuple[int, int, int]]:
        """(first row, samples, rows of each) of neighbours of one length, which can be computed together."""
        start = 0
        for length, same in groupby(self.lengths):
            left, together = len(list(same)), max(1, CHUNK_TOKENS // length)
            while left:
                count = min(left, together)
                yield start, count, length
                start, left = start + count * length, left - count


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples before one layer (`rows`) and after it (`next_rows`)."""

    samples: Samples
    layer: nn.Module
    rows: RowFile
    next_rows: RowFile

    def advance(self, track: int, parameters: Parameters | None = None) -> None:
        """Take a track past the layer, with other `parameters` in place of its own if some are given."""
        for start, chunk in self.samples.chunks(self.rows, track * self.samples.tokens):
            self.next_rows.write(start, run_layer(self.layer, chunk, parameters).flatten(0, 1))

    def error(self, parameters: Parameters | None = None) -> float:
        """How far the layer's output is off, see `LayerReport`, once the 16-bit track has advanced."""
        error = added = 0.0
        for start, chunk in self.samples.chunks(self.rows):
            before = chunk.hidden.flatten(0, 1)
            right = self.next_rows.read(start, start + len(before)).to(before.device)
            output = run_layer(self.layer, chunk, parameters).flatten(0, 1)
            error += float((output - right).square_().sum(dtype=torch.float64))
            added += float((right - before).square_().sum(dtype=torch.float64))
        return error / added if added else 0.0
