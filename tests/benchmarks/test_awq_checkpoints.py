from __future__ import annotations

import sys
from pathlib import Path

import awq_checkpoints
import pytest


@pytest.mark.parametrize(
    ("reader", "words"),
    [("--autoawq", "AutoAWQ's Python ended with 1"), ("--gptqmodel", "with gptqmodel's Python ended with 1")],
)
def test_an_environment_without_the_other_reader_is_one_sentence_with_a_way_out(
    demo: Path, capsys: pytest.CaptureFixture[str], reader: str, words: str
):
    assert awq_checkpoints.main([reader, sys.executable, str(demo)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and words in printed
    assert "at the top of this script" in printed
