"""Events -> what leaves the program: text or JSON for whoever asked, sound for a file or a pipe, progress for a log.

Each listener writes to the one place it is given; `follow` feeds them, and lets a first Ctrl-C end the answer. Which
places those are is decided in `answering`.
"""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from .checkpoint import DEMO
from .errors import LowVRAMError, OptionError
from .events import AudioChunk, Event, Finished, Progress, TextDelta
from .offload.budget import format_bytes
from .token2wav.windows import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    import numpy as np

    from .sound_file import SoundWriter


TOLD = (
    "text",
    "text_ids",
    "codec_ids",
    "prompt_tokens",
    "finish_reason",
    "speech_finish_reason",
    "audio_rtf",
    "audio_underrun_s",
    "timings",
)
"""Fields of `Finished` that a record has by the same names, null where an answer broke off before they were known."""


class Listener:
    """Follows an answer event by event; `close` comes last, whatever ended it. This one shows nothing."""

    def show(self, event: Event) -> None: ...

    def say(self, line: str) -> None:
        """Tell a person what no event tells."""

    def close(self) -> None: ...


class Reply(Listener):
    """A listener that writes the answer to `out`. It is given the whole in the end, or what there is of it where an
    error was the end (`answer_record`)."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def end(self, record: Mapping[str, Any]) -> None: ...


class TextReply(Reply):
    """The answer's words as they come, and a newline after the last, whatever ended them."""

    def __init__(self, out: TextIO) -> None:
        super().__init__(out)
        self._line_is_open = False

    def show(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self._line_is_open = not event.text.endswith("\n")
            write_text(event.text, self._out, end="")

    def close(self) -> None:
        if self._line_is_open:
            write_text("", self._out)


class JsonReply(Reply):
    """One JSON object, at the end."""

    def end(self, record: Mapping[str, Any]) -> None:
        _print_json(record, self._out)


class NdjsonReply(Reply):
    """A JSON object per line for every event as it happens; the last one is the whole answer."""

    def show(self, event: Event) -> None:
        if not isinstance(event, Finished):
            _print_json(event_record(event), self._out)

    def end(self, record: Mapping[str, Any]) -> None:
        _print_json({"event": "finished", **record}, self._out)


class SoFar(Listener):
    """What is known of an answer before its end, by the names that `Finished` has for it."""

    finish_reason = "error"
    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self) -> None:
        self.text = ""
        self.audio_s = 0.0

    def show(self, event: Event) -> None:
        match event:
            case TextDelta():
                self.text += event.text
            case AudioChunk():
                self.audio_s += len(event.samples) / event.sample_rate_hz


class Speech(Listener):
    """The answer's sound. `written_to` says where it went, None while nowhere, and `was_played` whether it was heard;
    `failure` what stopped it, which is for afterwards: the words of the answer go on."""

    written_to: str | None = None
    was_played: bool = False
    failure: LowVRAMError | None = None

    def hush(self) -> None:
        """Nobody wants to hear the rest of it."""


class SpeechFile(Speech):
    """Sound to a file of the kind that its name says.

    The file is opened with the first sound, so that a turn that fails before that leaves an older file alone. One that
    is to be new (`is_new`) gets its name then, too (`new_file`).
    """

    def __init__(self, path: Path, *, is_new: bool = False) -> None:
        self._path = path
        self._is_new = is_new
        self._writer: SoundWriter | None = None

    def show(self, event: Event) -> None:
        if isinstance(event, AudioChunk) and not self.failure:
            with self._failing_later():
                self._write(event.samples)

    def close(self) -> None:
        if self._writer:
            with self._failing_later():
                self._writer.close()

    def _write(self, samples: np.ndarray) -> None:
        from .sound_file import open_sound_file

        if self._writer is None:
            path = new_file(self._path) if self._is_new else self._path
            self._writer = open_sound_file(path)
            self.written_to = str(path)
        self._writer.write(samples)

    @contextmanager
    def _failing_later(self) -> Iterator[None]:
        try:
            yield
        except LowVRAMError as error:
            self.failure = self.failure or error


