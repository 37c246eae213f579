from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lowvram.checkpoint import TensorHeader, TensorReader, read_tensors
from lowvram.checkpoint_writer import (
    DTYPE_CODE,
    divide,
    header_of,
    shard_bytes,
    shard_name,
    stored_pieces,
    tensor_bytes,
    whole_file,
    write_index,
    write_shard,
)

TENSORS = {
    "a": torch.randn(3, 5).half(),
    "b": torch.arange(7, dtype=torch.int32),
    "c": torch.randn(2, 2).bfloat16(),
    "none": torch.zeros(0, 4),
}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, TensorHeader]:
    headers = {name: header_of(tensor) for name, tensor in tensors.items()}
    for _ in write_shard(path, headers, lambda name: [tensor_bytes(tensors[name])]):
        pass
    return headers


def test_the_library_reads_what_was_written(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    headers = write(path, TENSORS)
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert path.stat().st_size == shard_bytes(headers)


def test_shards_and_their_index_are_a_checkpoint(tmp_path: Path):
    names = [shard_name(number, 2) for number in (1, 2)]
    assert names[1] == "model-00002-of-00002.safetensors"
    shards = {
        names[0]: write(tmp_path / names[0], {"a": TENSORS["a"]}),
        names[1]: write(tmp_path / names[1], {"b": TENSORS["b"]}),
    }
    write_index(tmp_path, shards)
    assert {name: entry.path.name for name, entry in read_tensors(tmp_path).items()} == {"a": names[0], "b": names[1]}


def test_a_stored_tensor_is_copied_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "model.safetensors", TENSORS)
    monkeypatch.setattr("lowvram.checkpoint_writer.PIECE_BYTES", 8)
    entry = read_tensors(tmp_path)["a"]
    with TensorReader() as reader:
        pieces = [bytes(piece) for piece in stored_pieces(reader, entry)]
    assert [len(piece) for piece in pieces] == [8, 8, 8, 6]
    assert b"".join(pieces) == bytes(tensor_bytes(TENSORS["a"]))


@given(sizes=st.lists(st.integers(0, 9), max_size=12), most=st.integers(1, 12))
def test_shards_keep_the_order_and_hold_no_more_than_they_may_unless_it_is_one_tensor(sizes: list[int], most: int):
    tensors = {str(i): TensorHeader("I8", (size,)) for i, size in enumerate(sizes)}
    shards = divide(tensors, most)
    assert [name for shard in shards for name in shard] == list(tensors)
    assert all(len(shard) == 1 or sum(header.n_bytes for header in shard.values()) <= most for shard in shards)


def test_a_file_that_was_not_finished_leaves_the_one_before_it(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as out:
        out.write(b"half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"


@pytest.mark.parametrize("dtype", DTYPE_CODE)
def test_every_dtype_has_the_librarys_name(dtype: torch.dtype, tmp_path: Path):
    write(tmp_path / "model.safetensors", {"x": torch.ones(2, dtype=dtype)})
    assert load_file(tmp_path / "model.safetensors")["x"].dtype == dtype
