"""The command line: flags -> options, events -> streams, errors -> exit codes.

Results go to stdout, everything else to stderr. Heavy modules are imported inside the commands, so that `--help` and
what can be refused without a model answer at once.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from . import __version__
from .checkpoint import DEFAULT_MODEL, DEMO
from .errors import LowVRAMError, OptionError
from .events import Event, Progress, TextDelta
from .listeners import (
    JsonReply,
    Listener,
    NdjsonReply,
    ProgressLines,
    Reply,
    Speech,
    TextReply,
    answer_record,
    follow,
    progress_amount,
    speech_to,
    unused_path,
    used_lines,
    write_text,
)
from .options import SOLVERS, TALKER_SAMPLING, Limits, MediaParams, SamplingParams, Solver, SpeechParams

if TYPE_CHECKING:
    from .preprocess import PromptShape
    from .runtime import OmniRuntime

DEFAULT_OUTPUT = "reply.wav"
"""Where speech goes unless told otherwise; an older one stays, and this one becomes reply-2.wav."""

INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell reports for a program that SIGINT or SIGPIPE ended."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Qwen2.5-Omni on an ordinary gaming PC: text and speech from video, inside the VRAM you name.",
)


def _flag(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, **more)


_ASK, _SAY, _SEE, _RUN, _OUT = "Question and answer", "Speech", "Media", "Model and memory", "Output"

Media = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MEDIA", show_default=False, help="Videos, sounds, pictures: files, URLs, data: URLs, - for stdin."
    ),
]
Prompt = Annotated[str, _flag("-p", "--prompt", panel=_ASK, help="What to say about the media, or instead of them.")]
System = Annotated[str | None, _flag("--system", panel=_ASK, help="Another system prompt; speech may be poor with it.")]
MaxTokens = Annotated[int, _flag("--max-tokens", panel=_ASK, help="End the text after this many tokens.")]
Temperature = Annotated[float, _flag("--temperature", panel=_ASK, help="Of the text; 0 is greedy.")]
TopK = Annotated[int, _flag("--top-k", panel=_ASK, help="Draw from this many tokens; 0 is all.")]
TopP = Annotated[float, _flag("--top-p", panel=_ASK, help="Draw from the likeliest tokens up to this share; 1 is all.")]
Seed = Annotated[int | None, _flag("--seed", panel=_ASK, help="Repeat an answer: text, speech and sound.")]

Output = Annotated[
    str | None,
    _flag(
        "-o",
        "--output",
        panel=_SAY,
        show_default=f"a new {DEFAULT_OUTPUT}",
        help="WAV file; - is raw s16le at 24 kHz on stdout.",
    ),
]
NoSpeech = Annotated[bool, _flag("--no-speech", panel=_SAY, help="Answer in text alone.")]
VoiceName = Annotated[str | None, _flag("--voice", panel=_SAY, show_default="the first", help="Chelsie or Ethan.")]
MaxCodes = Annotated[int, _flag("--max-codes", panel=_SAY, help="End the speech after this many codes, 50 a second.")]
SpeechTemperature = Annotated[float, _flag("--speech-temperature", panel=_SAY, help="Of the codes; 0 is greedy.")]
Steps = Annotated[int, _flag("--steps", panel=_SAY, help="Points of the grid that sound is solved on.")]
Guidance = Annotated[float, _flag("--guidance", panel=_SAY, help="How strictly sound follows the codes.")]
SolverName = Annotated[str, _flag("--solver", panel=_SAY, help=f"One of: {', '.join(SOLVERS)}.")]
ChunkSeconds = Annotated[float, _flag("--chunk-seconds", panel=_SAY, help="Sound to hand out at a time.")]

Fps = Annotated[float, _flag("--fps", panel=_SEE, help="Frames of a video to look at per second.")]
MaxFrames = Annotated[int, _flag("--max-frames", panel=_SEE, help="Frames of a video to look at, at most.")]
MaxPixels = Annotated[
    int | None,
    _flag(
        "--max-pixels",
        panel=_SEE,
        show_default=f"{MediaParams.max_pixels:,} a frame, {MediaParams.image_max_pixels:,} an image",
        help="Make pictures this small.",
    ),
]
Start = Annotated[float | None, _flag("--start", panel=_SEE, help="Begin videos and sounds here (seconds).")]
End = Annotated[float | None, _flag("--end", panel=_SEE, help="End videos and sounds here (seconds).")]
NoVideoSound = Annotated[bool, _flag("--no-video-sound", panel=_SEE, help="Leave the sound of videos out.")]

Model = Annotated[str, _flag("--model", panel=_RUN, help="Hub id, folder, or demo: a tiny built-in one.")]
Revision = Annotated[str | None, _flag("--revision", panel=_RUN, help="Branch, tag or commit on the hub.")]
Vram = Annotated[
    str | None, _flag("--vram", panel=_RUN, show_default="what is free", help="Memory to stay within, such as 8GiB.")
]
DeviceName = Annotated[str, _flag("--device", panel=_RUN, help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, _flag("--dtype", panel=_RUN, help="auto, float32, float16 or bfloat16.")]
Kernel = Annotated[str | None, _flag("--kernel", panel=_RUN, show_default="the best", help="Code for 4-bit weights.")]
PrefillChunk = Annotated[int, _flag("--prefill-chunk", panel=_RUN, help="Prompt tokens to read at once.")]
MaxPromptTokens = Annotated[
    int | None,
    _flag("--max-prompt-tokens", panel=_RUN, show_default="what the model can", help="Longest prompt."),
]

Json = Annotated[bool, _flag("--json", panel=_OUT, help="One JSON object on stdout.")]
Ndjson = Annotated[bool, _flag("--ndjson", panel=_OUT, help="A JSON object per event on stdout.")]
Quiet = Annotated[bool, _flag("-q", "--quiet", panel=_OUT, help="Nothing on stderr but errors.")]
Verbose = Annotated[bool, _flag("-v", "--verbose", panel=_OUT, help="Show where an error came from, and warnings.")]

SHORT_QUESTION = "?"
"""What is planned for when nothing is asked, as `OmniRuntime.plan` does."""

ABOUT_SPEECH = (
    "--output",
    "--voice",
    "--max-codes",
    "--speech-temperature",
    "--steps",
    "--guidance",
    "--solver",
    "--chunk-seconds",
)
ABOUT_MEDIA = ("--fps", "--max-frames", "--max-pixels", "--start", "--end", "--no-video-sound")
CONTRADICTIONS = (
    *(("--no-speech", option) for option in ABOUT_SPEECH),
    ("--quiet", "--verbose"),
    ("--json", "--ndjson"),
    ("--json", "--output -"),
    ("--ndjson", "--output -"),
    ("--dry-run", "--plan"),
    ("--ndjson", "--dry-run"),
    ("--ndjson", "--plan"),
)
"""Pairs of which at most one can be given. Raw sound and JSON would both want stdout; only an answer has events."""

A_HUB_MODEL = "a --model on the hub"
PREREQUISITES = (*((option, "media") for option in ABOUT_MEDIA), ("--revision", A_HUB_MODEL))
"""Options that mean something only beside another."""

MAY_BE_EMPTY = ("--prompt", "--system")

TYPED_AS = {"chunk_s": "--chunk-seconds", "prefill_chunk_tokens": "--prefill-chunk"}
"""Fields of options whose flag has another name."""


def main() -> None:
    """The program `lowvram`. Its streams are UTF-8 on every system, also where the console's own encoding is not, and
    lead nowhere where there is no console (pythonw on Windows)."""
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    app()


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _print_version(wanted: bool) -> None:
    if wanted:
        with _exit_codes():
            write_text(f"lowvram {__version__}", sys.stdout)
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    ctx: typer.Context,
    media: Media = None,
    prompt: Prompt = "",
    system: System = None,
    max_tokens: MaxTokens = SamplingParams.max_tokens,
    temperature: Temperature = SamplingParams.temperature,
    top_k: TopK = SamplingParams.top_k,
    top_p: TopP = SamplingParams.top_p,
    seed: Seed = None,
    output: Output = None,
    no_speech: NoSpeech = False,
    voice: VoiceName = None,
    max_codes: MaxCodes = TALKER_SAMPLING.max_tokens,
    speech_temperature: SpeechTemperature = TALKER_SAMPLING.temperature,
    steps: Steps = SpeechParams.steps,
    guidance: Guidance = SpeechParams.guidance,
    solver: SolverName = SpeechParams.solver,
    chunk_seconds: ChunkSeconds = SpeechParams.chunk_s,
    fps: Fps = MediaParams.fps,
    max_frames: MaxFrames = MediaParams.max_frames,
    max_pixels: MaxPixels = None,
    start: Start = None,
    end: End = None,
    no_video_sound: NoVideoSound = False,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    vram: Vram = None,
    device: DeviceName = "auto",
    dtype: Dtype = "auto",
    kernel: Kernel = None,
    prefill_chunk: PrefillChunk = Limits.prefill_chunk_tokens,
    max_prompt_tokens: MaxPromptTokens = Limits.max_prompt_tokens,
    as_json: Json = False,
    ndjson: Ndjson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    dry_run: Annotated[bool, _flag("--dry-run", panel=_OUT, help="Count the prompt's tokens and stop.")] = False,
    plan: Annotated[bool, _flag("--plan", panel=_OUT, help="Show how memory would be used and stop.")] = False,
) -> None:
    """Answer about media, a prompt, or both: text to stdout as it comes, speech to a WAV file."""
    with _exit_codes(verbose), ExitStack() as stack:
        _refuse(_typed(ctx))
        with _named_as_typed():
            limits = Limits(prefill_chunk_tokens=prefill_chunk, max_prompt_tokens=max_prompt_tokens)
            pictures = MediaParams(
                fps=fps,
                start_s=start,
                end_s=end,
                video_sound=not no_video_sound,
                **_frame_bounds(max_frames),
                **_pixel_bounds(max_pixels),
            )
            sampling = SamplingParams(
                max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
            )
            talking = SpeechParams(
                voice=voice,
                sampling=_talker_sampling(max_codes, speech_temperature),
                steps=steps,
                guidance=guidance,
                solver=cast("Solver", solver),
                chunk_s=chunk_seconds,
            )
        spoken = None if no_speech else talking
        progress = stack.enter_context(closing(_progress(quiet)))
        stack.enter_context(_warnings_shown(progress))
        _refuse_to_overwrite(media or [], output)
        speech = _speech(output) if spoken and not (dry_run or plan) else Speech()
        if plan and not media:
            prompt = prompt or SHORT_QUESTION
        messages = _messages(media or [], prompt, system, limits, stack)
        if not verbose:
            _hush()
        runtime = stack.enter_context(
            _open(model, progress, limits, revision=revision, vram=vram, device=device, dtype=dtype, kernel=kernel)
        )
        if dry_run:
            _print_shape(runtime.measure(messages, media=pictures), as_json)
        elif plan:
            planned = runtime.plan(messages, sampling=sampling, speech=spoken, media=pictures)
            write_text(json.dumps(planned.to_json()) if as_json else str(planned), sys.stdout)
        else:
            events = runtime.generate(messages, sampling=sampling, speech=spoken, media=pictures)
            reply = (JsonReply if as_json else NdjsonReply if ndjson else TextReply)(_words_to(output))
            record, interrupted = _answer(runtime, model, events, progress, speech, reply)
            if not quiet:
                write_text("\n".join(used_lines(record)), sys.stderr)
            if interrupted:
                raise typer.Exit(INTERRUPTED)


@app.command()
def plan(
    ctx: typer.Context,
    media: Media = None,
    prompt: Prompt = "",
    system: System = None,
    max_tokens: MaxTokens = SamplingParams.max_tokens,
    no_speech: NoSpeech = False,
    max_codes: MaxCodes = TALKER_SAMPLING.max_tokens,
    fps: Fps = MediaParams.fps,
    max_frames: MaxFrames = MediaParams.max_frames,
    max_pixels: MaxPixels = None,
    start: Start = None,
    end: End = None,
    no_video_sound: NoVideoSound = False,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    vram: Vram = None,
    device: DeviceName = "auto",
    dtype: Dtype = "auto",
    kernel: Kernel = None,
    prefill_chunk: PrefillChunk = Limits.prefill_chunk_tokens,
    max_prompt_tokens: MaxPromptTokens = Limits.max_prompt_tokens,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show how an answer would use the device, without reading a weight: the same as run --plan.

    Without media and prompt: how a short question would.
    """
    run(**locals(), plan=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine offers: versions, devices, the kernel for 4-bit weights, caches and free disk."""
    from .doctor import examine, report_lines

    with _exit_codes():
        report = examine()
        write_text(json.dumps(report) if as_json else "\n".join(report_lines(report)), sys.stdout)


@app.command()
def demo_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    seed: Annotated[int, typer.Option("--seed", help="Other weights.")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="The smallest one, for tests.")] = False,
) -> None:
    """Write the built-in demo checkpoint to a folder. It has all of an Omni's parts; its words are gibberish."""
    from .demo import TINY, DemoSize, build_demo

    with _exit_codes():
        _hush()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OptionError(f"{folder} exists and is not an empty folder", hint="name a new one")
        try:
            build_demo(folder, seed=seed, size=TINY if tiny else DemoSize())
        except OSError as error:
            raise OptionError(f"the demo checkpoint cannot be written to {folder}: {error.strerror}") from error
        write_text(str(folder), sys.stdout)


@contextmanager
def _exit_codes(verbose: bool = False) -> Iterator[None]:
    """End the program as its errors say: one sentence on stderr, and where it came from if that is asked for."""
    try:
        yield
    except LowVRAMError as error:
        if verbose:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    except BrokenPipeError as error:
        raise typer.Exit(BROKEN_PIPE) from error
    finally:
        _drop_unwritten(sys.stdout)


def _drop_unwritten(out: TextIO) -> None:
    """Python flushes a stream once more on its way out, and would complain of what could not be written before."""
    try:
        out.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _typed(ctx: typer.Context) -> dict[str, Any]:
    """What was typed, whatever its value: {"--output": "-", "media": [...]}, by the longest name of each."""
    sources = {param: ctx.get_parameter_source(param.name or "") for param in ctx.command.params}
    typed = [param for param, source in sources.items() if source and source.name == "COMMANDLINE"]
    return {max(param.opts, key=len): ctx.params[param.name or ""] for param in typed}


def _refuse(typed: Mapping[str, Any]) -> None:
    """Refuse what contradicts itself, means nothing or is empty. An option at its default is not typed."""
    given = {*typed, *([A_HUB_MODEL] if _is_on_hub(typed.get("--model", DEFAULT_MODEL)) else [])}
    if typed.get("--output") == "-":
        given.add("--output -")
    for one, other in CONTRADICTIONS:
        if {one, other} <= given:
            raise OptionError(f"{one} and {other} contradict each other", hint="give one of them")
    for option, needed in PREREQUISITES:
        if option in given and needed not in given:
            raise OptionError(f"{option} has no effect without {needed}", hint=f"leave {option} out")
    for option, value in typed.items():
        if value == "" and option not in MAY_BE_EMPTY:
            raise OptionError(f"{option} is empty: 0 characters", hint="give it a value, or leave it out")


def _is_on_hub(model: str) -> bool:
    return model != DEMO and not os.path.isdir(os.path.expanduser(model))


@contextmanager
def _named_as_typed() -> Iterator[None]:
    """A complaint begins with the field that is wrong; here it begins with the flag."""
    try:
        yield
    except OptionError as error:
        field, _, complaint = str(error.args[0]).partition(" ")
        flag = TYPED_AS.get(field, f"--{field.replace('_', '-')}")
        raise OptionError(f"{flag} {complaint}", hint=error.hint) from error


def _frame_bounds(max_frames: int) -> dict[str, int]:
    """Videos of at most `max_frames`; the fewest allowed ones give way to it."""
    return {"max_frames": max_frames, "min_frames": min(max_frames, MediaParams.min_frames)}


def _refuse_to_overwrite(sources: Sequence[str], output: str | None) -> None:
    """An answer must not replace the question."""
    for source in sources:
        if output and os.path.exists(output) and os.path.exists(source) and os.path.samefile(source, output):
            raise OptionError(f"{output} is a medium to be read, and would be written over", hint="name another -o")


def _pixel_bounds(max_pixels: int | None) -> dict[str, int]:
    """Frames and images of at most `max_pixels`; the smallest allowed ones give way to it."""
    if max_pixels is None:
        return {}
    return {
        "max_pixels": max_pixels,
        "min_pixels": min(max_pixels, MediaParams.min_pixels),
        "image_max_pixels": max_pixels,
        "image_min_pixels": min(max_pixels, MediaParams.image_min_pixels),
    }


def _talker_sampling(max_codes: int, temperature: float) -> SamplingParams:
    """The reference's draw with two values of its own, which `SamplingParams` would call by the text's names."""
    if max_codes < 1:
        raise OptionError(f"max_codes is {max_codes}, but speech has at least 1 code", hint="or pass --no-speech")
    if not 0 <= temperature < math.inf:
        raise OptionError(f"speech_temperature is {temperature}, but must be 0 (greedy) or a positive number")
    return replace(TALKER_SAMPLING, max_tokens=max_codes, temperature=temperature)


def _speech(output: str | None) -> Speech:
    return speech_to(str(unused_path(Path(DEFAULT_OUTPUT))) if output is None else output, sys.stdout)


def _messages(
    sources: Sequence[str], prompt: str, system: str | None, limits: Limits, stack: ExitStack
) -> list[dict[str, Any]]:
    """The conversation that the arguments mean: media in order, each as what its content is, then the words."""
    if not sources and not prompt:
        raise OptionError("nothing to answer: 0 media and no prompt", hint='try: lowvram run clip.mp4 -p "Who speaks?"')
    parts = [_part(source, limits, stack) for source in sources]
    if prompt:
        parts.append({"type": "text", "text": prompt})
    turns = [{"role": "user", "content": parts}]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _part(source: str, limits: Limits, stack: ExitStack) -> dict[str, Any]:
    """A medium as a message part. A pipe or a download is read once, here, and kept until `stack` is left."""
    from .media import open_medium
    from .media.sources import open_stored

    stored = stack.enter_context(open_stored(source, limits))
    reader = stored.reader()
    reader.raw.name = stored.name  # type: ignore[attr-defined]  # how messages call it
    with open_medium(reader, limits) as medium:
        return {"type": medium.kind, medium.kind: reader}


def _progress(quiet: bool) -> Listener:
    if quiet:
        return Listener()
    return Bar() if sys.stderr.isatty() else ProgressLines(sys.stderr)


class _Warnings(logging.Handler):
    """What the package warns of, a line each beside the progress."""

    def __init__(self, progress: Listener) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.say(f"warning: {record.getMessage()}")


@contextmanager
def _warnings_shown(progress: Listener) -> Iterator[None]:
    log, handler = logging.getLogger(__package__), _Warnings(progress)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _words_to(output: str | None) -> TextIO:
    """Words make way on stdout for raw sound."""
    return sys.stderr if output == "-" else sys.stdout


def _open(model: str, progress: Listener, limits: Limits, **places: Any) -> OmniRuntime:
    from .runtime import OmniRuntime

    def on_download(done: int, total: int | None) -> None:
        progress.show(Progress("download", done, total, "bytes"))

    return OmniRuntime.open(model, limits=limits, on_download=on_download, **places)


def _hush() -> None:
    """Silence the modelling library's warnings, which are for people who write models; only a door may do so."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def _answer(
    runtime: OmniRuntime, model: str, events: Iterator[Event], progress: Listener, speech: Speech, reply: Reply
) -> tuple[dict[str, Any], bool]:
    """Hand out an answer as it comes, then the whole of it; returns that, and whether Ctrl-C ended it early."""
    from .offload.meter import process_bytes

    finished, interrupted = follow(events, (progress, speech, reply), runtime.cancel)
    record = answer_record(
        finished,
        model=model,
        device=runtime.device.title,
        kernel=runtime.kernel,
        audio_path=speech.written_to,
        peak_resident_bytes=process_bytes().peak_resident_bytes,
    )
    reply.end(record)
    if speech.failure:
        raise speech.failure
    return record, interrupted


class Bar(Listener):
    """Progress for a person: a bar on stderr that tells what is being done, gone as soon as there are words to read."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Display

        self._display = Display(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._display.add_task("", total=None, amount="")
        self._over = False

    def show(self, event: Event) -> None:
        match event:
            case TextDelta():
                self.close()
                self._over = True
            case Progress(stage=stage, done=done, total=total) if not self._over:
                self._display.start()
                amount = progress_amount(event)
                self._display.update(self._task, description=stage, completed=done, total=total, amount=amount)

    def say(self, line: str) -> None:
        self._display.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._display.stop()


def _print_shape(shape: PromptShape, as_json: bool) -> None:
    if as_json:
        write_text(json.dumps(asdict(shape)), sys.stdout)
        return
    write_text(
        f"{shape.prompt_tokens} prompt tokens: {shape.text_tokens} text, {shape.image_tokens} image,"
        f" {shape.audio_tokens} audio, {shape.video_tokens} video",
        sys.stdout,
    )
    for medium in shape.media:
        write_text(f"{medium.tokens:>8}  {medium.kind}  {medium.name}", sys.stdout)
