"""The command line: each command takes groups of flags, and hands their options to what does its work.

Results go to stdout, everything else to stderr. Heavy modules are imported inside the commands, so that `--help`, what
can be refused without a model, and `plan` answer at once.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from . import __version__
from .answering import Places, answer, hand_out, raise_failure, sounds_for, words_to
from .contradictions import IN_A_CHAT, PREREQUISITES, named_as_typed, refuse, refuse_to_overwrite
from .conversation import Chat, open_part, text_to_speak, typed_lines
from .errors import InfeasibleBudgetError, OptionError
from .exit_codes import INTERRUPTED, exit_codes, told_and_forgotten
from .flag_groups import spread
from .flags import (
    AsJson,
    AsNdjson,
    Beside,
    Draw,
    DryRun,
    Keep,
    Machine,
    MediaArgument,
    Memory,
    Model,
    Page,
    Quantizing,
    Question,
    Quiet,
    Remember,
    ShowPlan,
    Sight,
    SpeakText,
    StandIns,
    Target,
    Trace,
    Verbose,
)
from .listeners import JsonReply, NdjsonReply, TextReply, write_text
from .opening import download_shown, messages_asked, open_preprocessor, open_runtime, quieten_transformers
from .options import SpeechParams
from .speech_flags import Play, Sound, Voice, VoiceName
from .terminal import progress_shown

if TYPE_CHECKING:
    from .offload.plan import Plan
    from .runtime import OmniRuntime

BOXES_NEED_COLUMNS = 72
"""In a narrower terminal, boxes of help would cut the names of flags short; plain lines are wrapped."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if get_terminal_size().columns >= BOXES_NEED_COLUMNS else None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Qwen2.5-Omni on an ordinary gaming PC: text and speech from video, inside the VRAM you name.",
    epilog="To try it without a download: lowvram run clip.mp4 --model demo",
)


def main() -> None:
    """The program `lowvram`. Its streams are UTF-8 on every system, also where the console's own encoding is not, and
    lead nowhere where there is no console (pythonw on Windows)."""
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    with exit_codes():  # for Ctrl-C before a command begins
        app()


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _print_version(wanted: bool) -> None:
    if wanted:
        with exit_codes():
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
@spread
def run(
    ctx: typer.Context,
    question: Question,
    draw: Draw,
    voice: Voice,
    sound: Sound,
    sight: Sight,
    model: Model,
    memory: Memory,
    machine: Machine,
    media: MediaArgument = None,
    speak: SpeakText = None,
    as_json: AsJson = False,
    ndjson: AsNdjson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    dry_run: DryRun = False,
    plan: ShowPlan = False,
) -> None:
    """Answer about media, a prompt, or both: text to stdout as it comes, speech to a file or the loudspeaker."""
    with exit_codes(verbose), ExitStack() as stack:
        typed = _typed(ctx)
        refuse(typed)
        with named_as_typed():
            limits, seen, spoken = memory.limits(), sight.params(), sound.params(voice, draw.seed)
            sampling = question.sampling(draw)
        progress = stack.enter_context(progress_shown(quiet, verbose))
        refuse_to_overwrite(media or [], voice.output)
        sounds = sounds_for(voice) if spoken and not (dry_run or plan) else []
        messages = [] if speak else messages_asked(typed, question, media, limits, stack, at_least_short=plan)
        if dry_run:
            shape = open_preprocessor(model, progress, verbose).measure(messages, seen, limits)
            write_text(json.dumps(asdict(shape)) if as_json else str(shape), sys.stdout)
            return
        runtime = stack.enter_context(open_runtime(model, memory, machine, limits, progress, verbose))
        if plan:
            about = {"model": model.model, "origin": f"the headers in {runtime.checkpoint.folder}"}
            with _refusal_shown(as_json, about):
                planned = runtime.plan(messages, sampling=sampling, speech=spoken, media=seen)
            _print_plan(planned, runtime, as_json, about)
        else:
            if speak and spoken:
                events = runtime.speak(text_to_speak(speak), speech=spoken)
            else:
                events = runtime.generate(messages, sampling=sampling, speech=spoken, media=seen)
            reply = (JsonReply if as_json else NdjsonReply if ndjson else TextReply)(words_to(voice.output))
            places = Places(progress, sounds, reply)
            if answer(runtime, model.model, events, places, speech=spoken):
                raise typer.Exit(INTERRUPTED)


