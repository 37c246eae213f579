"""What a caller chooses: how text and codec tokens are drawn, how speech is made, how media are read, and limits.

Every option is checked when it is made, so that a bad value is an `OptionError` at the door and never a
surprise in the middle of an answer. Defaults are the reference's (transformers 5.23,
`Qwen2_5OmniForConditionalGeneration.generate`, and qwen-omni-utils 0.0.9 for media).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

from .errors import OptionError

Solver = Literal["euler", "ab2", "rk4"]
SOLVERS: tuple[Solver, ...] = ("euler", "ab2", "rk4")

SpeechMode = Literal["exact", "balanced", "low-latency", "offload"]
MODES: tuple[SpeechMode, ...] = ("exact", "balanced", "low-latency", "offload")

SpeechDtype = Literal["float32", "float16", "bfloat16"]
SPEECH_DTYPES: tuple[SpeechDtype, ...] = ("float32", "float16", "bfloat16")

KVPrecision = Literal["16bit", "int8"]
KV_PRECISIONS: tuple[KVPrecision, ...] = ("16bit", "int8")

MAX_GUIDANCE = 100.0
"""Far beyond any use; where sound overflows is further still."""

VISION_FACTOR = 28
"""Frame sides are multiples of patch (14) x spatial merge (2) pixels."""

MIN_FPS = 0.01
"""A frame every 100 s. Positions in time are numbered in steps of 2 / fps seconds, which nearer 0 grow past any number
a model has learned."""

MAX_TIME_S = 10**9
"""31 years, where no medium reaches; it still has an exact number of samples."""

MAX_TIMEOUT_S = 86_400
"""A day: no server answers later, and a system's own bound (24 days) is not far."""

MAX_SEED = 2**64 - 1
"""The largest state that a random generator is started from."""

MAX_COUNT = 10**12
"""Of tokens, frames, pixels or bytes: far beyond any use, and what is planned for so many is still a number that sizes
of memory are counted in."""

KINDS: dict[str, tuple[type, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "a word"),
}
"""By annotation. numpy's numbers are numbers, too."""

DEFAULT_SYSTEM_PROMPT = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and"
    " visual inputs, as well as generating text and speech."
)
"""The reference's system prompt; with another one, speech may be poor."""


def _require(condition: bool, message: str, hint: str = "") -> None:
    if not condition:
        raise OptionError(message, hint=hint)


def _require_kinds(options: Any) -> None:
    """Every field is of the kind that its annotation says, and no count is endless; Python would find out in the middle
    of an answer."""
    for field in fields(options):
        kind_name, _, or_none = str(field.type).partition(" | ")
        value = getattr(options, field.name)
        if kind_name in KINDS and not (or_none and value is None):
            kind, words = KINDS[kind_name]
            fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
            _require(fits, f"{field.name} is {value!r}, but must be {words}")
            if kind is Integral and field.name != "seed":
                _require(value <= MAX_COUNT, f"{field.name} is above {MAX_COUNT:,}, beyond any use")


def require_options(**chosen: object) -> None:
    """Raise OptionError for options that are not of the group that their name stands for, such as `speech=False`."""
    for name, options in chosen.items():
        group = GROUPS[name]
        _require(
            options is None or isinstance(options, group),
            f"{name} is {options!r}, but must be {group.__name__} or None",
        )


def _require_seed(seed: int | None) -> None:
    _require(seed is None or 0 <= seed <= MAX_SEED, f"seed is {seed}, but must be 0 to {MAX_SEED}")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn from logits.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch these filters off. `seed` None draws a fresh seed.
    The default is greedy text, as the reference answers.
    """

    max_tokens: int = 1024
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require_kinds(self)
        _require(self.max_tokens >= 1, f"max_tokens is {self.max_tokens}, but an answer has at least 1 token")
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature is {self.temperature}, but must be 0 (greedy) or a positive number",
        )
        _require(self.top_k >= 0, f"top_k is {self.top_k}, but must be 0 (off) or more")
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}, but must be above 0 and at most 1 (off)")
        _require(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            f"repetition_penalty is {self.repetition_penalty}, but must be a positive number (1 is off)",
        )
        _require_seed(self.seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


TALKER_SAMPLING = SamplingParams(max_tokens=4096, temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.05)
"""The reference's draw for codec tokens. 4096 codes are 82 s of speech."""


