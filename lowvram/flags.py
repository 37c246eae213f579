"""The command line's flags, in groups, and what each group means: flags -> options.

A group is a dataclass whose fields are flags. A command names the groups it takes, and `spread` makes of it one that
takes every flag by itself, which is what the command line's library reads.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, cast

import typer

from .checkpoint import DEFAULT_MODEL
from .errors import OptionError
from .offload.budget import Budget
from .offload.cards import Card, find_card
from .options import (
    KV_PRECISIONS,
    SOLVERS,
    SPEECH_DTYPES,
    TALKER_SAMPLING,
    KVPrecision,
    Limits,
    MediaParams,
    SamplingParams,
    Solver,
    SpeechDtype,
    SpeechMode,
    SpeechParams,
)
from .quantize.options import ALSO, GROUP_SIZES, QuantizeOptions
from .token2wav.windows import CODES_PER_SECOND

DEFAULT_OUTPUT = "reply.wav"
"""Where speech goes unless told otherwise; an older one stays, and this one becomes reply-2.wav."""


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the flags of its groups in their place, by name."""
    groups: dict[str, type] = {}
    flags: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = cast(type, parameter.annotation)
            flags += inspect.signature(groups[name], eval_str=True).parameters.values()
        else:
            flags.append(parameter)

    def spread_out(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    keyword_only = [flag.replace(kind=inspect.Parameter.KEYWORD_ONLY) for flag in flags]
    spread_out.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    spread_out.__name__, spread_out.__doc__ = command.__name__, command.__doc__
    return spread_out


def _flag(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, **more)


_ASK, _SAY, _SEE, _RUN, _OUT = "Question and answer", "Speech", "Media", "Model and memory", "Output"

MediaArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MEDIA", show_default=False, help="Videos, sounds, pictures: files, URLs, data: URLs, - for stdin."
    ),
]
SpeakText = Annotated[
    str | None,
    _flag("--speak", panel=_ASK, show_default=False, metavar="TEXT", help="Read this aloud; - is stdin's text."),
]
Play = Annotated[bool, _flag("--play", panel=_SAY, help="Hear each answer while it is being made.")]
VoiceName = Annotated[
    str | None,
    _flag("--voice", panel=_SAY, show_default="the first", help="Chelsie or Ethan; lowvram voices lists them."),
]
AsJson = Annotated[bool, _flag("--json", panel=_OUT, help="One JSON object on stdout.")]
AsNdjson = Annotated[bool, _flag("--ndjson", panel=_OUT, help="A JSON object per event on stdout.")]
Quiet = Annotated[bool, _flag("-q", "--quiet", panel=_OUT, help="Nothing on stderr but errors.")]
Verbose = Annotated[
    bool, _flag("-v", "--verbose", panel=_OUT, help="Tell more: what computes, all warnings, where an error came from.")
]
DryRun = Annotated[bool, _flag("--dry-run", panel=_OUT, help="Count the prompt's tokens and stop.")]
ShowPlan = Annotated[bool, _flag("--plan", panel=_OUT, help="Show how memory would be used here and stop.")]
Trace = Annotated[
    bool,
    _flag("--trace", panel=_RUN, help="Count without weights or a GPU: the real code, on tensors without data."),
]
Page = Annotated[
    str | None,
    _flag(
        "--html",
        panel=_OUT,
        show_default=False,
        metavar="FILE",
        help="Draw it on an HTML page that needs no other file.",
    ),
]
Beside = Annotated[
    str | None,
    _flag("--vs", panel=_OUT, show_default=False, metavar="FILE", help="Draw this one, kept before, beside it."),
]
Keep = Annotated[
    str | None, _flag("-o", "--keep", panel=_OUT, show_default=False, metavar="FILE", help="Keep the profile as JSON.")
]


@dataclass(frozen=True)
class Question:
    """What is asked, and how long the answer may be."""

    prompt: Annotated[str, _flag("-p", "--prompt", panel=_ASK, help="What to ask about the media, or without any.")] = (
        ""
    )
    system: Annotated[
        str | None, _flag("--system", panel=_ASK, help="Another system prompt; speech may be poor with it.")
    ] = None
    max_tokens: Annotated[int, _flag("--max-tokens", panel=_ASK, help="End the text after this many tokens.")] = (
        SamplingParams.max_tokens
    )

    def sampling(self, draw: Draw | None = None) -> SamplingParams:
        """So long an answer; greedy unless drawn otherwise."""
        return SamplingParams(max_tokens=self.max_tokens, **(vars(draw) if draw else {}))


