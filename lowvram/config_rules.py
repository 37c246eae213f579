"""config.json -> a refusal of the first value that cannot be what its key says, before anything is built by it.

The modelling library would make modules of such values and fail somewhere inside, in as many ways as there are layers.
A key means the same wherever it is; those that are not here are read by nobody, or checked by whoever reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import getrecursionlimit
from typing import Any

from .errors import CheckpointError

THINKING, SPEAKING = ("quantization_config", "thinker_config"), ("talker_config", "token2wav_config")
"""The sections that are read, of every model and of one that speaks."""

MOST_LAYERS, MOST_HEADS, MOST_TABLE_ROWS, WIDEST, LONGEST = 1_000, 1_000, 100_000, 1_000_000, 1_000_000_000
"""Far above what any model has, and small enough that nothing made of one of them takes the memory of a machine."""


@dataclass(frozen=True)
class Rule:
    """What a value must be, as a test and in words."""

    holds: Callable[[Any], bool]
    expected: str


def _whole(lowest: int, highest: int) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest

    return Rule(holds, f"a whole number from {lowest:,} to {highest:,}")


def _list_of(rule: Rule, fewest: int = 1) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, list) and len(value) >= fewest and all(map(rule.holds, value))

    return Rule(holds, f"a list of at least {fewest}, each {rule.expected}")


def _or_null(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.holds(value), f"null or {rule.expected}")


def _one_of(*words: str) -> Rule:
    return Rule(lambda value: value in words, f"one of {', '.join(words)}")


def _is_above_0(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


WIDTH = _whole(1, WIDEST)
PLACE = _whole(0, LONGEST)
ABOVE_0 = Rule(_is_above_0, "a finite number above 0")
_KEYS: tuple[tuple[Rule, str], ...] = (
    (_whole(1, MOST_LAYERS), "num_hidden_layers encoder_layers depth"),
    (
        _whole(1, MOST_HEADS),
        "num_attention_heads num_key_value_heads encoder_attention_heads num_heads heads enc_res2net_scale",
    ),
    (
        WIDTH,
        "hidden_size intermediate_size embedding_size d_model encoder_ffn_dim output_dim in_channels out_hidden_size"
        " patch_size spatial_merge_size temporal_patch_size window_size n_window num_mel_bins dim"
        " emb_dim ff_mult repeats block_size num_embeds mel_dim enc_dim enc_emb_dim enc_attention_channels"
        " enc_se_channels upsample_initial_channel position_id_per_seconds seconds_per_chunk",
    ),
    (_whole(1, MOST_TABLE_ROWS), "max_source_positions"),
    (_whole(1, LONGEST), "vocab_size max_position_embeddings original_max_position_embeddings"),
    (_or_null(WIDTH), "head_dim sliding_window"),
    (
        _list_of(WIDTH),
        "enc_channels enc_kernel_sizes enc_dilations mrope_section resblock_kernel_sizes upsample_rates"
        " upsample_kernel_sizes",
    ),
    (_list_of(PLACE, fewest=0), "fullatt_block_indexes look_ahead_layers look_backward_layers"),
    (_list_of(_list_of(WIDTH)), "resblock_dilation_sizes"),
    (ABOVE_0, "rope_theta factor"),
    (_or_null(ABOVE_0), "attention_factor beta_fast beta_slow mscale mscale_all_dim"),
    (Rule(_is_share, "a number from 0 to 1"), "dropout attention_dropout"),
    (_or_null(Rule(lambda value: isinstance(value, str), "a word")), "torch_dtype dtype"),
    (_one_of("silu", "gelu"), "hidden_act activation_function"),
)
RULES: Mapping[str, Rule] = {key: rule for rule, keys in _KEYS for key in keys.split()}
"""By key: what the published configs have, in either of their spellings, and the demo's."""

ID = _or_null(PLACE)
IDS = Rule(lambda value: ID.holds(value) or _list_of(PLACE).holds(value), f"{ID.expected}, or a list of such")
SECTION = Rule(lambda value: isinstance(value, Mapping), "an object {...}")
MAY_BE_NULL = {
    *("quantization_config", "rope_scaling", "rope_parameters"),
    *("extra_config", "sparsity_config", "transform_config"),  # of tools that quantize
}

