from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowvram import doctor
from lowvram.doctor import examine, report_lines


def test_a_folder_that_is_not_there_yet_has_the_room_of_those_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a file").touch()
    monkeypatch.setattr(doctor, "user_cache", lambda: tmp_path / "a file" / "below" / "it")
    (demo,) = (folder for folder in examine()["folders"] if folder["what"] == "demo")
    assert demo["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_a_user_without_a_home_folder_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert "demo: ~, out of reach" in report_lines(examine())


def test_a_folder_out_of_reach_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def refuses(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(shutil, "disk_usage", refuses)
    assert f"output: {Path.cwd()}, out of reach" in report_lines(examine())
