"""Folders, headers and reads: what is accepted, and that every fault names its file and tensor."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowvram.checkpoint import TensorReader, open_checkpoint, read_header, read_tensors
from lowvram.errors import CheckpointError, OptionError

WORD_BYTES = {"F32": 4, "F16": 2, "I32": 4}


def write_shard(path: Path, tensors: dict[str, tuple[str, list[int]]], *, cut: int = 0, extra: bytes = b"") -> Path:
    """A well-formed safetensors file of counting bytes; `cut` takes bytes off its end, `extra` puts some there."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * WORD_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return write_raw(path, header, (bytes(i % 251 for i in range(end)) + extra)[: end + len(extra) - cut])


def write_raw(path: Path, header: object, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def write_omni(folder: Path, **config: object) -> Path:
    """The least that opens: one shard and a config."""
    write_shard(folder / "model.safetensors", {"thinker.a": ("F16", [2, 3])})
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni", **config}))
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# --- folders


def test_a_folder_opens_by_string_and_path(tmp_path):
    write_omni(tmp_path)
    by_path, by_name = open_checkpoint(tmp_path), open_checkpoint(str(tmp_path))
    assert by_path.tensors == by_name.tensors
    assert by_name.name == str(tmp_path)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    write_omni(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("USERPROFILE", str(tmp_path.parent))
    assert open_checkpoint(f"~/{tmp_path.name}").folder == tmp_path


@pytest.mark.parametrize(
    "name", ["./absent", "/absent/omni", "~/absent", "a/b/c", "C:\\models\\omni", "../absent", "models\\omni"]
)
def test_a_path_without_a_folder_is_refused_without_asking_the_hub(name):
    with pytest.raises(CheckpointError, match="there is no folder"):
        open_checkpoint(name)


def test_a_file_is_not_a_model(tmp_path):
    shard = write_shard(tmp_path / "model.safetensors", {"a": ("F16", [1])})
    with pytest.raises(CheckpointError, match="is a file, not a model"):
        open_checkpoint(shard)


@pytest.mark.parametrize("model", ["", " ", None, 3, b"demo"])
def test_what_is_no_name_of_a_model_is_refused(model):
    with pytest.raises(OptionError, match="is no name"):
        open_checkpoint(model)


def test_config_and_generation_come_as_published(tmp_path):
    write_omni(tmp_path, odd_key=[1, None])
    assert open_checkpoint(tmp_path).generation == {}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7]}')
    opened = open_checkpoint(tmp_path)
    assert opened.config == {"model_type": "qwen2_5_omni", "odd_key": [1, None]}
    assert opened.generation == {"eos_token_id": [7]}


def test_quantization_is_found_at_the_top_and_in_the_thinker(tmp_path):
    assert open_checkpoint(write_omni(tmp_path)).quantization is None
    assert open_checkpoint(write_omni(tmp_path, quantization_config={"bits": 4})).quantization == {"bits": 4}
    nested = {"thinker_config": {"quantization_config": {"bits": 3}}}
    assert open_checkpoint(write_omni(tmp_path, **nested)).quantization == {"bits": 3}


def test_a_thinker_without_speech_opens(tmp_path):
    opened = open_checkpoint(write_omni(tmp_path, enable_audio_output=False))
    assert opened.weights_bytes == 12
    assert not opened.speakers_path.exists()


