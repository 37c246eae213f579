"""A conversation by voice: Enter, talk, Enter, and the model answers aloud; Enter again interrupts it.

`python examples/voice_chat.py` needs a microphone (`pip install 'lowvram[play]'`). Without one, each sound file named
is a turn of the conversation: `python examples/voice_chat.py hello.wav again.wav --model demo`.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from loudspeaker import Speech, heard, places_for_speech
from push_to_talk import EnterKey, find_microphone, recordings

from lowvram import AudioChunk, Finished, LowVRAMError, OmniRuntime, SamplingParams, SpeechParams, TextDelta

CODES_PER_TOKEN = 25
"""Half a second of speech: the slowest speaker's token of text."""


class VoiceChat:
    """What was said so far, and the answer in the making. `interrupt` may come from any thread."""

    def __init__(self, omni: OmniRuntime, places: Iterator[Speech], max_tokens: int) -> None:
        self._omni = omni
        self._places = places
        self._sampling = SamplingParams(max_tokens=max_tokens)
        self._speech_params = spoken(max_tokens) if omni.voices else None
        self._messages: list[dict[str, Any]] = []
        self._speech = Speech()

    def answer(self, question: Path | np.ndarray) -> None:
        """Answer a recording (a file, or float32 [S] at 16 kHz) until all is heard, or interrupted.

        The turn is remembered with the words that were written by then. Raises what `generate` does, and forgets it.
        """
        messages = [*self._messages, {"role": "user", "content": [{"type": "audio", "audio": question}]}]
        # In this order, so that an interruption is never lost: from this call on `cancel` counts.
        events = self._omni.generate(messages, sampling=self._sampling, speech=self._speech_params)
        self._speech = next(self._places)
        with heard(self._speech), closing(events):
            finished = self._hand_out(events)
        if finished.text:
            self._messages = [*messages, {"role": "assistant", "content": finished.text}]

    def _hand_out(self, events: Iterable[object]) -> Finished:
        """Words to stdout and sound to its place, as they come."""
        for event in events:
            match event:
                case TextDelta(text=text):
                    print(text, end="", flush=True)
                case AudioChunk():
                    self._speech.take(event)
                case Finished(audio_s=audio_s):
                    print()
                    if audio_s:
                        print(f"{audio_s:.1f} s of speech to {self._speech.where}", file=sys.stderr)
                    return event
        raise AssertionError("the last event is Finished")

    def interrupt(self) -> None:
        """Silence, and an end of the answer."""
        self._omni.cancel()
        self._speech.hush()


def spoken(max_tokens: int) -> SpeechParams:
    """Speech that begins early, and no longer than such a text can take."""
    default = SpeechParams(mode="balanced")
    return replace(default, sampling=replace(default.sampling, max_tokens=CODES_PER_TOKEN * max_tokens))


def main(arguments: Sequence[str] | None = None) -> int:
    """Talk until nothing more is said; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, nargs="*", metavar="WAV", help="in place of the microphone")
    parser.add_argument("--model", default="Qwen/Qwen2.5-Omni-7B-AWQ", help="hub id, folder or demo")
    parser.add_argument("--vram", help="budget such as 8GiB; default: what is free")
    parser.add_argument("--max-tokens", type=int, default=128, help="the longest answer")
    options = parser.parse_args(arguments)
    try:
        return talk(options)
    except LowVRAMError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def talk(options: argparse.Namespace) -> int:
    """Open the model and answer one recording after another; one that cannot be answered does not end it."""
    status = 0
    if not options.questions:
        find_microphone()  # before a model is opened
    with OmniRuntime.open(options.model, vram=options.vram, remember="auto") as omni:
        chat = VoiceChat(omni, places_for_speech(Path()), options.max_tokens)
        # Unbuffered: at exit a thread that waits inside a buffered stdin would hold its lock, which Python must have.
        enter = EnterKey(io.FileIO(0, closefd=False), chat.interrupt)
        for question in options.questions or recordings(enter):
            try:
                chat.answer(question)
            except LowVRAMError as error:
                print(error, file=sys.stderr)
                status = error.exit_code
    return status


if __name__ == "__main__":
    sys.exit(main())
