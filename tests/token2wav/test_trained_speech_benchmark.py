"""benchmarks/trained_speech.py in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_few_steps_of_training_lower_the_loss_and_exact_stays_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import trained_speech

    monkeypatch.setattr(trained_speech, "BATCH", 2)
    monkeypatch.setattr(trained_speech, "REPORTED_STEPS", 1)
    kept = tmp_path / "trained.json"
    assert trained_speech.main(["--train-steps", "6", "--codes", "72", "-o", str(kept)]) == 0
    result = json.loads(kept.read_text(encoding="utf-8"))
    assert list(result["errors"]) == ["exact", "balanced", "low-latency", "chunks 48/24/12"]
    assert result["errors"]["exact"] < 1e-6
    assert "low-latency" in capsys.readouterr().out
    first, last = map(float, result["card"]["conditions"]["loss"].split(" to "))
    assert last < first
