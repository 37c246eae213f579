"""benchmarks/conversation.py in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_each_question_is_a_row_with_what_was_known_of_it(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import conversation

    kept = tmp_path / "conversation.json"
    asked = ["--model", str(demo), "--device", "cpu", "--remember", "64MiB"]
    assert conversation.main([*asked, "-o", str(kept)]) == 0
    first, *later = json.loads(kept.read_text(encoding="utf-8"))["questions"]
    assert [question["recalled_tokens"] for question in later] == [first["prompt_tokens"], later[0]["prompt_tokens"]]
    assert 0 < first["recalled_tokens"] < first["prompt_tokens"] // 2  # how every conversation begins
    assert "remember 64MiB" in capsys.readouterr().out
