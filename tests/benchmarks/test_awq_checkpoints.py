from __future__ import annotations

import json
import sys
from pathlib import Path

import awq_checkpoints
import pytest
from safetensors import safe_open


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


def test_the_tiny_checkpoint_says_of_all_but_the_thinker_s_layers_that_it_is_not_packed(tmp_path: Path):
    folder = awq_checkpoints.tiny_checkpoint(tmp_path)
    spared = json.loads((folder / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        told = {name: any(path in name for path in spared) for name in file.keys()}  # noqa: SIM118 (not a dict)
    others = {name for name in told if not name.startswith("thinker.model.")}
    assert {name for name, is_spared in told.items() if is_spared} == others