def test_another_model_is_named(tmp_path):
    write_omni(tmp_path, model_type="llama")
    with pytest.raises(CheckpointError, match="type 'llama', not 'qwen2_5_omni'") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path == str(tmp_path / "config.json")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_config_is_named(tmp_path, text):
    write_omni(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json does not hold"):
        open_checkpoint(tmp_path)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        read_tensors(tmp_path)


# --- shards and their index


def test_shards_are_read_in_the_order_of_their_index(tmp_path):
    write_shard(tmp_path / "one.safetensors", {"a": ("F16", [2])})
    write_shard(tmp_path / "two.safetensors", {"b": ("I32", [3])})
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    tensors = read_tensors(tmp_path)
    assert [(entry.name, entry.path.name) for entry in tensors.values()] == [
        ("a", "one.safetensors"),
        ("b", "two.safetensors"),
    ]


def test_files_outside_the_index_are_left_alone(tmp_path):
    write_shard(tmp_path / "one.safetensors", {"a": ("F16", [2])})
    (tmp_path / "consolidated.safetensors").write_bytes(b"something else")
    write_index(tmp_path, {"a": "one.safetensors"})
    assert list(read_tensors(tmp_path)) == ["a"]


def test_the_header_outranks_an_index_that_forgets_a_tensor(tmp_path):
    write_shard(tmp_path / "one.safetensors", {"a": ("F16", [2]), "b": ("F16", [2])})
    write_index(tmp_path, {"a": "one.safetensors"})
    assert list(read_tensors(tmp_path)) == ["a", "b"]


def test_a_missing_shard_is_named(tmp_path):
    write_index(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"one\.safetensors is missing"):
        read_tensors(tmp_path)


def test_a_tensor_in_the_wrong_shard_is_named(tmp_path):
    write_shard(tmp_path / "one.safetensors", {"a": ("F16", [2])})
    write_shard(tmp_path / "two.safetensors", {"b": ("F16", [2])})
    write_index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"two\.safetensors lacks tensor a.*lies in one\.safetensors") as caught:
        read_tensors(tmp_path)
    assert caught.value.tensor == "a"


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path):
    write_shard(tmp_path / "one.safetensors", {"a": ("F16", [2])})
    write_index(tmp_path, {"a": "one.safetensors", "ghost": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks tensor ghost.*no file holds it"):
        read_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    write_shard(tmp_path / "one.safetensors", {"a": ("F16", [2])})
    write_shard(tmp_path / "two.safetensors", {"a": ("F16", [2])})
    with pytest.raises(CheckpointError, match=r"two\.safetensors holds tensor a, which one\.safetensors holds too"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"], {"a": "../elsewhere.safetensors"}, {"a": 1}])
def test_an_index_that_does_not_map_tensors_to_files_here_is_refused(tmp_path, weight_map):
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json (has no weight_map|puts tensor a into)"):
        read_tensors(tmp_path)


# --- headers


def test_headers_agree_with_the_safetensors_library(tmp_path):
    tensors = {
        "a": torch.ones(3, 5, dtype=torch.bfloat16),
        "b": torch.arange(4),
        "c": torch.ones(()),
        "d": torch.ones(0, 2),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = {entry.name: entry for entry in read_header(tmp_path / "x.safetensors")}
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        "a": ("BF16", (3, 5)),
        "b": ("I64", (4,)),
        "c": ("F32", ()),
        "d": ("F32", (0, 2)),
    }
    stored = (tmp_path / "x.safetensors").read_bytes()
    b = entries["b"]
    assert stored[b.offset : b.offset + b.n_bytes] == tensors["b"].numpy().tobytes()


def field(**changes: object) -> dict[str, object]:
    """A header of one tensor [2] F16, with some of its fields changed."""
    return {"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4], **changes}}


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (b"{]", "valid JSON"),
        (b"[]", "JSON object"),
        (b'{"a": 1, "a": 2}', "names a twice"),
        ({"a": {}}, "describes tensor a without"),
        ({"a": [1]}, "describes tensor a without"),
        (field(shape=[-2]), "describes tensor a without"),
        (field(shape="2"), "describes tensor a without"),
        (field(data_offsets=[0]), "describes tensor a without"),
        (field(dtype="F6_E2M3"), "tensor a as F6_E2M3"),
        (field(shape=[3]), r"bytes 0 to 4, but F16 \[3\] takes 6"),
        (field(data_offsets=[4, 0]), "bytes 4 to 0"),
        (field(data_offsets=[-4, 0]), "bytes -4 to 0"),
        (field(data_offsets=[2, 6]), "tensor a leaves a gap"),
        (field(data_offsets=[0, 400], shape=[200]), "truncated.*within a"),
        ({**field(), "b": field()["a"]}, "tensor b overlaps"),
    ],
)
def test_a_header_at_odds_with_itself_or_its_file_is_refused(tmp_path, header, fault):
    path = write_raw(tmp_path / "bad.safetensors", header, bytes(4))
    with pytest.raises(CheckpointError, match=rf"^bad\.safetensors .*{fault}") as caught:
        read_header(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("content", [b"", b"short", b"<!DOCTYPE html><html>", bytes(7)])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "page.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not begin with a safetensors header"):
        read_header(path)


def test_a_file_cut_inside_its_header_is_refused(tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes((1000).to_bytes(8, "little") + b'{"a"')
    with pytest.raises(CheckpointError, match="truncated inside its header: 12 of 1,008 bytes"):
        read_header(path)


def test_a_truncated_shard_says_how_much_is_there_and_where_it_ends(tmp_path):
    path = write_shard(tmp_path / "x.safetensors", {"a": ("F16", [2]), "b": ("F32", [100])}, cut=150)
    with pytest.raises(CheckpointError, match=r"is truncated: [\d,]+ of [\d,]+ bytes, within b") as caught:
        read_header(path)
    assert caught.value.tensor == "b"


def test_bytes_after_the_last_tensor_are_refused(tmp_path):
    path = write_shard(tmp_path / "x.safetensors", {"a": ("F16", [2])}, extra=b"123")
    with pytest.raises(CheckpointError, match="has 3 bytes after its last tensor"):
        read_header(path)


def test_no_damage_to_a_header_escapes_as_another_error(tmp_path):
    path = write_shard(tmp_path / "x.safetensors", {"a": ("F16", [2, 3]), "b": ("I32", [4])})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole) - 28)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_header(path)
        except CheckpointError:
            refused += 1
    assert refused > 100


# --- reading


def test_a_tensor_is_read_whole_and_in_parts(tmp_path):
    save_file({"a": torch.arange(100, dtype=torch.int32), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    entry = read_tensors(tmp_path)["a"]
    whole, part = np.zeros(100, np.int32), np.zeros(10, np.int32)
    with TensorReader() as reader:
        reader.read_into(entry, memoryview(whole))
        reader.read_into(entry, memoryview(part), start=4 * 50)
    assert whole.tolist() == list(range(100))
    assert part.tolist() == list(range(50, 60))


def test_threads_that_share_a_reader_do_not_disturb_each_other(tmp_path):
    save_file({str(i): torch.full((50_000,), i, dtype=torch.int32) for i in range(8)}, tmp_path / "x.safetensors")
    tensors = read_tensors(tmp_path)
    values = {name: np.full(50_000, -1, np.int32) for name in tensors}
    with TensorReader() as reader:
        threads = [
            threading.Thread(target=reader.read_into, args=(entry, memoryview(values[name])))
            for name, entry in tensors.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all((array == int(name)).all() for name, array in values.items())


def test_reading_works_without_positional_reads(tmp_path, monkeypatch):
    monkeypatch.delattr("os.preadv", raising=False)
    path = write_shard(tmp_path / "x.safetensors", {"a": ("F16", [2]), "b": ("I32", [50])})
    b = read_header(path)[1]
    buffer = bytearray(b.n_bytes)
    with TensorReader() as reader:
        reader.read_into(b, memoryview(buffer))
    assert buffer == path.read_bytes()[b.offset :]


def test_a_file_that_shrinks_under_the_reader_is_named(tmp_path):
    path = write_shard(tmp_path / "x.safetensors", {"a": ("F32", [1000])})
    entry = read_header(path)[0]
    path.write_bytes(path.read_bytes()[:-100])
    with TensorReader() as reader, pytest.raises(CheckpointError, match="100 bytes of a are missing") as caught:
        reader.read_into(entry, memoryview(bytearray(4000)))
    assert caught.value.tensor == "a"


def test_a_file_that_vanishes_is_named(tmp_path):
    path = write_shard(tmp_path / "x.safetensors", {"a": ("F32", [1])})
    entry = read_header(path)[0]
    path.unlink()
    with TensorReader() as reader, pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read at a"):
        reader.read_into(entry, memoryview(bytearray(4)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_view_a_table_in_its_file(tmp_path, dtype):
    table = torch.randn(7, 4).to(dtype)
    save_file({"a": torch.ones(3), "table": table}, tmp_path / "x.safetensors")
    rows = TensorReader().rows(read_tensors(tmp_path)["table"])
    assert torch.equal(torch.from_numpy(rows).view(dtype)[[5, 0]], table[[5, 0]])


def test_rows_can_be_written_to_without_touching_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"table": torch.ones(2, 2)}, path)
    before = path.read_bytes()
    rows = TensorReader().rows(read_header(path)[0])
    rows[0] = 5
    del rows
    assert path.read_bytes() == before


def test_a_table_of_integers_has_no_rows(tmp_path):
    save_file({"table": torch.ones(2, 2, dtype=torch.int32)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="table as I32"):
        TensorReader().rows(read_tensors(tmp_path)["table"])


def test_a_file_replaced_by_a_longer_one_is_noticed(tmp_path):
    path = write_shard(tmp_path / "x.safetensors", {"a": ("F32", [25])})
    (entry,) = read_header(path)
    path.write_bytes(path.read_bytes() + b"more")
    with TensorReader() as reader, pytest.raises(CheckpointError, match="was replaced: it has"):
        reader.read_into(entry, memoryview(bytearray(100)))


def test_a_file_written_anew_in_its_old_length_is_noticed(tmp_path):
    """As by a training script that saves its model where an application has it open."""
    path = write_shard(tmp_path / "x.safetensors", {"a": ("F32", [25])})
    (entry,) = read_header(path)
    with TensorReader() as reader:
        reader.read_into(entry, memoryview(bytearray(100)))
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(0, (entry.written_ns or 0) + 2 * 10**9))  # file systems may count in steps of 2 s
        with pytest.raises(CheckpointError, match=r"x\.safetensors was written to after its header"):
            reader.read_into(entry, memoryview(bytearray(100)))


def test_a_folder_has_no_revisions(tmp_path):
    with pytest.raises(OptionError, match="revision main has no effect on the folder"):
        open_checkpoint(write_omni(tmp_path), revision="main")
