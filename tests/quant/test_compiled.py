"""What keeps compiled C sources, tried out with a source that does nothing."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lowvram.errors import BackendError
from lowvram.quant import compiled
from lowvram.quant.compiled import COMPILERS, CSource

SOURCE = CSource("nothing.c", "nothing", "instructions")

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C compiler here")


@pytest.fixture(autouse=True)
def does_nothing(monkeypatch: pytest.MonkeyPatch):
    text = b"int lowvram_supported(void) { return 1; }\nvoid lowvram_multiply(void) {}\n"
    monkeypatch.setattr(CSource, "text", text)
    monkeypatch.setattr(compiled, "_torch_team", lambda source: compiled._Team())


@pytest.mark.parametrize("damage", ["empty", "half", "one byte", "another file"])
def test_a_damaged_file_is_compiled_again(tmp_path: Path, damage: str):
    SOURCE.load(tmp_path)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    wrong = bytes([whole[100] ^ 1])
    damaged = {"empty": b"", "half": whole[: len(whole) // 2], "one byte": whole[:100] + wrong + whole[101:]}
    kept.unlink()  # the library that this process has loaded stays whole
    kept.write_bytes(damaged.get(damage, b"\x7fELF and nothing that belongs to it"))
    compiled._library.cache_clear()
    SOURCE.load(tmp_path)
    assert kept.read_bytes() == whole


def test_a_damaged_file_that_cannot_be_replaced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    SOURCE.compiled_file(tmp_path).write_bytes(b"damaged")
    monkeypatch.setattr(compiled, "COMPILERS", ())
    with pytest.raises(BackendError, match="there is no C compiler here"):
        SOURCE.load(tmp_path)


def test_whoever_compiles_at_once_keeps_one_whole_file(tmp_path: Path):
    kept = SOURCE.compiled_file(tmp_path)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: compiled._compile(SOURCE, kept), range(3)))
    assert list(tmp_path.iterdir()) == [kept] and compiled._is_whole(kept)


def test_folders_may_have_any_name(tmp_path: Path):
    SOURCE.load(tmp_path / "Jörg's files" / "キャッシュ")


def test_a_user_without_a_home_folder_is_refused(monkeypatch: pytest.MonkeyPatch):
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME", "USERPROFILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it does for a user whom the system does not know
    with pytest.raises(BackendError, match="no folder to keep files in: Could not determine home directory"):
        SOURCE.load()
