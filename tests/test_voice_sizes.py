from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from typer.testing import CliRunner

from lowvram.cli import app
from lowvram.offload.plan import Plan
from lowvram.voice_sizes import longest_voice_frames


def voices(**frames: int) -> dict[str, Any]:
    return {
        name: {"bos_token": 613, "cond": torch.zeros(1, 192), "ref_mel": torch.zeros(1, count, 80)}
        for name, count in frames.items()
    }


def test_the_longest_voice_counts(tmp_path: Path):
    torch.save(voices(Chelsie=300, Ethan=1234), tmp_path / "spk_dict.pt")
    assert longest_voice_frames(tmp_path) == 1234


def test_it_is_the_length_that_torch_reads(demo: Path):
    stored = torch.load(demo / "spk_dict.pt", weights_only=True)
    assert longest_voice_frames(demo) == max(voice["ref_mel"].shape[1] for voice in stored.values())


def test_torch_is_not_loaded_for_it(demo: Path):
    code = "import sys; from pathlib import Path; from lowvram.voice_sizes import longest_voice_frames as longest;"
    code += "print(longest(Path(sys.argv[1])), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, demo], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(longest_voice_frames(demo)), "False"]


def test_a_transposed_voice_has_the_size_it_is_seen_with(tmp_path: Path):
    stored = voices(Chelsie=300)
    stored["Chelsie"]["ref_mel"] = torch.zeros(1, 80, 700).mT
    torch.save(stored, tmp_path / "spk_dict.pt")
    assert longest_voice_frames(tmp_path) == 700


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("code was run",)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"PK", b"x" * 900, {"a": 1}, [], {}, {"a": {"ref_mel": torch.zeros(3)}}, {"a": Hostile()}],
    ids=["missing", "empty", "cut", "no zip", "no voice", "a list", "nobody", "flat", "hostile"],
)
def test_a_file_without_voices_has_none_and_runs_nothing(
    tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "spk_dict.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert longest_voice_frames(tmp_path) == 0
    assert capsys.readouterr().out == ""


def test_no_damage_to_the_pickle_escapes_as_an_error(tmp_path: Path):
    torch.save(voices(Chelsie=300), tmp_path / "whole.pt")
    with ZipFile(tmp_path / "whole.pt") as saved:
        pickled = saved.read("whole/data.pkl")
    for index in range(len(pickled)):
        with ZipFile(tmp_path / "spk_dict.pt", "w") as damaged:
            damaged.writestr("spk_dict/data.pkl", pickled[:index] + b"\xff" + pickled[index + 1 :])
        assert longest_voice_frames(tmp_path) >= 0


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}r" + (2**31 - 1).to_bytes(4, "little") + b".",
        b"\x80\x05\x96" + (2**50).to_bytes(8, "little") + b".",
        b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
        b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b")R.",
        b"\x80\x02}" + b"(" * 400_000 + b"t" * 400_000 + b".",
        b"\x80\x02ctorch\nLongStorage\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b.",
    ],
    ids=[
        "a memo of 2 billion",
        "a petabyte",
        "a key that takes years to hash",
        "a name that fills a disk",
        "marks in marks",
        "a changed function",
    ],
)
def test_a_small_pickle_that_asks_for_much_costs_little(tmp_path: Path, pickled: bytes):
    with ZipFile(tmp_path / "spk_dict.pt", "w") as saved:
        saved.writestr("spk_dict/data.pkl", pickled)
    assert longest_voice_frames(tmp_path) == 0


@pytest.mark.parametrize("frames", [-1, 2**40, "300", 1e30, None])
def test_a_number_of_frames_that_cannot_be_is_none(tmp_path: Path, frames: Any):
    with ZipFile(tmp_path / "spk_dict.pt", "w") as saved:
        saved.writestr("spk_dict/data.pkl", pickle.dumps({"a": {"ref_mel": (1, frames)}}, protocol=2))
    assert longest_voice_frames(tmp_path) == 0


def test_a_zip_of_something_else_has_no_voices(tmp_path: Path):
    with ZipFile(tmp_path / "spk_dict.pt", "w") as saved:
        saved.writestr("letter.txt", "hello")
    assert longest_voice_frames(tmp_path) == 0


def test_a_pickle_as_large_as_a_disk_is_not_read(tmp_path: Path):
    with ZipFile(tmp_path / "spk_dict.pt", "w") as saved:
        saved.writestr("spk_dict/data.pkl", pickle.dumps({"a": {"ref_mel": (1, 9)}, "b": "x" * 1_000_000}))
    assert longest_voice_frames(tmp_path) == 0


def test_a_long_voice_is_planned_alike_by_a_plan_and_by_what_would_run_it(demo: Path, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(demo, model)
    stored = torch.load(model / "spk_dict.pt", weights_only=True)
    *_, last = stored.values()  # whoever of them speaks
    last["ref_mel"] = torch.zeros(1, 60_000, last["ref_mel"].shape[2])
    torch.save(stored, model / "spk_dict.pt")
    asked = ("-p", "hello", "--model", str(model), "--vram", "256MiB", "--device", "cpu", "--json")
    told = [CliRunner().invoke(app, [*door, *asked]) for door in (["plan"], ["run", "--plan"])]
    planned, here = (Plan.from_json(json.loads(done.stdout)) for done in told)
    assert planned == here
    assert planned.peak_bytes > 60_000 * last["ref_mel"].shape[2] * 4
