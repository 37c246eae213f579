from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
BRIEF = ["--device", "cpu", "--shape", "128x64", "--rows", "1", "3", "--rounds", "1"]


def test_every_way_stands_beside_a_16_bit_linear_for_every_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import kernels

    assert kernels.main([*BRIEF, "-o", str(tmp_path / "kernels.json")]) == 0
    kept = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    by_rows = kept["shapes"]["128x64"]
    assert list(by_rows) == ["1", "3"]
    assert list(by_rows["1"]) == ["16-bit linear", "int4-cpu packed", "int4-cpu unpacked"]
    assert by_rows["3"]["16-bit linear"]["speedup"] == 1
    assert kept["card"]["conditions"]["threads"] == 1
    card, table = capsys.readouterr().out.split("\n\n")
    assert "load average" in card and table.splitlines()[2].startswith("    3 rows")
