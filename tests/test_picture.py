from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lowvram.offload.budget import GIB, MIB
from lowvram.offload.placement import Phase, Placement, Plan
from lowvram.offload.profile import TRACED, MemoryProfile, Moment
from lowvram.profile_file import ProfileFile, write_profile

PHASES = tuple(Phase(name, (name,), {name: Placement.PHASE}, GIB, 0, MIB, GIB) for name in ("visual", "thinker"))
PLAN = Plan("cuda", 4 * GIB, PHASES, 900, 64, 0, 512, 64, 1, slack_bytes=MIB)
TIMELINE = (Moment("see", "visual", GIB, 0, MIB), *[Moment("text", "thinker", GIB, 0, 0)] * 99)


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/picture.py"""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import picture

    yield picture


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A kept profile."""
    path = tmp_path / "profile.json"
    profile = MemoryProfile.of(PLAN).add(TRACED, {"visual": GIB, "thinker": GIB}, TIMELINE)
    write_profile(path, ProfileFile(PLAN, profile, {"conditions": {"clip": "$a_b$.mp4"}}))
    return path


def test_a_picture_is_a_png(picture: ModuleType, kept: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert picture.main([str(kept), str(kept), "-o", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_every_phase_has_room_for_its_words(picture: ModuleType, kept: Path):
    shares = picture.shares(picture.read_profile(kept))
    assert shares[0] >= picture.LEAST_SHARE and sum(shares) == pytest.approx(1)


def test_without_matplotlib_it_says_how_to_install_it(
    picture: ModuleType, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert picture.main([str(kept), "-o", str(tmp_path / "picture.png")]) == 6
    assert 'pip install "lowvram[plots]"' in capsys.readouterr().err


def test_a_foreign_file_is_refused(picture: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "foreign.json").write_text("{}")
    assert picture.main([str(tmp_path / "foreign.json"), "-o", str(tmp_path / "picture.png")]) == 2
    assert "foreign.json" in capsys.readouterr().err
