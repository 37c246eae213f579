"""benchmarks/turn_times.py in miniature."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lowvram import SamplingParams

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_each_way_to_speak_is_a_row_of_one_warm_runtime_beside_the_ceilings(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import turn_times

    few = replace(turn_times.SPEECH.sampling, max_tokens=80)
    monkeypatch.setattr(turn_times, "SAMPLING", SamplingParams(max_tokens=6, seed=1))
    monkeypatch.setattr(turn_times, "SPEECH", replace(turn_times.SPEECH, sampling=few, steps=3))
    kept = tmp_path / "turn-times.json"
    brief = ["--model", str(demo), "--device", "cpu", "--modes", "low-latency", "exact", "--solvers", "euler"]
    assert turn_times.main([*brief, "-o", str(kept)]) == 0
    result, printed = json.loads(kept.read_text(encoding="utf-8")), capsys.readouterr().out
    early, exact = result["turns"]
    assert (early["way"], exact["way"]) == ("low-latency, euler", "exact, euler")
    assert (early["first_sound_codes"], exact["first_sound_codes"]) == (36, 48)
    assert 0 < early["ttft_s"] < early["first_sound_s"] < early["total_s"]
    rates = result["rates"]
    assert 0 < rates["text_tokens_per_s"] < rates["text_tokens_per_s_ceiling"]
    assert "low-latency, euler" in printed and "max codes 80" in printed
