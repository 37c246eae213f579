"""What a caller receives while an answer is made: progress, text, sound, and one last summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Progress:
    """Work done so far in one part of the turn: `done` of `total` units (None while the total is unknown)."""

    stage: str
    done: int
    total: int | None = None
    unit: str = ""


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer that is safe to show: whole characters only."""

    text: str


@dataclass(frozen=True, eq=False)
class AudioChunk:
    """A piece of the spoken answer: `samples` [S] float32 in -1..1, mono, beginning at `start_s` of the speech.

    The last one may hold 0 samples; a turn that was cancelled may have none that `is_last`. Two are equal if they are
    one and the same: arrays have no single answer to that question.
    """

    samples: np.ndarray
    sample_rate_hz: int
    start_s: float
    is_last: bool = False


@dataclass(frozen=True)
class Finished:
    """The turn's summary, always the last event of a turn that was not closed early.

    `speech_finish_reason` is None when no speech was asked for. `audio_rtf` is the time that speech took, from its
    first code to its last sample, by its length (None without sound; below 1 is faster than real time), and
    `audio_underrun_s` the silence that a listener met who began with the first sound. `recalled_tokens` at the
    beginning of the prompt were known from the turn before (`OmniRuntime.open`, `remember`).

    `timings` are seconds: spent in all on `load`, `encode`, `prefill`; and since the turn began at the first word
    (`ttft`) and the last token (`text`), the talker's beginning (`talk`) and its last code (`codes`), the first sound
    (`audio_ttfp`) and the last (`speech`), and the end (`total`). `memory` is bytes by phase and how they were counted.
    """

    text: str
    text_ids: tuple[int, ...]
    codec_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    speech_finish_reason: FinishReason | None
    audio_s: float
    sample_rate_hz: int
    audio_rtf: float | None = None
    audio_underrun_s: float = 0.0
    recalled_tokens: int = 0
    timings: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, object] = field(default_factory=dict)


Event = Progress | TextDelta | AudioChunk | Finished
