"""An answer in the making -> its places: words or JSON to a stream, sound to a file, a pipe or the loudspeaker.

What the flags about speech mean for those places is decided here, before a model is opened; what comes of Ctrl-C and of
sound that could not be kept, while the answer is handed out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .errors import LowVRAMError
from .events import Event, Finished
from .listeners import (
    Listener,
    Reply,
    SoFar,
    Speech,
    answer_record,
    follow,
    speech_to,
    speech_to_new_file,
    used_lines,
)
from .options import SpeechParams
from .speech_flags import DEFAULT_OUTPUT, Voice

if TYPE_CHECKING:
    from .runtime import OmniRuntime


@dataclass(frozen=True)
class Places:
    """Where an answer goes."""

    progress: Listener
    sounds: Sequence[Speech]
    reply: Reply


def sounds_for(voice: Voice) -> list[Speech]:
    """Where speech goes. Raises OptionError or BackendError for what cannot be written or played, before a model is
    opened."""
    sounds: list[Speech] = []
    if voice.output is not None:
        sounds.append(speech_to(voice.output, sys.stdout))
    elif not voice.play:
        sounds.append(speech_to_new_file(Path(DEFAULT_OUTPUT)))
    if voice.play:
        from .playback import open_loudspeaker

        sounds.append(open_loudspeaker())
    return sounds


def words_to(output: str | None) -> TextIO:
    """Words make way on stdout for raw sound."""
    return sys.stderr if output == "-" else sys.stdout


def answer(
    runtime: OmniRuntime,
    model: str,
    events: Iterator[Event],
    places: Places,
    *,
    speech: SpeechParams | None,
) -> bool:
    """Hand out an answer as it comes, then the whole of it, or what there is where an error ends it, and to the
    progress what it used.

    `model` is its name in the record. Returns whether Ctrl-C ended it. Raises what the answer does, and, once
    the words are out, LowVRAMError for sound that could not be kept.
    """
    from .offload.meter import process_bytes

    def record_of(made: Finished | SoFar, error: LowVRAMError | None) -> dict[str, Any]:
        return answer_record(
            made,
            error,
            model=model,
            device=runtime.device.title,
            kernel=runtime.kernel,
            sounds=places.sounds,
            speech_mode=speech.mode if speech else None,
            peak_resident_bytes=process_bytes().peak_resident_bytes,
        )

    so_far = SoFar()
    try:
        finished, interrupted = hand_out(runtime, events, places, so_far)
    except LowVRAMError as error:
        places.reply.end(record_of(so_far, error))
        raise
    record = record_of(finished, first_failure(places.sounds))
    places.reply.end(record)
    raise_failure(places.sounds)
    places.progress.say("\n".join(used_lines(record)))
    return interrupted


def hand_out(runtime: OmniRuntime, events: Iterator[Event], places: Places, *others: Listener) -> tuple[Finished, bool]:
    """Hand out an answer as it comes, to `others` as well; its end, and whether Ctrl-C brought that about: nobody hears
    more of it then."""

    def cancel() -> None:
        runtime.cancel()
        for sound in places.sounds:
            sound.hush()

    return follow(events, (*others, places.progress, *places.sounds, places.reply), cancel)


def first_failure(sounds: Sequence[Speech]) -> LowVRAMError | None:
    """What kept sound from being written or played."""
    return next((sound.failure for sound in sounds if sound.failure), None)


def raise_failure(sounds: Sequence[Speech]) -> None:
    """Raise what kept sound from being written or played, for when the words are out."""
    if failure := first_failure(sounds):
        raise failure
