"""benchmarks/speech_memory.py in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Way -> peak bytes at 200 and 392 codes: with four chunks more, the last one as full."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speech_memory

    kept = tmp_path / "memory.json"
    assert speech_memory.main(["--tiny", "--codes", "200", "392", "--modes", "exact", "-o", str(kept)]) == 0
    result = json.loads(kept.read_text(encoding="utf-8"))
    return result["peak_bytes"]


def test_ours_holds_as_much_for_twice_the_length_where_the_reference_holds_more(peaks: dict[str, Any]) -> None:
    short, long = peaks["exact, euler"]
    assert long == pytest.approx(short, rel=0.01)
    short, long = peaks["reference, whole, rk4"]
    assert long > 1.8 * short
