from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from media_files import numbered_frame, write_video

from lowvram.offload.meter import TRACKED_LIVE_TENSORS
from lowvram.offload.profile import PLANNED

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
BRIEF = ("--device", "cpu", "--max-tokens", "2", "--max-codes", "12")


@pytest.fixture(scope="module")
def memory() -> Iterator[ModuleType]:
    """benchmarks/memory.py, as `python benchmarks/memory.py` finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import memory

        yield memory


@pytest.fixture(scope="module")
def measured(memory: ModuleType, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What one run on a silent clip of two seconds prints, and what it keeps."""
    folder = tmp_path_factory.mktemp("memory")
    clip = write_video(folder / "clip.mp4", [numbered_frame(n) for n in range(4)], fps=2)
    kept = folder / "results" / "memory.json"
    with redirect_stdout(StringIO()) as printed:
        assert memory.main([str(clip), "--model", str(demo), *BRIEF, "-o", str(kept)]) == 0
    return printed.getvalue(), json.loads(kept.read_text(encoding="utf-8"))


def test_planned_and_tracked_peaks_are_two_columns_over_the_same_phases(measured: tuple[str, dict[str, Any]]):
    peaks = measured[1]["peak_bytes"]
    assert list(peaks) == [PLANNED, TRACKED_LIVE_TENSORS]
    assert list(peaks[PLANNED]) == list(peaks[TRACKED_LIVE_TENSORS])
    assert all(peak_bytes > 2**20 for column in peaks.values() for peak_bytes in column.values())


def test_a_card_says_what_was_run_on_what(measured: tuple[str, dict[str, Any]]):
    card = measured[1]["card"]
    assert card["versions"]["torch"] == version("torch") and card["commit"] and card["date"]
    assert card["device"].startswith("CPU")
    assert (card["conditions"]["clip"], card["conditions"]["codes"]) == ("clip.mp4", 12)


def test_people_read_the_card_then_a_table_then_what_the_count_includes(measured: tuple[str, dict[str, Any]]):
    card, table = measured[0].split("\n\n")
    assert "commit: " in card and f"torch {version('torch')}" in card
    assert table.startswith("phase") and PLANNED in table and TRACKED_LIVE_TENSORS in table
    assert "the host's share" in table.splitlines()[-1]


def test_an_error_is_one_sentence_and_its_exit_code(memory: ModuleType, demo: Path, capsys: pytest.CaptureFixture[str]):
    assert memory.main(["missing.mp4", "--model", str(demo), *BRIEF]) == 5
    assert capsys.readouterr().err.startswith("error: cannot read missing.mp4")