@app.command()
@spread
def chat(
    ctx: typer.Context,
    question: Question,
    draw: Draw,
    sight: Sight,
    model: Model,
    memory: Memory,
    machine: Machine,
    media: MediaArgument = None,
    play: Play = False,
    voice: VoiceName = None,
    remember: Remember = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Talk turn by turn: a line of stdin each, all of it remembered. /add FILE shows a medium, /quit ends."""
    with exit_codes(verbose), ExitStack() as stack:
        refuse(_typed(ctx), IN_A_CHAT)
        with named_as_typed():
            limits, seen, sampling = memory.limits(), sight.params(), question.sampling(draw)
            spoken = SpeechParams(voice=voice, mode="balanced") if play else None
        said = Chat(lambda source: open_part(source, limits, stack), media or [], question.system)
        with progress_shown(quiet, verbose) as progress:
            kept = None if remember == "none" else remember
            opened = open_runtime(model, memory, machine, limits, progress, verbose, remember=kept)
            runtime = stack.enter_context(opened)
        for line in typed_lines(question.prompt):
            with told_and_forgotten(verbose), progress_shown(quiet, verbose) as progress:
                if messages := said.take(line):
                    sounds = sounds_for(Voice(play=True)) if play else []
                    events = runtime.generate(messages, sampling=sampling, speech=spoken, media=seen)
                    finished, _ = hand_out(runtime, events, Places(progress, sounds, TextReply(sys.stdout)))
                    if finished.text:
                        said.keep(messages, finished.text)
                    raise_failure(sounds)


@app.command()
@spread
def plan(
    ctx: typer.Context,
    question: Question,
    sound: Sound,
    sight: Sight,
    stand_ins: StandIns,
    model: Model,
    memory: Memory,
    target: Target,
    media: MediaArgument = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show how an answer would use memory, on any card, at once: nothing is loaded, no weight is downloaded.

    Without media and prompt: how a short question would. Exit code 0: it fits; 4: it does not.

    For this machine, with what is free on it now: run --plan.
    """
    from .forecast import forecast
    from .planning import find_headers
    from .workload import count_turn, read_stand_ins

    with exit_codes(verbose), ExitStack() as stack:
        typed = _typed(ctx)
        refuse(typed)
        with named_as_typed():
            limits, seen, spoken = memory.limits(), sight.params(), sound.params()
            sampling, others = question.sampling(), read_stand_ins(*astuple(stand_ins))
            device = target.place()
        budget, gpu = memory.budget(), target.card()
        messages = messages_asked(typed, question, media, limits, stack, at_least_short=True)
        headers = find_headers(model.model, model.revision)
        work = count_turn(headers, messages, others, media=seen, limits=limits, sampling=sampling, speech=spoken)
        with _refusal_shown(as_json, {"model": headers.name, "origin": headers.origin}):
            found = forecast(headers, work, budget, limits, card=gpu, device=device, dtype=memory.dtype)
        write_text(json.dumps(found.to_json()) if as_json else str(found), sys.stdout)


@app.command()
@spread
def profile(
    ctx: typer.Context,
    question: Question,
    sound: Sound,
    sight: Sight,
    stand_ins: StandIns,
    model: Model,
    memory: Memory,
    machine: Machine,
    media: MediaArgument = None,
    trace: Trace = False,
    html: Page = None,
    vs: Beside = None,
    keep: Keep = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what memory an answer really takes, phase by phase and step by step, beside what is planned.

    The answer is made and measured here; with --trace, at the model's full size without its weights and without a GPU.
    """
    from .device import open_device
    from .planning import find_headers
    from .profile_command import (
        NOTHING_YET,
        Asked,
        Outputs,
        measure_answer,
        open_counter,
        patience,
        profile_text,
        trace_answer,
    )
    from .workload import count_turn, read_stand_ins

    with exit_codes(verbose), ExitStack() as stack:
        typed = _typed(ctx)
        refuse(typed, (*PREREQUISITES, *NOTHING_YET))
        with named_as_typed():
            limits, seen, spoken = memory.limits(), sight.params(), sound.params()
            sampling, others = question.sampling(), read_stand_ins(*astuple(stand_ins))
        outputs = Outputs.of(html, keep, vs, media or [])
        messages = messages_asked(typed, question, media, limits, stack, at_least_short=True)
        progress = stack.enter_context(progress_shown(quiet, verbose))
        meter = None if trace else open_counter(open_device(machine.device))
        if not quiet and (reason := patience(meter)):
            progress.say(reason)
        if meter is None:
            headers = find_headers(model.model, model.revision)
            work = count_turn(headers, messages, others, media=seen, limits=limits, sampling=sampling, speech=spoken)
            recorded = trace_answer(headers, work, memory.budget(), limits, speech=spoken, dtype=memory.dtype)
        else:
            runtime = stack.enter_context(open_runtime(model, memory, machine, limits, progress, verbose, meter))
            asked = Asked(messages, sampling, spoken, seen)
            recorded = measure_answer(runtime, meter, asked, model=model.model, on_event=progress.show)
        write_text(profile_text(recorded, as_json=as_json), sys.stdout)
        outputs.write(recorded)


@app.command()
@spread
def voices(model: Model, as_json: AsJson = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the voices of a model; the first one speaks unless another is named."""
    from .checkpoint import SPEAKERS_FILE
    from .planning import find_description
    from .voices import load_speakers

    with exit_codes(verbose):
        with progress_shown(quiet, verbose) as progress:
            folder, config = find_description(model.model, model.revision, download_shown(progress))
        names = list(load_speakers(folder / SPEAKERS_FILE)) if config.get("enable_audio_output", True) else []
        for line in [json.dumps(names)] if as_json else names:
            write_text(line, sys.stdout)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine offers: versions, devices, kernels for 4-bit weights, caches and free disk."""
    from .doctor import examine, report_lines

    with exit_codes():
        report = examine()
        write_text(json.dumps(report) if as_json else "\n".join(report_lines(report)), sys.stdout)


@app.command()
@spread
def quantize(
    ctx: typer.Context,
    quantizing: Quantizing,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A 16-bit checkpoint: hub id or folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new folder, or one of a run that was stopped.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint anew with its thinker in 4 bits (AWQ), or as asked. Started again after a stop, it goes on.

    One layer is on the device at a time, so that 4 GB of VRAM do for a 7B. What it cost is told layer by layer.
    """
    from .device import open_device
    from .quantize import quantize_checkpoint
    from .quantize_command import follow_run, report_text

    with exit_codes(verbose):
        refuse(_typed(ctx))
        with named_as_typed():
            options = quantizing.options()
        if not verbose:
            quieten_transformers()
        with progress_shown(quiet, verbose) as progress:
            device, show = open_device(quantizing.device), download_shown(progress)
            report = follow_run(quantize_checkpoint(source, target, options, device=device, on_download=show), progress)
        write_text(json.dumps(report.to_json()) if as_json else report_text(report), sys.stdout)


@app.command()
def demo_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    seed: Annotated[int, typer.Option("--seed", help="Other weights.")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="The smallest one, for tests.")] = False,
    sixteen_bit: Annotated[bool, typer.Option("--16bit", help="Not quantized: to try lowvram quantize with.")] = False,
) -> None:
    """Write the built-in demo checkpoint to a folder. It has all of an Omni's parts; its words are gibberish."""
    from .demo import TINY, DemoSize, build_demo

    with exit_codes():
        quieten_transformers()
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise OptionError(f"{folder} exists and is not an empty folder", hint="name a new one")
            build_demo(folder, seed=seed, quantized=not sixteen_bit, size=TINY if tiny else DemoSize())
        except OSError as error:
            raise OptionError(f"the demo checkpoint cannot be written to {folder}: {error.strerror}") from error
        write_text(str(folder), sys.stdout)


def _typed(ctx: typer.Context) -> dict[str, Any]:
    """What was typed, whatever its value: {"--output": "-", "media": [...]}, by the longest name of each."""
    sources = {param: ctx.get_parameter_source(param.name or "") for param in ctx.command.params}
    typed = [param for param, source in sources.items() if source and source.name == "COMMANDLINE"]
    return {max(param.opts, key=len): ctx.params[param.name or ""] for param in typed}


@contextmanager
def _refusal_shown(as_json: bool, about: dict[str, str]) -> Iterator[None]:
    """A turn that does not fit is an answer, too, to whoever asked for a plan as JSON."""
    from .forecast import refusal_record

    try:
        yield
    except InfeasibleBudgetError as error:
        if as_json:
            write_text(json.dumps(about | refusal_record(error)), sys.stdout)
        raise


def _print_plan(planned: Plan, runtime: OmniRuntime, as_json: bool, about: dict[str, str]) -> None:
    """A plan for this machine, and what would compute."""
    computes = {**about, "fits": True, "device_title": runtime.device.title, "kernel": runtime.kernel}
    text = f"{planned}\nkernel {runtime.kernel} on {runtime.device.title}"
    write_text(json.dumps(computes | planned.to_json()) if as_json else text, sys.stdout)