PARTS_OF = {
    "num_heads": "hidden_size",
    "encoder_attention_heads": "d_model",
    "num_key_value_heads": "num_attention_heads",
}
"""What divides what."""
DECODER_KEYS = {"hidden_size", "num_attention_heads", "num_key_value_heads"}
TOWER_KEY = "depth"
STRETCHING = ("linear", "yarn")
TURNS_OF_TOWER, TURNS = ("default", "axial"), ("default", *STRETCHING)
"""How positions turn queries and keys. The modelling library writes `axial` where it saves the tower of pictures;
fine-tunes for long prompts stretch, by a factor."""
PUBLISHED_SECTIONS = (16, 24, 24)
"""What the modelling library takes where a decoder's config has no mrope_section."""


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for the first value in the model's sections that cannot be, by its key and `path`."""
    for key in (*THINKING, *SPEAKING) if config.get("enable_audio_output", True) else THINKING:
        if key in config:
            try:
                _check(key, config[key], key, path)
            except RecursionError as error:
                raise _refusal(f"nests {key} deeper than {getrecursionlimit():,} calls can follow", path) from error


def check_ids(generation: Mapping[str, Any], path: Path) -> None:
    """The same of generation_config.json, of which only the ids that end an answer are read."""
    _require(IDS, generation.get("eos_token_id"), "eos_token_id", path)


def _check(key: str, value: Any, where: str, path: Path) -> None:
    """One value; `where` is its dotted path in the file."""
    if (rule := _rule_of(key)) is not None:
        _require(rule, value, where, path)
    if not isinstance(value, Mapping):
        return
    for name, inner in value.items():
        _check(name, inner, f"{where}.{name}", path)
    for fault in _contradictions(value):
        raise _refusal(f"gives {where} {fault}", path)


def _rule_of(key: str) -> Rule | None:
    if key == "eos_token_id":
        return IDS
    if key.endswith(("_token_id", "_token_index")):
        return ID
    if key in MAY_BE_NULL:
        return _or_null(SECTION)
    if key.endswith("_config"):
        return SECTION
    return RULES.get(key)


def _contradictions(section: Mapping[str, Any]) -> Iterator[str]:
    """Of values each of which could be."""
    for part, whole in PARTS_OF.items():
        if part in section and whole in section and section[whole] % section[part]:
            yield f"{section[part]:,} {part}, which do not divide {whole} {section[whole]:,}"
    rotary = section.get("rope_parameters") or section.get("rope_scaling") or {}
    yield from _faults_of_turn(rotary, TURNS_OF_TOWER if TOWER_KEY in section else TURNS)
    if section.keys() >= DECODER_KEYS:
        pairs = (section.get("head_dim") or section["hidden_size"] // section["num_attention_heads"]) // 2
        turned = sum(rotary.get("mrope_section", PUBLISHED_SECTIONS))
        if turned != pairs:
            yield f"an mrope_section of {turned:,} pairs in all, but a head has {pairs:,}"


def _faults_of_turn(rotary: Mapping[str, Any], known: Sequence[str]) -> Iterator[str]:
    turn = rotary.get("rope_type", rotary.get("type", known[0]))
    if turn not in known:
        yield f"a rope_type of {_shown(turn)}, which must be one of {', '.join(known)}"
    elif turn in STRETCHING and "factor" not in rotary:
        yield f"a rope_type of {turn} without the factor that it takes"


def _require(rule: Rule, value: Any, where: str, path: Path) -> None:
    if not rule.holds(value):
        raise _refusal(f"gives {_shown(value)} for {where}, which must be {rule.expected}", path)


def _shown(value: Any) -> str:
    """As the file has it, unless that is long."""
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 40 else f"{words[:40]}..."


def _refusal(fault: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path.name} {fault}", path=str(path), hint=f"take {path.name} from where the weights are from"
    )
