"""A checkpoint in 16 bit -> one whose thinker is stored in 4, or as asked: what `lowvram quantize` does.

`quant` knows what bits mean and how a layer loses least to them; here are the texts and media that it is calibrated on,
the walk from file to file, and what is told of the result. Names load what they need on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import LAYERS, Deviations, LayerReport, PartReport, QuantizeOptions, QuantizeReport

if TYPE_CHECKING:
    from .run import quantize_checkpoint

__all__ = [
    "LAYERS",
    "Deviations",
    "LayerReport",
    "PartReport",
    "QuantizeOptions",
    "QuantizeReport",
    "quantize_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name != "quantize_checkpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .run import quantize_checkpoint

    return quantize_checkpoint
