"""Chunks of an answer's speech -> the loudspeaker while later ones are being made, or a WAV file where there is none.

Playing has a thread of its own, so that making never waits for it, and silence comes at once when it is asked for.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
import soundfile

from lowvram import AudioChunk, LowVRAMError

RATE_HZ = 24_000
BLOCK_SAMPLES = RATE_HZ // 20
"""Played at a time: speech that is hushed ends within 0.05 s and what the sound card holds."""


class Stream(Protocol):
    """A loudspeaker that plays: `write` takes float32 [S] and waits until there is room for them."""

    def write(self, samples: np.ndarray, /) -> object: ...


OpenStream = Callable[[int], AbstractContextManager[Stream]]
"""Starts a loudspeaker at a sample rate; leaving it waits until what it has taken was heard."""


class Speech:
    """One answer's sound, and `where` it goes. `take`, `end` and `wait` belong to one thread, `hush` to any."""

    where = "nowhere"

    def take(self, chunk: AudioChunk) -> None:
        """What comes next; returns at once. Raises LowVRAMError where it cannot be kept."""

    def end(self) -> None:
        """No more comes."""

    def hush(self) -> None:
        """Nobody wants to hear the rest."""

    def wait(self) -> None:
        """After `end`: until all was heard, or hushed."""


class Played(Speech):
    """To the loudspeaker, which is held from the first chunk on."""

    where = "the loudspeaker"

    def __init__(self, open_stream: OpenStream) -> None:
        self._open_stream = open_stream
        self._chunks: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self._hushed = threading.Event()
        self._player: threading.Thread | None = None

    def take(self, chunk: AudioChunk) -> None:
        self._chunks.put(chunk.samples)
        if self._player is None:
            self._player = threading.Thread(target=self._play, args=(chunk.sample_rate_hz,), name="loudspeaker")
            self._player.start()

    def end(self) -> None:
        self._chunks.put(None)

    def hush(self) -> None:
        self._hushed.set()

    def wait(self) -> None:
        while self._player and self._player.is_alive():
            self._player.join(0.1)  # on Windows Ctrl-C cannot interrupt a longer wait

    def _play(self, rate_hz: int) -> None:
        with self._open_stream(rate_hz) as stream:
            while (samples := self._chunks.get()) is not None:
                for begin in range(0, len(samples), BLOCK_SAMPLES):
                    if not self._hushed.is_set():
                        stream.write(samples[begin : begin + BLOCK_SAMPLES])


class Saved(Speech):
    """To a WAV file, all of it: there is nobody to hush."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._file: soundfile.SoundFile | None = None

    def take(self, chunk: AudioChunk) -> None:
        try:
            if self._file is None:
                self._file = soundfile.SoundFile(self.where, "w", chunk.sample_rate_hz, channels=1)
            self._file.write(chunk.samples)
        except soundfile.SoundFileError as error:
            raise LowVRAMError(f"{self.where} cannot be written: {error}", hint="start in another folder") from error

    def end(self) -> None:
        if self._file:
            self._file.close()


@contextmanager
def heard(speech: Speech) -> Iterator[Speech]:
    """Leave when all that was taken is heard, or hushed; an error hushes the rest."""
    try:
        yield speech
        speech.end()
        speech.wait()
    finally:
        speech.hush()
        speech.end()


def places_for_speech(folder: Path) -> Iterator[Speech]:
    """A place for each answer's sound: the loudspeaker, or without one a new `reply-N.wav` in `folder`."""
    if open_stream := find_loudspeaker():
        while True:
            yield Played(open_stream)
    for number in itertools.count(1):
        if not (path := folder / f"reply-{number}.wav").exists():
            yield Saved(path)


def find_loudspeaker() -> OpenStream | None:
    """How to open the system's default output; None if there is none."""
    if (sounddevice := find_sounddevice()) is None:
        return None
    try:
        sounddevice.check_output_settings(samplerate=RATE_HZ, channels=1, dtype="float32")
    except (sounddevice.PortAudioError, ValueError):
        return None
    return lambda rate_hz: sounddevice.OutputStream(samplerate=rate_hz, channels=1, dtype="float32")


def find_sounddevice() -> ModuleType | None:
    """The package (`pip install 'lowvram[play]'`), if it is there and finds PortAudio, a library of the system."""
    try:
        import sounddevice
    except (ImportError, OSError):
        return None
    return sounddevice  # type: ignore[no-any-return]