@dataclass(frozen=True)
class SpeechParams:
    """How the answer is spoken.

    `steps` counts the time points of the ODE grid as the reference does: 10 points are 9 evaluations by Euler's rule
    or by ab2 (Adams-Bashforth, second order), or 36 of RK4. `guidance` is the classifier-free guidance scale (0
    switches it off and halves the work). `chunk_s` is the sound a caller gets at a time, rounded up to whole DiT blocks
    (12 codes, 0.24 s). `seed` fixes the noise the sound is made from; None takes the codec tokens' seed.

    `mode` says how much is solved together. "exact": the sound of the whole utterance solved at once; it begins when
    2.88 s of speech are known (for 9 evaluations and chunks of 0.96 s; 2.64 s in chunks of 0.24 s). "offload": exact,
    too, and streams each weight once per chunk; begins after 10.56 s (4.56 s). "balanced" and "low-latency" begin after
    0.96 s and 0.72 s: a chunk is solved with only two blocks, or one, after it (error 2.4e-5 and 4.8e-3 of the signal
    on a small trained model, in 1.4 and 1.2 times the work). `dtype` is that of the DiT's layers, float32 as the
    reference has it: float16 and bfloat16 halve their bytes, at an error of 6e-4 and 4e-3 of the signal on that model.
    All else, the vocoder included, is float32.
    """

    voice: str | None = None
    sampling: SamplingParams = TALKER_SAMPLING
    steps: int = 10
    guidance: float = 0.5
    solver: Solver = "euler"
    mode: SpeechMode = "exact"
    dtype: SpeechDtype = "float32"
    chunk_s: float = 0.96
    seed: int | None = None

    def __post_init__(self) -> None:
        _require_kinds(self)
        is_sampling = isinstance(self.sampling, SamplingParams)
        _require(is_sampling, f"sampling is {self.sampling!r}, but must be SamplingParams")
        _require(
            self.voice != "", "voice is empty: 0 characters", hint="without one, the checkpoint's first voice speaks"
        )
        _require(2 <= self.steps <= 1000, f"steps is {self.steps}, but the ODE grid needs 2 to 1000 time points")
        _require(
            0 <= self.guidance <= MAX_GUIDANCE,
            f"guidance is {self.guidance}, but must be 0 (off) to {MAX_GUIDANCE:g}; the reference's is 0.5",
        )
        for name, known in (("solver", SOLVERS), ("mode", MODES), ("dtype", SPEECH_DTYPES)):
            chosen = getattr(self, name)
            _require(chosen in known, f"{name} {chosen!r} is unknown", hint=f"one of: {', '.join(known)}")
        _require(
            0.24 <= self.chunk_s <= 60,
            f"chunk_s is {self.chunk_s} s, but a chunk is 0.24 s (one DiT block) to 60 s of sound",
        )
        _require_seed(self.seed)


