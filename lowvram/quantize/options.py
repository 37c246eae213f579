"""What a caller chooses about quantizing, and what is told of the result. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import OptionError

GROUP_SIZES = (32, 64, 128)

WIDTHS = (4, 8)
"""Bits."""

ALSO = ("talker", "encoders", "lm_head")
"""What may be quantized besides the layers of the thinker."""

LAYERS = "quantize"
"""The stage of progress that counts whole layers; inside one it is called by its number and counts tokens."""


@dataclass(frozen=True)
class QuantizeOptions:
    """The thinker's layers are stored in `bits`; `group_size` inputs share a scale. They are calibrated on `samples`
    blocks of `sample_tokens` tokens (or as many as there are), picked by `seed` from built-in texts and from the files
    and folders in `calibrate`. The parts named by `also` (see `ALSO`) are rounded to nearest, in `also_bits`."""

    group_size: int = 128
    samples: int = 128
    sample_tokens: int = 512
    seed: int = 0
    calibrate: tuple[str, ...] = ()
    bits: int = 4
    also: tuple[str, ...] = ()
    also_bits: int = 8

    def __post_init__(self) -> None:
        for name, known in (("bits", WIDTHS), ("also_bits", WIDTHS), ("group_size", GROUP_SIZES)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} is {getattr(self, name)}", hint=f"one of: {', '.join(map(str, known))}")
        for name in ("calibrate", "also"):
            if isinstance(getattr(self, name), str):
                raise OptionError(f"{name} is {getattr(self, name)!r}, a word instead of several", hint="give a tuple")
        for part in self.also:
            if part not in ALSO:
                raise OptionError(f"also names {part!r}", hint=f"any of: {', '.join(ALSO)}")
        if len(set(self.also)) < len(self.also):
            raise OptionError(f"also names {', '.join(self.also)}, one of them twice", hint="name each once")
        if self.also_bits != type(self).also_bits and not self.also:
            raise OptionError(f"also_bits is {self.also_bits}, but also names nothing", hint="leave it out")
        for name in ("samples", "sample_tokens", "seed"):
            if not isinstance(getattr(self, name), int):
                raise OptionError(f"{name} is {getattr(self, name)!r}, but must be a whole number")
        for name in ("samples", "sample_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}, but must be at least 1")

    @property
    def follows_the_recipe(self) -> bool:
        """Whether this makes what is published: the thinker's layers in 4 bits, and nothing else quantized."""
        return self.bits == 4 and not self.also


@dataclass(frozen=True)
class Deviations:
    """What of a run deviates from the published recipe, in a sentence each; told before anything is written."""

    sentences: tuple[str, ...]


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
class PartReport:
    """A part that was rounded to nearest: how many `linears`, from and to how many bytes, and `weight_error`, the
    square error of their weights relative to the square of those. `left_alone` are the published paths of its linears
    that stay in 16 bit, `*` standing for a layer's number."""

    part: str
    bits: int
    linears: int
    left_alone: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    weight_error: float


@dataclass(frozen=True)
class QuantizeReport:
    """The whole model on held-out tokens, as round-to-nearest would make it and as written, and layer by layer. All is
    computed in float32 from the weights as they are stored. Where the output head is quantized both have it so, and
    `head_alone` is the 16-bit thinker with that head; `parts` are those that are quantized besides the thinker."""

    model: str
    options: QuantizeOptions
    deviations: tuple[str, ...]
    calibration_tokens: int
    held_out_tokens: int
    layers: tuple[LayerReport, ...]
    rounded: Agreement
    quantized: Agreement
    head_alone: Agreement | None
    parts: tuple[PartReport, ...]
    weights_bytes: int

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints and the checkpoint keeps."""
        return asdict(self)
