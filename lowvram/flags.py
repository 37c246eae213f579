"""The command line's flags but those about speech, in groups, and what each group means: flags -> options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

import typer

from .checkpoint import DEFAULT_MODEL
from .errors import OptionError
from .flag_groups import ASK, OUT, RUN, SEE, flag
from .offload.budget import Budget
from .offload.cards import Card, find_card
from .options import KV_PRECISIONS, KVPrecision, Limits, MediaParams, SamplingParams
from .quantize.options import ALSO, GROUP_SIZES, QuantizeOptions
from .times import parse_time

MediaArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MEDIA", show_default=False, help="Videos, sounds, pictures: files, URLs, data: URLs, - for stdin."
    ),
]
SpeakText = Annotated[
    str | None,
    flag("--speak", panel=ASK, show_default=False, metavar="TEXT", help="Read this aloud; - is stdin's text."),
]
AsJson = Annotated[bool, flag("--json", panel=OUT, help="One JSON object on stdout.")]
AsNdjson = Annotated[bool, flag("--ndjson", panel=OUT, help="A JSON object per event on stdout.")]
Quiet = Annotated[bool, flag("-q", "--quiet", panel=OUT, help="Nothing on stderr but errors.")]
Verbose = Annotated[
    bool, flag("-v", "--verbose", panel=OUT, help="Tell more: what computes, all warnings, where an error came from.")
]
Remember = Annotated[
    str,
    flag(
        "--remember",
        panel=RUN,
        show_default="auto: a quarter of --ram, or of what is free",
        help="Host memory for what was read so far, so that a line costs no second reading of all before it; or none.",
    ),
]
DryRun = Annotated[bool, flag("--dry-run", panel=OUT, help="Count the prompt's tokens and stop.")]
ShowPlan = Annotated[bool, flag("--plan", panel=OUT, help="Show how memory would be used here and stop.")]
Trace = Annotated[
    bool,
    flag("--trace", panel=RUN, help="Count without weights or a GPU: the real code, on tensors without data."),
]
Page = Annotated[
    str | None,
    flag(
        "--html",
        panel=OUT,
        show_default=False,
        metavar="FILE",
        help="Draw it on an HTML page that needs no other file.",
    ),
]
Beside = Annotated[
    str | None,
    flag("--vs", panel=OUT, show_default=False, metavar="FILE", help="Draw this one, kept before, beside it."),
]
Keep = Annotated[
    str | None, flag("-o", "--keep", panel=OUT, show_default=False, metavar="FILE", help="Keep the profile as JSON.")
]


@dataclass(frozen=True)
class Question:
    """What is asked, and how long the answer may be."""

    prompt: Annotated[str, flag("-p", "--prompt", panel=ASK, help="What to ask about the media, or without any.")] = ""
    system: Annotated[
        str | None, flag("--system", panel=ASK, help="Another system prompt; speech may be poor with it.")
    ] = None
    max_tokens: Annotated[int, flag("--max-tokens", panel=ASK, help="End the text after this many tokens.")] = (
        SamplingParams.max_tokens
    )

    def sampling(self, draw: Draw | None = None) -> SamplingParams:
        """So long an answer; greedy unless drawn otherwise."""
        return SamplingParams(max_tokens=self.max_tokens, **(vars(draw) if draw else {}))


@dataclass(frozen=True)
class Draw:
    """How the next word is drawn. Fields of `SamplingParams`."""

    temperature: Annotated[float, flag("--temperature", panel=ASK, help="Of the text; 0 is greedy.")] = (
        SamplingParams.temperature
    )
    top_k: Annotated[int, flag("--top-k", panel=ASK, help="Draw from this many tokens; 0 is all.")] = (
        SamplingParams.top_k
    )
    top_p: Annotated[
        float, flag("--top-p", panel=ASK, help="Draw from the likeliest tokens up to this share; 1 is all.")
    ] = SamplingParams.top_p
    seed: Annotated[int | None, flag("--seed", panel=ASK, help="Repeat an answer: text, speech and sound.")] = None


@dataclass(frozen=True)
class Sight:
    """How media are looked at and heard."""

    fps: Annotated[float, flag("--fps", panel=SEE, help="Frames of a video to look at per second.")] = MediaParams.fps
    max_frames: Annotated[int, flag("--max-frames", panel=SEE, help="Frames of a video to look at, at most.")] = (
        MediaParams.max_frames
    )
    max_pixels: Annotated[
        int | None,
        flag(
            "--max-pixels",
            panel=SEE,
            show_default=f"{MediaParams.max_pixels:,} a frame, {MediaParams.image_max_pixels:,} an image",
            help="Make pictures this small.",
        ),
    ] = None
    start: Annotated[
        str | None, flag("--start", panel=SEE, metavar="TIME", help="Begin videos and sounds here: seconds, or 1:30.")
    ] = None
    end: Annotated[
        str | None, flag("--end", panel=SEE, metavar="TIME", help="End videos and sounds here: seconds, or 1:30.")
    ] = None
    no_video_sound: Annotated[bool, flag("--no-video-sound", panel=SEE, help="Leave the sound of videos out.")] = False

    def params(self) -> MediaParams:
        """The fewest frames and the smallest pictures that are usual give way to the most that are asked for."""
        pixels = {} if self.max_pixels is None else _at_most(self.max_pixels)
        return MediaParams(
            fps=self.fps,
            max_frames=self.max_frames,
            min_frames=min(self.max_frames, MediaParams.min_frames),
            start_s=None if self.start is None else parse_time("start", self.start),
            end_s=None if self.end is None else parse_time("end", self.end),
            video_sound=not self.no_video_sound,
            **pixels,
        )


@dataclass(frozen=True)
class StandIns:
    """Media that nobody has yet, for a plan."""

    video_seconds: Annotated[
        float, flag("--video-seconds", panel=SEE, help="Plan for a video of this length, with sound.")
    ] = 0
    audio_seconds: Annotated[float, flag("--audio-seconds", panel=SEE, help="Plan for a sound of this length.")] = 0
    images: Annotated[int, flag("--images", panel=SEE, help="Plan for this many images.")] = 0
    size: Annotated[str, flag("--size", panel=SEE, help="Of such a video and such images, in pixels.")] = "1280x720"


@dataclass(frozen=True)
class Model:
    """Which model."""

    model: Annotated[str, flag("--model", panel=RUN, help="Hub id, folder, or demo: a tiny built-in one.")] = (
        DEFAULT_MODEL
    )
    revision: Annotated[str | None, flag("--revision", panel=RUN, help="Branch, tag or commit on the hub.")] = None


@dataclass(frozen=True)
class Memory:
    """How much memory a turn may take, and what it does with it."""

    vram: Annotated[
        str | None,
        flag(
            "--vram",
            panel=RUN,
            show_default="auto",
            help="Memory to stay within, such as 8GiB; auto: what is free here; in a plan what --gpu has, or no limit.",
        ),
    ] = None
    ram: Annotated[
        str | None,
        flag(
            "--ram",
            panel=RUN,
            show_default="weights stay in their files",
            help="Host memory to stay within, such as 12GiB.",
        ),
    ] = None
    kv: Annotated[
        str,
        flag("--kv", panel=RUN, help=f"{' or '.join(KV_PRECISIONS)}: int8 halves the cache, changing answers a bit."),
    ] = Limits.kv
    dtype: Annotated[
        str,
        flag(
            "--dtype", panel=RUN, help="Compute in float32, float16 or bfloat16; auto is what the model is stored in."
        ),
    ] = "auto"
    prefill_chunk: Annotated[int, flag("--prefill-chunk", panel=RUN, help="Prompt tokens to read at once.")] = (
        Limits.prefill_chunk_tokens
    )
    max_prompt_tokens: Annotated[
        int | None,
        flag("--max-prompt-tokens", panel=RUN, show_default="what the model can", help="Longest prompt."),
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

    device: Annotated[str, flag("--device", panel=RUN, help="auto, cpu, cuda or cuda:N.")] = "auto"
    kernel: Annotated[
        str | None,
        flag(
            "--kernel",
            panel=RUN,
            show_default="the best that lowvram doctor finds",
            help="Code for 4-bit weights: int4-cpu, int4-cuda, reference, triton, autoawq or gptqmodel.",
        ),
    ] = None


@dataclass(frozen=True)
class Quantizing:
    """How a checkpoint is quantized, and on what device. Fields of `QuantizeOptions`."""

    calibrate: Annotated[
        list[str] | None,
        flag(
            "--calibrate",
            panel=SEE,
            show_default="built-in texts",
            metavar="PATH",
            help="Also learn from this file or folder: .txt, .jsonl, sounds, pictures, clips. Any number of times.",
        ),
    ] = None
    samples: Annotated[int, flag("--samples", panel=SEE, help="Samples to learn from, or as many as there are.")] = (
        QuantizeOptions.samples
    )
    sample_tokens: Annotated[int, flag("--sample-tokens", panel=SEE, help="How long a sample is.")] = (
        QuantizeOptions.sample_tokens
    )
    seed: Annotated[int, flag("--seed", panel=SEE, help="Pick other samples.")] = QuantizeOptions.seed
    group_size: Annotated[
        int, flag("--group-size", panel=RUN, help=f"Inputs that share a scale: {', '.join(map(str, GROUP_SIZES))}.")
    ] = QuantizeOptions.group_size
    bits: Annotated[int, flag("--bits", panel=RUN, help="Of the thinker's weights: 4 or 8.")] = QuantizeOptions.bits
    also: Annotated[
        str | None,
        flag(
            "--also",
            panel=RUN,
            show_default=False,
            metavar="PARTS",
            help=f"Round these, too, which the published recipe leaves in 16 bit: any of {','.join(ALSO)}.",
        ),
    ] = None
    also_bits: Annotated[int, flag("--also-bits", panel=RUN, help="Of what --also names: 4 or 8.")] = (
        QuantizeOptions.also_bits
    )
    device: Annotated[str, flag("--device", panel=RUN, help="auto, cpu, cuda or cuda:N.")] = "auto"

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
        flag("--gpu", panel=RUN, show_default=False, help="A card, such as rtx-3080-10gb: its memory and its speed."),
    ] = None
    device: Annotated[str, flag("--device", panel=RUN, help="cuda or cpu, whatever is here.")] = "cuda"

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
