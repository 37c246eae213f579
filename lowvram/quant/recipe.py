"""Which linears of a decoder layer are stored in 4 bits, and what takes over the scales of which: the published recipe.

Paths are those of the modelling library's layer, which are also the published ones below `layers.<i>.`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .packing import stored_layout


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


def require_storable(layer: nn.Module, group_size: int) -> None:
    """Raise UnsupportedQuantError for a layer with a linear that AWQ cannot store in such groups."""
    for path in LINEARS:
        linear = layer.get_submodule(path)
        assert isinstance(linear, nn.Linear), path
        stored_layout(linear.in_features, linear.out_features, group_size)


def quantization_config(group_size: int) -> dict[str, object]:
    """config.json's entry for a checkpoint made so."""
    return {
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": list(LEFT_IN_16_BIT),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