@dataclass(frozen=True)
class Draw:
    """How the next word is drawn. Fields of `SamplingParams`."""

    temperature: Annotated[float, _flag("--temperature", panel=_ASK, help="Of the text; 0 is greedy.")] = (
        SamplingParams.temperature
    )
    top_k: Annotated[int, _flag("--top-k", panel=_ASK, help="Draw from this many tokens; 0 is all.")] = (
        SamplingParams.top_k
    )
    top_p: Annotated[
        float, _flag("--top-p", panel=_ASK, help="Draw from the likeliest tokens up to this share; 1 is all.")
    ] = SamplingParams.top_p
    seed: Annotated[int | None, _flag("--seed", panel=_ASK, help="Repeat an answer: text, speech and sound.")] = None


@dataclass(frozen=True)
class Voice:
    """How speech sounds and where it goes: what a plan need not know."""

    output: Annotated[
        str | None,
        _flag(
            "-o",
            "--output",
            panel=_SAY,
            show_default=f"a new {DEFAULT_OUTPUT}",
            help="A .wav, .flac, .ogg or .mp3 file; - is raw s16le at 24 kHz on stdout.",
        ),
    ] = None
    play: Annotated[
        bool, _flag("--play", panel=_SAY, help="Hear it while it is being made; a file is then written with -o only.")
    ] = False
    voice: VoiceName = None
    speech_temperature: Annotated[
        float, _flag("--speech-temperature", panel=_SAY, help="Of the codes; 0 is greedy.")
    ] = TALKER_SAMPLING.temperature
    guidance: Annotated[float, _flag("--guidance", panel=_SAY, help="How strictly sound follows the codes.")] = (
        SpeechParams.guidance
    )

    @property
    def usual_mode(self) -> SpeechMode:
        """For ears alone early is better than exact; a file is for keeps."""
        return "balanced" if self.play and self.output is None else "exact"


