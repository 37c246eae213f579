from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import batch
import pytest

from lowvram import OmniRuntime
from lowvram.errors import CheckpointError


@pytest.fixture
def folder(question: Path, tmp_path: Path) -> Path:
    """A sound, a picture that is none, another sound, and what is no clip at all."""
    clips = tmp_path / "clips"
    clips.mkdir()
    shutil.copy(question, clips / "a.wav")
    (clips / "b.png").write_text("I am no picture")
    shutil.copy(question, clips / "c.WAV")
    (clips / "notes.txt").write_text("I am no clip")
    (clips / "d.mp4").mkdir()
    return clips


def run(folder: Path, demo: Path, *more: str) -> int:
    return batch.main([str(folder), "--model", str(demo), "--max-tokens", "3", *more])


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_each_clip_gets_a_line_and_a_broken_one_its_error(folder: Path, demo: Path):
    assert run(folder, demo) == 0
    sound, picture, other = records(folder)
    assert [record["clip"] for record in (sound, picture, other)] == ["a.wav", "b.png", "c.WAV"]
    assert (sound["finish_reason"], sound["text_tokens"]) == ("length", 3) and sound["text"] == other["text"]
    assert sound["prompt_tokens"] > 0 and sound["seconds"] > 0
    assert picture["error"] == "MediaError" and "b.png" in picture["message"] and "text" not in picture


def test_a_clip_that_does_not_fit_gets_a_line_with_the_way_out(folder: Path, demo: Path):
    assert run(folder, demo, "--vram", "100KiB") == 0
    sound, *_ = records(folder)
    assert sound["error"] == "InfeasibleBudgetError" and "the smallest budget" in sound["hint"]


def test_started_again_it_answers_only_what_is_new(folder: Path, demo: Path):
    run(folder, demo)
    first = (folder / "answers.jsonl").read_bytes()
    shutil.copy(folder / "a.wav", folder / "e.wav")
    assert run(folder, demo) == 0
    whole = (folder / "answers.jsonl").read_bytes()
    assert whole.startswith(first) and json.loads(whole[len(first) :])["clip"] == "e.wav"


def broken_from(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Have the runtime's answers raise from the one with this number on, after their first event."""
    generate, asked = OmniRuntime.generate, iter(range(1, 100))

    def breaking(*arguments: Any, **options: Any) -> Iterator[Any]:
        with closing(generate(*arguments, **options)) as events:
            if next(asked) >= number:
                next(events)
                raise error
            yield from events

    monkeypatch.setattr(OmniRuntime, "generate", breaking)


def test_what_was_answered_before_ctrl_c_is_kept(folder: Path, demo: Path, monkeypatch, capsys):
    broken_from(monkeypatch, 3, KeyboardInterrupt())
    assert run(folder, demo) == 130
    assert [record["clip"] for record in records(folder)] == ["a.wav", "b.png"]
    assert "stopped after 2 of 3 clips" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(folder, demo) == 0
    assert [record["clip"] for record in records(folder)] == ["a.wav", "b.png", "c.WAV"]


def test_an_error_that_every_clip_would_meet_ends_the_run(folder: Path, demo: Path, monkeypatch, capsys):
    broken_from(monkeypatch, 1, CheckpointError("the weights are damaged at byte 7", hint="download them again"))
    assert run(folder, demo) == 3
    assert records(folder) == [] and "download them again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"my notes\n", b'{"clip": "a.wav"}\n{"clip": "b.p', b"[1]\n", b"{}\n", b'{"clip": "a.wav"}']
)
def test_a_file_with_another_line_is_left_as_it_is(folder: Path, demo: Path, capsys, content: bytes):
    (folder / "answers.jsonl").write_bytes(content)
    assert run(folder, demo) == 1
    assert (folder / "answers.jsonl").read_bytes() == content
    assert "delete the line, or name another file" in capsys.readouterr().err


def test_lines_that_cannot_be_written_are_one_sentence(folder: Path, demo: Path, capsys):
    assert run(folder, demo, "-o", str(folder / "nowhere" / "answers.jsonl")) == 1
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_clip_whose_name_is_no_text_is_answered_once(folder: Path, demo: Path):
    (folder / "a.wav").rename(folder / os.fsdecode(b"caf\xe9.wav"))
    assert run(folder, demo) == 0
    whole = (folder / "answers.jsonl").read_bytes()
    assert os.fsencode(json.loads(whole.splitlines()[-1])["clip"]) == b"caf\xe9.wav"
    assert run(folder, demo) == 0 and (folder / "answers.jsonl").read_bytes() == whole


def test_a_model_that_is_not_there_is_named_before_a_file_is_made(folder: Path, capsys):
    assert run(folder, folder / "nowhere") == 3
    assert "nowhere" in capsys.readouterr().err and not (folder / "answers.jsonl").exists()
