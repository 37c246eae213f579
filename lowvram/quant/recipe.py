"""Which linears of a decoder layer are quantized, what takes over the scales of which, and what config.json says of it.

Four bits for the thinker's layers and nothing else are the published recipe, and written as AWQ. Whatever deviates from
it is written as compressed-tensors, whose config names each linear and its width: readers of AWQ quantize the thinker
alone, or leave the head out, and would take no notice of more. Paths within a layer are those of the modelling
library's, which are also the published ones below `layers.<i>.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .storage import Storage


@dataclass(frozen=True)
class ScaledGroup:
    """Linears that read one input, made by `absorber` (a norm or another linear), which is divided by their scales.

    How well scales do is judged by the output of `inspected`.
    """

    linears: tuple[str, ...]
    absorber: str
    inspected: str


GROUPS = (
    ScaledGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
    ScaledGroup(("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj"),
    ScaledGroup(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
    ScaledGroup(("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj"),
)
"""In the order in which a layer computes, and in which scales are applied."""

LINEARS = tuple(path for group in GROUPS for path in group.linears)

UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj")
"""Their outputs meet each other in a product, so that what an error of one alone costs says little."""

LEFT_IN_16_BIT = (
    "lm_head",
    "talker",
    "token2wav",
    "visual",
    "audio_tower",
    "thinker.visual",
    "thinker.audio_tower",
    "thinker.model.visual",
    "thinker.model.audio_tower",
)
"""`modules_to_not_convert`: what AutoAWQ finds anywhere in a module's path, and transformers at its beginning or end,
so that of all linears of an Omni only those of the thinker's layers are left: in the tree that transformers has since
5.21 and in the one before."""


def scaled_groups(layer: nn.Module) -> Iterator[tuple[ScaledGroup, bool]]:
    """The groups of `layer`, and whether each can be scaled: not where its absorber is a linear of other outputs than
    their inputs, as with grouped key heads, whose values are read by several queries."""
    for group in GROUPS:
        absorber, first = layer.get_submodule(group.absorber), layer.get_submodule(group.linears[0])
        yield group, not isinstance(absorber, nn.Linear) or absorber.out_features == first.in_features


PACK_QUANTIZED = "pack-quantized"

TREES = {
    "thinker.model.": r"thinker\.model\.(language_model\.)?",
    "thinker.audio_tower.": r"thinker\.(model\.)?audio_tower\.",
    "thinker.visual.": r"thinker\.(model\.)?visual\.",
}
"""Beginnings of published paths, and where transformers has those modules: in its tree before 5.21 and since."""


def quantization_config(group_size: int) -> dict[str, object]:
    """config.json's entry for a checkpoint made by the published recipe."""
    return {
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": list(LEFT_IN_16_BIT),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


def compressed_config(linears: Mapping[Storage, Sequence[str]]) -> dict[str, object]:
    """The entry for any other: published paths of the linears of each storage, with `*` for a layer's number."""
    return {
        "config_groups": {f"group_{i}": _group(*item) for i, item in enumerate(linears.items())},
        "format": PACK_QUANTIZED,
        "ignore": [],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _group(storage: Storage, paths: Sequence[str]) -> dict[str, object]:
    return {
        "format": PACK_QUANTIZED,
        "input_activations": None,
        "output_activations": None,
        "targets": [f"re:{_in_any_tree(path)}$" for path in paths],
        "weights": {
            "actorder": None,
            "dynamic": False,
            "group_size": storage.group_size,
            "num_bits": storage.bits,
            "strategy": "group",
            "symmetric": storage.symmetric,
            "type": "int",
        },
    }


def _in_any_tree(path: str) -> str:
    """A regular expression for a published path, wherever the modelling library has it."""
    pattern = r"\d+".join(map(re.escape, path.split("*")))
    for published, anywhere in TREES.items():
        pattern = pattern.replace(re.escape(published), anywhere)
    return pattern
