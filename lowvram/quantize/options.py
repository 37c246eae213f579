"""What a caller chooses about quantizing, and what is told of the result. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import OptionError

GROUP_SIZES = (32, 64, 128)

LAYERS = "quantize"
"""The stage of progress that counts whole layers; inside one it is called by its number and counts tokens."""


@dataclass(frozen=True)
class QuantizeOptions:
    """`group_size` inputs share a scale and a zero point. Calibrates on `samples` blocks of `sample_tokens` tokens (or
    as many as there are), picked by `seed` from built-in texts and from the files and folders in `calibrate`."""

    group_size: int = 128
    samples: int = 128
    sample_tokens: int = 512
    seed: int = 0
    calibrate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise OptionError(f"group_size is {self.group_size}", hint=f"one of: {', '.join(map(str, GROUP_SIZES))}")
        for name in ("samples", "sample_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}, but must be at least 1")


@dataclass(frozen=True)
class LayerReport:
    """How far a layer's output is off on held-out rows: mean square error relative to the mean square of what the layer
    adds to them. `rounded` is by round-to-nearest, `quantized` as written."""

    layer: int
    rounded: float
    quantized: float


@dataclass(frozen=True)
class Agreement:
    """Of a model with the one in 16 bit: `kl_divergence` is the mean over tokens of KL(16 bit || it) in nats, and
    `top1` the share of tokens after which both find the same next token likeliest."""

    kl_divergence: float
    top1: float


@dataclass(frozen=True)
class QuantizeReport:
    """The whole model on held-out tokens, as round-to-nearest would make it and as written, and layer by layer. All is
    computed in float32 from the weights as they are stored."""

    model: str
    options: QuantizeOptions
    calibration_tokens: int
    held_out_tokens: int
    layers: tuple[LayerReport, ...]
    rounded: Agreement
    quantized: Agreement
    weights_bytes: int

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints and the checkpoint keeps."""
        return asdict(self)