class SpeechPipe(Speech):
    """Sound to a pipe: raw 16-bit little-endian samples, as they come."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def show(self, event: Event) -> None:
        if isinstance(event, AudioChunk):
            from .token2wav.wav import write_pcm

            self.written_to = "stdout"
            with _writing():
                write_pcm(self._out, event.samples)


class ProgressLines(Listener):
    """Progress for a log: a line when a part of the turn begins, and one when it is done. A log that takes no more (a
    full disk, a reader that left) is no reason to end an answer."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._running = ""

    def show(self, event: Event) -> None:
        if not isinstance(event, Progress):
            return
        if event.done == event.total or event.stage != self._running:
            self.say(f"{event.stage}: {progress_amount(event)}")
        self._running = "" if event.done == event.total else event.stage

    def say(self, line: str) -> None:
        with suppress(LowVRAMError, BrokenPipeError):
            write_text(line, self._out)


class _Interrupt:
    """While entered, the first Ctrl-C cancels and the second interrupts, as if nobody listened."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.happened = False
        self._cancel = cancel

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._first)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _first(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.happened = True
        self._cancel()


def follow(events: Iterator[Event], listeners: Sequence[Listener], cancel: Callable[[], None]) -> tuple[Finished, bool]:
    """Show every event to every listener; returns the last, and whether a first Ctrl-C cancelled the answer."""
    interrupt = _Interrupt(cancel)
    with ExitStack() as stack:
        for listener in listeners:
            stack.callback(listener.close)
        # Until something has happened there is nothing to keep: Ctrl-C is still Python's own.
        first = next(events)
        stack.enter_context(interrupt)
        for event in chain([first], events):
            for listener in listeners:
                listener.show(event)
    assert isinstance(event, Finished), event
    return event, interrupt.happened


def speech_to(output: str, stdout: TextIO) -> Speech:
    """Where speech goes: a file, or `-` for `stdout`. What cannot be written is refused here, before a model is opened.

    Raises OptionError for such a place, and what `sound_file.check_ending` does for the kind of file.
    """
    if output == "-":
        if stdout.isatty():
            raise OptionError("raw sound would go to a terminal", hint="pipe it: -o - | aplay -f S16_LE -r 24000")
        return SpeechPipe(stdout.buffer)
    from .sound_file import check_ending

    path = Path(output)
    check_ending(path)
    with _refusing(path):
        _require_writable(path)
    return SpeechFile(path)


def speech_to_new_file(path: Path) -> Speech:
    """Speech to `path`, or where there is something already, to the next of its names that is free when sound comes.

    Raises OptionError where no file can be made.
    """
    new_file(path).unlink()
    return SpeechFile(path, is_new=True)


def new_file(path: Path) -> Path:
    """Make an empty file: `path` itself, or the first of name-2, name-3, ... at which there is nothing yet. Of several
    processes that want one at the same moment each gets its own. Raises OptionError where none can be made."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    with _refusing(path):
        for candidate in chain([path], numbered):
            with suppress(FileExistsError):
                candidate.open("xb").close()
                return candidate
    raise AssertionError("numbers do not end")


def _require_writable(path: Path) -> None:
    """Raise OptionError or OSError where no file can be written. What is there stays, and nothing new does."""
    if not path.parent.is_dir():
        raise OptionError(f"the folder {path.parent} for {path.name} does not exist", hint="make it, or choose another")
    if path.is_fifo():  # opening it would wait for a reader
        raise OptionError(f"{path} is a pipe, but a sound file is written in place", hint=f"raw sound: -o - > {path}")
    try:
        path.open("xb").close()
    except FileExistsError:  # of a link to nowhere, too, which is the user's
        path.open("ab").close()
    else:
        path.unlink()


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror}", hint="choose another place with -o") from error


def write_text(text: str, out: TextIO, end: str = "\n") -> None:
    """Write to a stream at once. Raises BrokenPipeError where the reader left, on every system, else LowVRAMError."""
    with _writing():
        print(text, end=end, file=out, flush=True)


def event_record(event: Progress | TextDelta | AudioChunk) -> dict[str, Any]:
    """An event as JSON has it. Sound is told by its place and length in seconds, not by its samples."""
    match event:
        case TextDelta():
            return {"event": "text", "text": event.text}
        case AudioChunk():
            seconds = len(event.samples) / event.sample_rate_hz
            return {"event": "audio", "start_s": event.start_s, "seconds": seconds, "is_last": event.is_last}
        case Progress():
            return {"event": "progress", **vars(event)}