@dataclass(frozen=True)
class Sound:
    """How much speech there may be and how it is made: what a plan must know of it."""

    no_speech: Annotated[bool, _flag("--no-speech", panel=_SAY, help="Answer in text alone.")] = False
    max_seconds: Annotated[
        float | None,
        _flag(
            "--max-seconds",
            panel=_SAY,
            show_default=f"{TALKER_SAMPLING.max_tokens / CODES_PER_SECOND:.0f}",
            help="End the speech after this long.",
        ),
    ] = None
    max_codes: Annotated[
        int, _flag("--max-codes", panel=_SAY, help=f"The same in codes, {CODES_PER_SECOND} a second.")
    ] = TALKER_SAMPLING.max_tokens
    solver: Annotated[str, _flag("--solver", panel=_SAY, help=f"One of: {', '.join(SOLVERS)}.")] = SpeechParams.solver
    steps: Annotated[
        int, _flag("--steps", panel=_SAY, help="Points of the grid that sound is solved on: more are finer and slower.")
    ] = SpeechParams.steps
    speech_dtype: Annotated[
        str, _flag("--speech-dtype", panel=_SAY, help=f"Of the speech decoder's layers: {', '.join(SPEECH_DTYPES)}.")
    ] = SpeechParams.dtype
    speech_mode: Annotated[
        str | None,
        _flag(
            "--speech-mode",
            panel=_SAY,
            show_default="exact; balanced for run --play alone",
            help="exact; balanced, low-latency: begin sooner, nearly as exact; offload: exact, for streamed weights.",
        ),
    ] = None
    chunk_seconds: Annotated[float, _flag("--chunk-seconds", panel=_SAY, help="Sound to hand out at a time.")] = (
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
        if not 1 / CODES_PER_SECOND <= self.max_seconds < math.inf:
            raise OptionError(
                f"max_seconds is {self.max_seconds} s, but speech lasts at least {1 / CODES_PER_SECOND} s (1 code)",
                hint="or pass --no-speech",
            )
        return round(self.max_seconds * CODES_PER_SECOND)


@dataclass(frozen=True)
class Sight:
    """How media are looked at and heard."""

    fps: Annotated[float, _flag("--fps", panel=_SEE, help="Frames of a video to look at per second.")] = MediaParams.fps
    max_frames: Annotated[int, _flag("--max-frames", panel=_SEE, help="Frames of a video to look at, at most.")] = (
        MediaParams.max_frames
    )
    max_pixels: Annotated[
        int | None,
        _flag(
            "--max-pixels",
            panel=_SEE,
            show_default=f"{MediaParams.max_pixels:,} a frame, {MediaParams.image_max_pixels:,} an image",
            help="Make pictures this small.",
        ),
    ] = None
    start: Annotated[float | None, _flag("--start", panel=_SEE, help="Begin videos and sounds here (seconds).")] = None
    end: Annotated[float | None, _flag("--end", panel=_SEE, help="End videos and sounds here (seconds).")] = None
    no_video_sound: Annotated[bool, _flag("--no-video-sound", panel=_SEE, help="Leave the sound of videos out.")] = (
        False
    )

    def params(self) -> MediaParams:
        """The fewest frames and the smallest pictures that are usual give way to the most that are asked for."""
        pixels = {} if self.max_pixels is None else _at_most(self.max_pixels)
        return MediaParams(
            fps=self.fps,
            max_frames=self.max_frames,
            min_frames=min(self.max_frames, MediaParams.min_frames),
            start_s=self.start,
            end_s=self.end,
            video_sound=not self.no_video_sound,
            **pixels,
        )


@dataclass(frozen=True)
class StandIns:
    """Media that nobody has yet, for a plan."""

    video_seconds: Annotated[
        float, _flag("--video-seconds", panel=_SEE, help="Plan for a video of this length, with sound.")
    ] = 0
    audio_seconds: Annotated[float, _flag("--audio-seconds", panel=_SEE, help="Plan for a sound of this length.")] = 0
    images: Annotated[int, _flag("--images", panel=_SEE, help="Plan for this many images.")] = 0
    size: Annotated[str, _flag("--size", panel=_SEE, help="Of such a video and such images, in pixels.")] = "1280x720"


@dataclass(frozen=True)
class Model:
    """Which model."""

    model: Annotated[str, _flag("--model", panel=_RUN, help="Hub id, folder, or demo: a tiny built-in one.")] = (
        DEFAULT_MODEL
    )
    revision: Annotated[str | None, _flag("--revision", panel=_RUN, help="Branch, tag or commit on the hub.")] = None


@dataclass(frozen=True)
class Memory:
    """How much memory a turn may take, and what it does with it."""

    vram: Annotated[
        str | None,
        _flag(
            "--vram",
            panel=_RUN,
            show_default="auto",
            help="Memory to stay within, such as 8GiB; auto: what is free here; in a plan what --gpu has, or no limit.",
        ),
    ] = None
    ram: Annotated[
        str | None,
        _flag(
            "--ram",
            panel=_RUN,
            show_default="weights stay in their files",
            help="Host memory to stay within, such as 12GiB.",
        ),
    ] = None
    kv: Annotated[
        str,
        _flag("--kv", panel=_RUN, help=f"{' or '.join(KV_PRECISIONS)}: int8 halves the cache, changing answers a bit."),
    ] = Limits.kv
    dtype: Annotated[
        str,
        _flag(
            "--dtype", panel=_RUN, help="Compute in float32, float16 or bfloat16; auto is what the model is stored in."
        ),
    ] = "auto"
    prefill_chunk: Annotated[int, _flag("--prefill-chunk", panel=_RUN, help="Prompt tokens to read at once.")] = (
        Limits.prefill_chunk_tokens
    )
    max_prompt_tokens: Annotated[
        int | None,
        _flag("--max-prompt-tokens", panel=_RUN, show_default="what the model can", help="Longest prompt."),
    ] = Limits.max_prompt_tokens

    def budget(self) -> Budget:
        return Budget.of(self.vram, self.ram)

    def limits(self) -> Limits:
        return Limits(
            prefill_chunk_tokens=self.prefill_chunk,
            max_prompt_tokens=self.max_prompt_tokens,
            kv=cast(KVPrecision, self.kv),
        )


@dataclass(frozen=True)
class Machine:
    """What computes."""

    device: Annotated[str, _flag("--device", panel=_RUN, help="auto, cpu, cuda or cuda:N.")] = "auto"
    kernel: Annotated[
        str | None,
        _flag(
            "--kernel",
            panel=_RUN,
            show_default="the best that lowvram doctor finds",
            help="Code for 4-bit weights: int4-cpu, int4-cuda, reference, triton, autoawq or gptqmodel.",
        ),
    ] = None


@dataclass(frozen=True)
class Quantizing:
    """How a checkpoint is quantized, and on what device. Fields of `QuantizeOptions`."""

    calibrate: Annotated[
        list[str] | None,
        _flag(
            "--calibrate",
            panel=_SEE,
            show_default="built-in texts",
            metavar="PATH",
            help="Also learn from this file or folder: .txt, .jsonl, sounds, pictures, clips. Any number of times.",
        ),
    ] = None
    samples: Annotated[int, _flag("--samples", panel=_SEE, help="Samples to learn from, or as many as there are.")] = (
        QuantizeOptions.samples
    )
    sample_tokens: Annotated[int, _flag("--sample-tokens", panel=_SEE, help="How long a sample is.")] = (
        QuantizeOptions.sample_tokens
    )
    seed: Annotated[int, _flag("--seed", panel=_SEE, help="Pick other samples.")] = QuantizeOptions.seed
    group_size: Annotated[
        int, _flag("--group-size", panel=_RUN, help=f"Inputs that share a scale: {', '.join(map(str, GROUP_SIZES))}.")
    ] = QuantizeOptions.group_size
    bits: Annotated[int, _flag("--bits", panel=_RUN, help="Of the thinker's weights: 4 or 8.")] = QuantizeOptions.bits
    also: Annotated[
        str | None,
        _flag(
            "--also",
            panel=_RUN,
            show_default=False,
            metavar="PARTS",
            help=f"Round these, too, which the published recipe leaves in 16 bit: any of {','.join(ALSO)}.",
        ),
    ] = None
    also_bits: Annotated[int, _flag("--also-bits", panel=_RUN, help="Of what --also names: 4 or 8.")] = (
        QuantizeOptions.also_bits
    )
    device: Annotated[str, _flag("--device", panel=_RUN, help="auto, cpu, cuda or cuda:N.")] = "auto"

    def options(self) -> QuantizeOptions:
        """Checked; what is wrong is named by its field."""
        return QuantizeOptions(
            self.group_size,
            self.samples,
            self.sample_tokens,
            self.seed,
            tuple(self.calibrate or ()),
            bits=self.bits,
            also=tuple(part.strip() for part in self.also.split(",")) if self.also else (),
            also_bits=self.also_bits,
        )


@dataclass(frozen=True)
class Target:
    """What to plan for, which need not be here."""

    gpu: Annotated[
        str | None,
        _flag("--gpu", panel=_RUN, show_default=False, help="A card, such as rtx-3080-10gb: its memory and its speed."),
    ] = None
    device: Annotated[str, _flag("--device", panel=_RUN, help="cuda or cpu, whatever is here.")] = "cuda"

    def place(self) -> str:
        """The kind of device to plan for: "cuda", of whatever number, or "cpu"."""
        kind, _, number = self.device.partition(":")
        if kind not in ("cuda", "cpu") or not (number.isdecimal() or self.device == kind):
            raise OptionError(
                f"device {self.device!r} is none to plan for", hint="cuda or cpu; for what is here: run --plan"
            )
        return kind

    def card(self) -> Card | None:
        return find_card(self.gpu) if self.gpu else None


def _at_most(pixels: int) -> dict[str, int]:
    return {
        "max_pixels": pixels,
        "min_pixels": min(pixels, MediaParams.min_pixels),
        "image_max_pixels": pixels,
        "image_min_pixels": min(pixels, MediaParams.image_min_pixels),
    }
