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

from lowvram.quant.recipe import LEFT_IN_16_BIT, LINEARS, compressed_config, quantization_config
from lowvram.quant.scheme import AWQScheme, Int8Scheme, read_scheme
from lowvram.quant.storage import Int4Storage, Int8Storage


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


def test_a_mixed_config_is_what_this_project_reads():
    config = compressed_config({Int4Storage(64): ["thinker.model.layers.*.mlp.up_proj"], Int8Storage(32): ["a.b"]})
    assert read_scheme(config) == (AWQScheme(64, "pack-quantized, asymmetric"), Int8Scheme(32))


@pytest.mark.parametrize(
    ("published", "elsewhere"),
    [
        ("thinker.model.layers.11.mlp.up_proj", "thinker.model.language_model.layers.11.mlp.up_proj"),
        ("thinker.visual.blocks.0.attn.q", "thinker.model.visual.blocks.0.attn.q"),
        ("thinker.audio_tower.layers.3.fc1", "thinker.model.audio_tower.layers.3.fc1"),
        ("thinker.lm_head", "thinker.lm_head"),
    ],
)
def test_a_mixed_config_names_linears_in_both_of_transformers_trees(published: str, elsewhere: str):
    config = compressed_config({Int8Storage(32): [re.sub(r"\.\d+\.", ".*.", published)]})
    (target,) = config["config_groups"]["group_0"]["targets"]
    pattern = target.removeprefix("re:")
    assert re.match(pattern, published) and re.match(pattern, elsewhere)
    assert not re.match(pattern, f"{published}_more") and not re.match(pattern, f"talker.{published}")


@pytest.mark.parametrize("group_size", [32, 128])
def test_what_the_config_says_is_what_this_project_reads(group_size: int):
    assert read_scheme(quantization_config(group_size)) == (AWQScheme(group_size),)