def answer_record(
    made: Finished | SoFar,
    error: LowVRAMError | None = None,
    *,
    model: str,
    device: str,
    kernel: str,
    sounds: Sequence[Speech],
    speech_mode: str | None,
    peak_resident_bytes: int | None,
) -> dict[str, Any]:
    """An answer as JSON has it; `audio` is null unless one of `sounds` wrote or played it.

    `error` is what broke the answer off while it was `made`, or kept its sound from its place. `memory` holds the
    device's peaks by phase and how they were counted, and beside them, never mixed, the highest resident set of the
    process.
    """
    audio = {
        "path": next((sound.written_to for sound in sounds if sound.written_to), None),
        "played": any(sound.was_played for sound in sounds),
        "mode": speech_mode,
        "seconds": made.audio_s,
        "sample_rate_hz": made.sample_rate_hz,
    }
    return {
        "model": model,
        "device": device,
        "kernel": kernel,
        **{name: getattr(made, name, None) for name in TOLD},
        "audio": audio if audio["path"] or audio["played"] else None,
        "memory": {**getattr(made, "memory", {}), "process_peak_resident_bytes": peak_resident_bytes},
        "error": None if error is None else _error_record(error),
    }


def _error_record(error: LowVRAMError) -> dict[str, Any]:
    return {"message": error.args[0], "hint": error.hint, "exit_code": error.exit_code}


def used_lines(record: Mapping[str, Any]) -> list[str]:
    """What an answer cost, for people: tokens and time, memory and machine, and where its sound went."""
    seconds = [
        f"{what} {record['timings'][name]:.2f} s"
        for name, what in (("total", "in"), ("ttft", "first text after"), ("audio_ttfp", "first sound after"))
        if name in record["timings"]
    ]
    tokens = f"{record['prompt_tokens']} prompt tokens, {len(record['text_ids'])} text tokens"
    lines = [
        f"used: {tokens}, {len(record['codec_ids'])} codes {', '.join(seconds)}",
        f"used: {_peak(record['memory'])}, {record['device']}, kernel {record['kernel']}",
    ]
    lines += _sound_lines(record)
    if record["model"] == DEMO:
        lines.append("demo: its words are gibberish; it shows that everything works")
    return lines


def progress_amount(progress: Progress) -> str:
    """How far a part of the turn is: "120 of 768 tokens", "1.50 GiB of 3.16 GiB"."""
    amounts = [n for n in (progress.done, progress.total) if n is not None]
    if progress.unit == "bytes":
        return " of ".join(map(format_bytes, amounts))
    return f"{' of '.join(map(str, amounts))} {progress.unit}".rstrip()


def _sound_lines(record: Mapping[str, Any]) -> Iterator[str]:
    if audio := record["audio"]:
        places = [*(["the loudspeaker"] if audio["played"] else []), *([audio["path"]] if audio["path"] else [])]
        made = f"{audio['seconds']:.2f} s, {audio['mode']}, at {audio['sample_rate_hz']} Hz"
        yield f"speech: {made} to {' and '.join(places)}"
    if record["audio_rtf"] is not None:
        yield (
            f"speech: {record['audio_rtf']:.2f} s of work per second; whoever listened from the first sound on waited"
            f" {record['audio_underrun_s']:.2f} s in between"
        )


def _peak(memory: Mapping[str, Any]) -> str:
    resident_bytes = memory["process_peak_resident_bytes"]
    if peaks := memory.get("peak_bytes"):
        phase = max(peaks, key=peaks.get)
        return f"peak {format_bytes(peaks[phase])} in phase {phase} ({memory['kind']})"
    return f"peak {format_bytes(resident_bytes)} (process resident set)" if resident_bytes else "peak not measured"


def _print_json(record: Mapping[str, Any], out: TextIO) -> None:
    write_text(json.dumps(record, ensure_ascii=False), out)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Windows has EINVAL for a pipe whose reader left.
        if error.errno in (errno.EPIPE, errno.EINVAL):
            raise BrokenPipeError(*error.args) from error
        raise LowVRAMError(
            f"the output cannot be written: {error.strerror or error}", hint="make space, or send it elsewhere"
        ) from error
