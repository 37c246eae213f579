"""Chunks of speech to the loudspeaker while later ones are being made, by PortAudio through `sounddevice`.

Sound waits in a queue. The sound card's own thread takes from it what it needs and plays silence where there is none,
so that neither waits for the other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Protocol

import numpy as np

from .errors import BackendError, LowVRAMError
from .events import AudioChunk, Event, Finished
from .listeners import Speech
from .token2wav.windows import SAMPLE_RATE_HZ

MAX_AHEAD_S = 660.0
"""Sound that may wait: more than the 32,768 positions of a talker last (655 s), so that making never waits for playing,
and 63 MB at most all the same."""

TICK_S = 0.02
PATIENCE_S = 5.0
"""How long a loudspeaker may take nothing before it counts as gone; how fast it plays is its own affair."""

Fill = Callable[[np.ndarray], None]
"""Writes the next samples into a float32 [S] of the sound card's."""


class Stream(Protocol):
    """A loudspeaker that is playing what its `Fill` gives. `stop` ends it once what it has taken was heard, `abort` at
    once; `active` turns false if it ends by itself."""

    @property
    def active(self) -> bool: ...

    def stop(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class SpeechPlayed(Speech):
    """Sound to a loudspeaker, from the first chunk on. The answer's last event is kept until all has been heard."""

    def __init__(self, start_stream: Callable[[Fill], Stream], wait: Callable[[float], None] = time.sleep) -> None:
        self._start_stream = start_stream
        self._wait = wait
        self._stream: Stream | None = None
        self._queue: deque[np.ndarray] = deque()
        self._given_samples = 0
        self._played_samples = 0
        self._is_hushed = False

    def show(self, event: Event) -> None:
        if self.failure or self._is_hushed:
            return
        try:
            if isinstance(event, AudioChunk) and len(event.samples):
                self._play(event.samples)
            elif isinstance(event, Finished) and self._stream:
                self._wait_until_left(0)
        except LowVRAMError as error:
            self.failure = error

    def hush(self) -> None:
        """Silence within the sound card's buffer. A signal handler may call this: all it does is one assignment."""
        self._is_hushed = True

    def close(self) -> None:
        if self._stream is None:
            return
        if self._is_hushed or self._left_samples:
            self._stream.abort()
        else:
            self._stream.stop()
        self._stream.close()

    @property
    def _left_samples(self) -> int:
        # Two counts, each written by one thread alone, need no lock.
        return self._given_samples - self._played_samples

    def _play(self, samples: np.ndarray) -> None:
        self._queue.append(samples)
        self._given_samples += len(samples)
        if self._stream is None:
            self._stream = self._start_stream(self._fill)
            self.was_played = True
        self._wait_until_left(int(MAX_AHEAD_S * SAMPLE_RATE_HZ))

    def _fill(self, out: np.ndarray) -> None:
        filled = 0
        while filled < len(out) and self._queue and not self._is_hushed:
            first = self._queue[0]
            count = min(len(first), len(out) - filled)
            out[filled : filled + count] = first[:count]
            filled += count
            if count == len(first):
                self._queue.popleft()
            else:
                self._queue[0] = first[count:]
        out[filled:] = 0
        self._played_samples += filled

    def _wait_until_left(self, samples: int) -> None:
        """Wait until no more than `samples` are left to play, or nobody wants to hear them."""
        assert self._stream
        patience_s = PATIENCE_S
        while (left := self._left_samples) > samples and not self._is_hushed:
            if not self._stream.active or patience_s < 0:
                raise BackendError(
                    f"the loudspeaker stopped with {self._left_samples / SAMPLE_RATE_HZ:.2f} s of speech left to play",
                    backend="sounddevice",
                    hint="check the sound device, or write a file with -o",
                )
            self._wait(TICK_S)
            patience_s = PATIENCE_S if self._left_samples < left else patience_s - TICK_S


def open_loudspeaker() -> SpeechPlayed:
    """Speech to the system's default output. It is looked for now, and held from the first sound on.

    Raises BackendError when the package, the PortAudio library or a sound device is missing.
    """
    sounddevice = _sounddevice()
    with _portaudio_errors(sounddevice):
        sounddevice.check_output_settings(samplerate=SAMPLE_RATE_HZ, channels=1, dtype="float32")

    def start(fill: Fill) -> Stream:
        with _portaudio_errors(sounddevice):
            stream = sounddevice.OutputStream(
                samplerate=SAMPLE_RATE_HZ, channels=1, dtype="float32", callback=lambda out, *_: fill(out[:, 0])
            )
            stream.start()
        return stream  # type: ignore[no-any-return]

    return SpeechPlayed(start)


def _sounddevice() -> ModuleType:
    try:
        import sounddevice
    except ImportError as error:
        raise _missing("the package sounddevice is not installed", "pip install 'lowvram[play]'") from error
    except OSError as error:  # its own words for a system without the library that it calls
        raise _missing(str(error), "apt install libportaudio2, or your system's package of PortAudio") from error
    return sounddevice  # type: ignore[no-any-return]


@contextmanager
def _portaudio_errors(sounddevice: ModuleType) -> Iterator[None]:
    try:
        yield
    except (sounddevice.PortAudioError, ValueError) as error:
        reason = f"PortAudio has no output at {SAMPLE_RATE_HZ:,} Hz: {error}"
        raise _missing(reason, "connect or choose another sound device, or write a file with -o") from error


def _missing(reason: str, hint: str) -> BackendError:
    return BackendError(f"speech cannot be played: {reason}", backend="sounddevice", reason=reason, hint=hint)
