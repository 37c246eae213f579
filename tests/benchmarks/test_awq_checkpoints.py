from __future__ import annotations

import sys
from pathlib import Path

import awq_checkpoints
import pytest


def test_an_environment_without_autoawq_is_one_sentence_with_a_way_out(demo: Path, capsys: pytest.CaptureFixture[str]):
    assert awq_checkpoints.main(["--their-python", sys.executable, str(demo)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: AutoAWQ's Python ended with 1: ModuleNotFoundError")
    assert "at the top of this script" in printed
