from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig

from lowvram.config_rules import check_config, check_ids
from lowvram.demo import TINY
from lowvram.demo.config import omni_config
from lowvram.errors import CheckpointError, LowVRAMError
from lowvram.planning import find_headers
from lowvram.runtime import OmniRuntime
from lowvram.shapes import FILES, shipped_headers

CONFIG = omni_config(TINY, user_id=1, quantized=True, dtype="bfloat16")
PATH = Path("model") / "config.json"
ABSURD: tuple[Any, ...] = (-1, 0, 10**12, 1.5, "2", None, True, [], {}, [[]], float("nan"))


def changed(where: str, value: Any) -> dict[str, Any]:
    """The demo's config with another value at a dotted path."""
    config = copy.deepcopy(CONFIG)
    *sections, key = where.split(".")
    reduce(lambda section, name: section[name], sections, config)[key] = value
    return config


def values(section: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        yield f"{where}{key}", value
        if isinstance(value, dict):
            yield from values(value, f"{where}{key}.")


def whole_numbers() -> list[str]:
    """Where the demo's config, which has the published one's keys, has sizes and ids of the model."""
    found = [where for where, value in values(CONFIG) if type(value) is int and not where.startswith("quantization")]
    return [where for where in found if not where.endswith((".max_window_layers", ".tokens_per_second"))]  # not read


@pytest.mark.parametrize("model", FILES)
def test_the_published_configs_pass(model: str):
    headers = shipped_headers(model)
    assert headers
    check_config(headers.config, PATH)


@pytest.mark.parametrize("where", whole_numbers())
def test_a_size_that_is_no_whole_number_in_its_range_is_refused_by_its_place(where: str):
    for value in (-1, 10**12, 1.5, "2", True, [[]], float("nan")):
        with pytest.raises(CheckpointError, match=rf"^config\.json gives .* for {where}, which must be ") as refused:
            check_config(changed(where, value), PATH)
        assert refused.value.path == str(PATH)


def test_the_refusal_says_what_is_there_and_what_could_be():
    with pytest.raises(CheckpointError) as refused:
        check_config(changed("talker_config.num_hidden_layers", -3), PATH)
    assert str(refused.value) == (
        "config.json gives -3 for talker_config.num_hidden_layers, which must be a whole number from 1 to 1,000"
        " (take config.json from where the weights are from)"
    )


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("thinker_config", None, "null for thinker_config, which must be an object"),
        ("token2wav_config", None, "null for token2wav_config, which must be an object"),
        ("quantization_config", "awq", "null or an object"),
        ("token2wav_config.dit_config.dropout", 1.5, "a number from 0 to 1"),
        ("thinker_config.audio_config", [], "[] for thinker_config.audio_config"),
        ("thinker_config.text_config.rope_theta", 0, "a finite number above 0"),
        ("thinker_config.text_config.rope_theta", float("inf"), "Infinity for thinker_config.text_config.rope_theta"),
        ("thinker_config.text_config.hidden_act", "x", "must be one of silu, gelu"),
        ("thinker_config.torch_dtype", [], "null or a word"),
        ("thinker_config.eos_token_id", {}, "or a list of such"),
        ("thinker_config.vision_config.fullatt_block_indexes", [1, -1], "[1, -1] for"),
        ("thinker_config.vision_config.num_heads", 3, "3 num_heads, which do not divide hidden_size 32"),
        ("talker_config.rope_scaling", {}, "mrope_section of 64 pairs in all, but a head has 16"),
        ("talker_config.rope_scaling.rope_type", "axial", '"axial", which must be one of default, linear, yarn'),
        ("talker_config.rope_scaling.rope_type", "yarn", "a rope_type of yarn without the factor that it takes"),
        ("talker_config.rope_scaling", {"type": "mrope"}, 'gives talker_config a rope_type of "mrope", which must be'),
        ("talker_config.rope_scaling", {"type": "yarn", "factor": 0}, "0 for talker_config.rope_scaling.factor"),
        ("token2wav_config.bigvgan_config.upsample_rates", [], "a list of at least 1"),
        ("token2wav_config.bigvgan_config.resblock_dilation_sizes", [[1, "3"]], "each a list of at least 1"),
        (
            "token2wav_config.dit_config.enc_channels",
            list(range(90)),
            "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1... for",
        ),
    ],
)
def test_other_values_that_cannot_be_are_refused(where: str, value: Any, says: str):
    with pytest.raises(CheckpointError) as refused:
        check_config(changed(where, value), PATH)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("thinker_config.eos_token_id", [1, 2]),
        ("thinker_config.bos_token_id", None),
        ("thinker_config.text_config.head_dim", None),
        ("thinker_config.text_config.sliding_window", None),
        ("token2wav_config.dit_config.look_ahead_layers", []),
        ("odd_key", {"hidden_size": -1}),
        ("quantization_config.sparsity_config", None),
    ],
)
def test_what_a_config_may_leave_out_passes(where: str, value: Any):
    check_config(changed(where, value), PATH)


@pytest.mark.parametrize("model", FILES)
def test_what_the_modelling_library_saves_of_the_published_configs_passes(model: str, tmp_path: Path):
    """Fine-tunes are saved by it, in its own spelling."""
    headers = shipped_headers(model)
    assert headers
    Qwen2_5OmniConfig.from_dict(dict(headers.config)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["thinker_config"]["vision_config"]["rope_parameters"]["rope_type"] == "axial"
    check_config(saved, PATH)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("turn", ["linear", "yarn"])
def test_a_fine_tune_for_long_prompts_passes(key: str, turn: str):
    stretched = {key: turn, "factor": 4.0, "original_max_position_embeddings": 32768}
    text = CONFIG["thinker_config"]["text_config"]["rope_scaling"]
    sections = {"mrope_section": text["mrope_section"]}
    check_config(changed("thinker_config.text_config.rope_scaling", sections | stretched), PATH)


def test_what_is_about_speech_may_be_anything_where_there_is_none():
    check_config({**CONFIG, "enable_audio_output": False, "talker_config": None, "token2wav_config": None}, PATH)


def test_sections_in_sections_without_end_are_refused():
    nested = reduce(lambda inner, _: {"a": inner}, range(5000), dict[str, Any]())
    with pytest.raises(CheckpointError, match=r"^config\.json nests thinker_config deeper than"):
        check_config({**CONFIG, "thinker_config": nested}, PATH)


def test_ids_that_end_an_answer_are_whole_numbers():
    check_ids({"eos_token_id": [1, 2]}, PATH)
    check_ids({}, PATH)
    with pytest.raises(CheckpointError, match=r'"</s>" for eos_token_id'):
        check_ids({"eos_token_id": "</s>"}, PATH)


@pytest.mark.parametrize("where", ["thinker_config.audio_config.d_model", "token2wav_config.dit_config.enc_dim"])
def test_opening_and_planning_refuse_alike_whatever_is_there(demo: Path, tmp_path: Path, where: str):
    """No value escapes as an error of another kind."""
    for file in demo.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    for value in ABSURD:
        (tmp_path / "config.json").write_text(json.dumps(changed(where, value)))
        told = []
        for door in (find_headers, OmniRuntime.open):
            with pytest.raises(LowVRAMError) as refused:
                door(tmp_path)
            told.append(str(refused.value))
        assert told[0] == told[1] and where in told[0]
