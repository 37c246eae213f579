from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lowvram.quantize.rows import CHUNK_TOKENS, QUANTIZED, ROUNDED, SIXTEEN_BIT, HeldOut, RowFile, Samples


class _Rotary(nn.Module):
    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return positions


class _Doubling(nn.Module):
    """A layer that adds `gain` times its rows to them."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, hidden: torch.Tensor, position_embeddings: torch.Tensor) -> torch.Tensor:
        return hidden + self.gain * hidden


def samples(*lengths: int) -> Samples:
    positions = torch.arange(sum(lengths)).expand(3, -1)
    return Samples(lengths, positions, _Rotary(), torch.device("cpu"))


def row_file(path: Path, rows: torch.Tensor) -> RowFile:
    file = RowFile(path, "w+b", rows.shape[1], torch.float32)
    file.write(0, rows)
    return file


def test_rows_come_back_rounded_to_the_files_dtype(tmp_path: Path):
    rows = torch.randn(6, 5)
    with RowFile(tmp_path / "rows", "w+b", 5, torch.bfloat16) as file:
        file.write(2, rows[2:])
        file.write(0, rows[:2])
        file.sync()
        assert torch.equal(file.read(1, 4), rows[1:4].bfloat16().float())


def test_chunks_hold_neighbours_of_one_length_and_all_rows_in_order(tmp_path: Path):
    rows = torch.randn(14, 2)
    with row_file(tmp_path / "rows", rows) as file:
        chunks = list(samples(4, 4, 3, 3).chunks(file))
    assert [(start, tuple(chunk.hidden.shape[:2])) for start, chunk in chunks] == [(0, (2, 4)), (8, (2, 3))]
    assert torch.equal(torch.cat([chunk.hidden.flatten(0, 1) for _, chunk in chunks]), rows)
    assert chunks[1][1].rotary[0].tolist() == [[8, 9, 10], [11, 12, 13]]


def test_a_chunk_is_bounded_unless_one_sample_is_longer(tmp_path: Path):
    length = CHUNK_TOKENS // 2 - 1
    with row_file(tmp_path / "rows", torch.zeros(5 * length, 1)) as file:
        assert [chunk.hidden.shape[0] for _, chunk in samples(*[length] * 5).chunks(file)] == [2, 2, 1]
    with row_file(tmp_path / "rows", torch.zeros(2 * CHUNK_TOKENS + 2, 1)) as file:
        assert [chunk.tokens for _, chunk in samples(*[CHUNK_TOKENS + 1] * 2).chunks(file)] == [CHUNK_TOKENS + 1] * 2


def test_tracks_advance_side_by_side_and_errors_are_of_what_the_layer_adds(tmp_path: Path):
    start = torch.cat([torch.ones(4, 2), 2 * torch.ones(4, 2), 3 * torch.ones(4, 2)])
    layer = _Doubling()
    with row_file(tmp_path / "before", start) as rows, row_file(tmp_path / "after", 0 * start) as next_rows:
        held = HeldOut(samples(2, 2), layer, rows, next_rows)
        held.advance(SIXTEEN_BIT)
        worse = {"gain": torch.tensor(0.5)}
        assert held.error(worse) == pytest.approx(0.25)
        held.advance(ROUNDED, worse)
        layer.gain.fill_(2.0)
        held.advance(QUANTIZED)
        assert held.error() == pytest.approx(1.0)
        after = next_rows.read(0, 12)
    assert after[:, 0].tolist() == [2] * 4 + [3] * 4 + [9] * 4
