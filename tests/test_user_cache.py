"""Where files of our own are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram.errors import LowVRAMError
from lowvram.user_cache import user_cache


@pytest.fixture
def without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder is named for caches."""
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "LOCALAPPDATA"])
def test_a_folder_for_caches_that_is_named_is_used(
    name: str, without_folders: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv(name, str(tmp_path))
    assert user_cache() == tmp_path / "lowvram"


def test_a_user_without_a_home_is_told_what_to_set(without_folders: None, monkeypatch: pytest.MonkeyPatch):
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(LowVRAMError, match="no folder to keep files in") as refused:
        user_cache()
    assert "XDG_CACHE_HOME" in refused.value.hint
