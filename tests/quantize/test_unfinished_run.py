from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from lowvram.errors import OptionError
from lowvram.quantize.state import Unfinished, require_new_or_unfinished, require_room

RECORD = {"recipe": 2, "seed": 0, "calibrate": ("a", "b")}


@pytest.fixture
def run(tmp_path: Path) -> Unfinished:
    run = Unfinished(tmp_path / "new")
    with run.alone():
        run.open_run(RECORD, begun=False)
    return run


def test_a_run_goes_on_if_the_same_is_asked(run: Unfinished):
    run.keep("layer-0", {"error": 0.5})
    again = Unfinished(run.folder.parent)
    again.open_run(RECORD, begun=True)
    assert again.read("layer-0") == {"error": 0.5}
    assert again.read("layer-1") is None


def test_what_is_asked_otherwise_is_named(run: Unfinished):
    with pytest.raises(OptionError, match="unfinished run with seed 0, not 3"):
        Unfinished(run.folder.parent).open_run({**RECORD, "seed": 3}, begun=True)


def test_what_is_asked_may_change_until_something_depends_on_it(run: Unfinished):
    other = {**RECORD, "seed": 3}
    run.open_run(other, begun=False)
    run.open_run(other, begun=True)
    with pytest.raises(OptionError, match="unfinished run with seed 3, not 0"):
        run.open_run(RECORD, begun=True)


@pytest.mark.parametrize("begun", [False, True])
def test_an_unfinished_run_of_another_version_is_not_gone_on_with(run: Unfinished, begun: bool):
    asked = (run.folder / "run.json").read_text()
    with pytest.raises(OptionError, match="another version of lowvram, with recipe 2 instead of 3"):
        run.open_run({**RECORD, "recipe": 3}, begun=begun)
    assert (run.folder / "run.json").read_text() == asked


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_disk_that_knows_no_locks_keeps_nobody_out(
    run: Unfinished, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(_: FileLock) -> None:
        raise error

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    with run.alone():
        run.keep("layer-0", {})
    assert "new cannot be locked" in caplog.text


def test_a_run_that_is_under_way_keeps_others_out(run: Unfinished):
    other = Unfinished(run.folder.parent)
    with run.alone(), pytest.raises(OptionError, match="new is being written by another process"), other.alone():
        pass
    with other.alone():
        pass


def test_a_run_that_dies_while_it_is_cleared_away_is_over(run: Unfinished, monkeypatch: pytest.MonkeyPatch):
    def die(folder: Path, **_: object) -> None:
        os.unlink(folder / "run.json")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        run.discard()
    with pytest.raises(OptionError, match="neither empty nor an unfinished run"):
        require_new_or_unfinished(run.folder.parent)


def test_rows_are_there_once_all_of_them_are_written(run: Unfinished):
    rows = torch.randn(4, 3)
    with pytest.raises(KeyboardInterrupt), run.writing_rows("a", 3, torch.float32) as file:
        file.write(0, rows[:2])
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError):
        run.rows("a", 3, torch.float32)
    with run.writing_rows("a", 3, torch.float32) as file:
        file.write(0, rows)
    with run.rows("a", 3, torch.float32) as file:
        assert torch.equal(file.read(0, 4), rows)
    run.forget_rows("a")
    run.forget_rows("a")
    with pytest.raises(FileNotFoundError):
        run.rows("a", 3, torch.float32)


def test_a_target_may_be_new_empty_or_an_unfinished_runs(run: Unfinished, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "not" / "there", tmp_path / "empty", run.folder.parent):
        require_new_or_unfinished(target)
    run.discard()
    (run.folder.parent / "config.json").write_text("{}")
    for target in (run.folder.parent, run.folder.parent / "config.json"):
        with pytest.raises(OptionError, match="neither empty nor an unfinished run"):
            require_new_or_unfinished(target)


def test_what_a_run_has_written_already_counts_as_room(run: Unfinished, monkeypatch: pytest.MonkeyPatch):
    target = run.folder.parent
    (target / "model-00001-of-00002.safetensors").write_bytes(bytes(1000))
    there_bytes = 1000 + (run.folder / "run.json").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500))
    require_room(target, there_bytes + 500, "a model")
    with pytest.raises(OptionError, match="quantizing a model takes"):
        require_room(target, there_bytes + 501, "a model")
