from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

from lowvram.quant.recipe import LEFT_IN_16_BIT, LINEARS, quantization_config
from lowvram.quant.scheme import AWQScheme, read_scheme


@pytest.fixture(scope="module")
def linears(demo: Path) -> list[str]:
    """Paths of all linears in the library's own tree."""
    config = json.loads((demo / "config.json").read_text())
    del config["quantization_config"]
    with torch.device("meta"):
        model = Qwen2_5OmniForConditionalGeneration._from_config(Qwen2_5OmniConfig.from_dict(config))
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def thinker_linears(linears: list[str]) -> set[str]:
    """The seven of each of two layers, wherever the library's tree has them."""
    found = {path for path in linears if re.search(r"^thinker\.model\.(language_model\.)?layers\.", path)}
    assert len(found) == 2 * len(LINEARS)
    return found


def test_transformers_would_convert_the_thinkers_linears_and_no_others(linears: list[str]):
    converted = {path for path in linears if should_convert_module(path, list(LEFT_IN_16_BIT))}
    assert converted == thinker_linears(linears)


def test_autoawq_would_convert_the_thinkers_linears_and_no_others(linears: list[str]):
    converted = {path for path in linears if not any(name in path for name in LEFT_IN_16_BIT)}
    assert converted == thinker_linears(linears)


@pytest.mark.parametrize("group_size", [32, 128])
def test_what_the_config_says_is_what_this_project_reads(group_size: int):
    assert read_scheme(quantization_config(group_size)) == AWQScheme(group_size)