@dataclass(frozen=True)
class MediaParams:
    """How media become model inputs; a message part may override each of these for itself.

    `start_s`/`end_s` cut videos and audio (seconds). Sound inside a video is used when there is any and `video_sound`
    is true. Pixels count per frame after resizing; `total_pixels` bounds frames x pixels of one video.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * VISION_FACTOR**2
    max_pixels: int = 768 * VISION_FACTOR**2
    total_pixels: int = int(128_000 * VISION_FACTOR**2 * 0.9)
    image_min_pixels: int = 4 * VISION_FACTOR**2
    image_max_pixels: int = 16_384 * VISION_FACTOR**2
    start_s: float | None = None
    end_s: float | None = None
    video_sound: bool = True

    def __post_init__(self) -> None:
        _require_kinds(self)
        _require(
            math.isfinite(self.fps) and self.fps >= MIN_FPS,
            f"fps is {self.fps}, but must be at least {MIN_FPS} frames/s (a frame every {1 / MIN_FPS:.0f} s)",
        )
        for name in ("max_frames", "min_frames"):
            _require(getattr(self, name) >= 2, f"{name} is {getattr(self, name)}, but frames come in pairs: at least 2")
        _require(
            self.max_frames >= self.min_frames,
            f"max_frames is {self.max_frames}, below min_frames {self.min_frames}",
            hint="lower min_frames too",
        )
        for smallest, largest in (("min_pixels", "max_pixels"), ("image_min_pixels", "image_max_pixels")):
            low, high = getattr(self, smallest), getattr(self, largest)
            for name, pixels in ((largest, high), (smallest, low)):
                _require(pixels >= 1, f"{name} is {pixels}, but a picture has at least 1 pixel")
            _require(high >= low, f"{largest} is {high}, below {smallest} {low}", hint=f"lower {smallest} too")
        _require(
            self.total_pixels >= self.min_pixels,
            f"total_pixels is {self.total_pixels}, below one frame of min_pixels {self.min_pixels}",
            hint="lower min_pixels too",
        )
        self._check_times()

    def _check_times(self) -> None:
        start_s = 0.0 if self.start_s is None else self.start_s
        _require(0 <= start_s <= MAX_TIME_S, f"start is {start_s} s, but must be 0 to {MAX_TIME_S} s")
        if self.end_s is not None:
            _require(self.end_s > start_s, f"end is {self.end_s} s, not after the start at {start_s} s")
            _require(
                self.end_s <= MAX_TIME_S,
                f"end is {self.end_s} s, but must be at most {MAX_TIME_S} s",
                hint="without an end, media are read to theirs",
            )


@dataclass(frozen=True)
class Limits:
    """Bounds on what one turn may read and hold.

    `prefill_chunk_tokens`, `vision_chunk_patches` and `audio_chunk_windows` set how much is computed at once: they
    change memory and speed, never the answer. `max_prompt_tokens` None allows any prompt the checkpoint's positions
    can number. `max_media_bytes` bounds a download or a pipe; `max_source_pixels` one decoded picture or frame. `kv`
    "int8" keeps keys and values in about half the memory and changes the answer a little; "16bit" is the compute dtype.
    """

    prefill_chunk_tokens: int = 1024
    vision_chunk_patches: int = 4096
    audio_chunk_windows: int = 8
    max_prompt_tokens: int | None = None
    max_media_bytes: int = 4 * 1024**3
    max_source_pixels: int = 178_956_970  # where Pillow, too, sees an attack
    network_timeout_s: float = 30.0
    kv: KVPrecision = "16bit"

    def __post_init__(self) -> None:
        _require_kinds(self)
        for name in ("prefill_chunk_tokens", "vision_chunk_patches", "audio_chunk_windows", "max_media_bytes"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.max_prompt_tokens is not None:
            _require(
                self.max_prompt_tokens >= 1, f"max_prompt_tokens is {self.max_prompt_tokens}, but must be at least 1"
            )
        _require(self.kv in KV_PRECISIONS, f"kv {self.kv!r} is unknown", hint=f"one of: {', '.join(KV_PRECISIONS)}")
        _require(
            0 < self.network_timeout_s <= MAX_TIMEOUT_S,
            f"network_timeout_s is {self.network_timeout_s} s, but must be above 0 and at most {MAX_TIMEOUT_S} s",
        )


GROUPS: dict[str, type] = {"sampling": SamplingParams, "speech": SpeechParams, "media": MediaParams, "limits": Limits}
"""By the name under which a caller passes them."""
