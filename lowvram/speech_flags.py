"""Flags about speech: how much there is, how it is made and in whose voice, and where it goes -> `SpeechParams`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, cast

from .errors import OptionError
from .flag_groups import SAY, flag
from .options import (
    MAX_TIME_S,
    SOLVERS,
    SPEECH_DTYPES,
    TALKER_SAMPLING,
    SamplingParams,
    Solver,
    SpeechDtype,
    SpeechMode,
    SpeechParams,
)
from .token2wav.windows import CODES_PER_SECOND

DEFAULT_OUTPUT = "reply.wav"
"""Where speech goes unless told otherwise; an older one stays, and this one becomes reply-2.wav."""

Play = Annotated[bool, flag("--play", panel=SAY, help="Hear each answer while it is being made.")]
VoiceName = Annotated[
    str | None,
    flag("--voice", panel=SAY, show_default="the first", help="Chelsie or Ethan; lowvram voices lists them."),
]


@dataclass(frozen=True)
class Voice:
    """How speech sounds and where it goes: what a plan need not know."""

    output: Annotated[
        str | None,
        flag(
            "-o",
            "--output",
            panel=SAY,
            show_default=f"a new {DEFAULT_OUTPUT}",
            help="A .wav, .flac, .ogg or .mp3 file; - is raw s16le at 24 kHz on stdout.",
        ),
    ] = None
    play: Annotated[
        bool, flag("--play", panel=SAY, help="Hear it while it is being made; a file is then written with -o only.")
    ] = False
    voice: VoiceName = None
    speech_temperature: Annotated[float, flag("--speech-temperature", panel=SAY, help="Of the codes; 0 is greedy.")] = (
        TALKER_SAMPLING.temperature
    )
    guidance: Annotated[float, flag("--guidance", panel=SAY, help="How strictly sound follows the codes.")] = (
        SpeechParams.guidance
    )

    @property
    def usual_mode(self) -> SpeechMode:
        """For ears alone early is better than exact; a file is for keeps."""
        return "balanced" if self.play and self.output is None else "exact"


@dataclass(frozen=True)
class Sound:
    """How much speech there may be and how it is made: what a plan must know of it."""

    no_speech: Annotated[bool, flag("--no-speech", panel=SAY, help="Answer in text alone.")] = False
    max_seconds: Annotated[
        float | None,
        flag(
            "--max-seconds",
            panel=SAY,
            show_default=f"{TALKER_SAMPLING.max_tokens / CODES_PER_SECOND:.0f}",
            help="End the speech after this long.",
        ),
    ] = None
    max_codes: Annotated[
        int, flag("--max-codes", panel=SAY, help=f"The same in codes, {CODES_PER_SECOND} a second.")
    ] = TALKER_SAMPLING.max_tokens
    solver: Annotated[str, flag("--solver", panel=SAY, help=f"One of: {', '.join(SOLVERS)}.")] = SpeechParams.solver
    steps: Annotated[
        int, flag("--steps", panel=SAY, help="Points of the grid that sound is solved on: more are finer and slower.")
    ] = SpeechParams.steps
    speech_dtype: Annotated[
        str, flag("--speech-dtype", panel=SAY, help=f"Of the speech decoder's layers: {', '.join(SPEECH_DTYPES)}.")
    ] = SpeechParams.dtype
    speech_mode: Annotated[
        str | None,
        flag(
            "--speech-mode",
            panel=SAY,
            show_default="exact; balanced for run --play alone",
            help="exact; balanced, low-latency: begin sooner, nearly as exact; offload: exact, for streamed weights.",
        ),
    ] = None
    chunk_seconds: Annotated[float, flag("--chunk-seconds", panel=SAY, help="Sound to hand out at a time.")] = (
        SpeechParams.chunk_s
    )

    def params(self, voice: Voice | None = None, seed: int | None = None) -> SpeechParams | None:
        """Speech as asked for, its codes drawn from `seed`; None for text alone. What is wrong is refused anyway."""
        voice = voice or Voice()
        speech = SpeechParams(
            voice=voice.voice,
            sampling=self._codes(voice.speech_temperature, seed),
            steps=self.steps,
            guidance=voice.guidance,
            solver=cast(Solver, self.solver),
            mode=cast(SpeechMode, self.speech_mode or voice.usual_mode),
            dtype=self._precision(),
            chunk_s=self.chunk_seconds,
        )
        return None if self.no_speech else speech

    def _precision(self) -> SpeechDtype:
        """`SpeechParams` would refuse it by the name of another flag."""
        if self.speech_dtype not in SPEECH_DTYPES:
            known = ", ".join(SPEECH_DTYPES)
            raise OptionError(f"speech_dtype {self.speech_dtype!r} is unknown", hint=f"one of: {known}")
        return cast(SpeechDtype, self.speech_dtype)

    def _codes(self, temperature: float, seed: int | None) -> SamplingParams:
        """The reference's draw with two values of its own, which `SamplingParams` would call by the text's names."""
        if not 0 <= temperature < math.inf:
            raise OptionError(f"speech_temperature is {temperature}, but must be 0 (greedy) or a positive number")
        return replace(TALKER_SAMPLING, max_tokens=self._most_codes(), temperature=temperature, seed=seed)

    def _most_codes(self) -> int:
        if self.max_seconds is None:
            if self.max_codes < 1:
                raise OptionError(
                    f"max_codes is {self.max_codes}, but speech has at least 1 code", hint="or pass --no-speech"
                )
            return self.max_codes
        if not 1 / CODES_PER_SECOND <= self.max_seconds <= MAX_TIME_S:
            raise OptionError(
                f"max_seconds is {self.max_seconds} s, but speech lasts at least {1 / CODES_PER_SECOND} s (1 code) and"
                f" at most {MAX_TIME_S} s",
                hint="or pass --no-speech",
            )
        return round(self.max_seconds * CODES_PER_SECOND)
