"""The Enter key and a microphone -> recordings of what is said between two presses."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from types import ModuleType

import numpy as np
from loudspeaker import find_sounddevice

from lowvram import LowVRAMError

RATE_HZ = 16_000
"""What the model hears; sound in arrays has no other."""


class EnterKey:
    """Enter, as it is pressed: `on_press` is called at once, from a thread of its own, and `wait` returns."""

    def __init__(self, lines: Iterable[object], on_press: Callable[[], None]) -> None:
        self._presses: SimpleQueue[bool] = SimpleQueue()
        self._on_press = on_press
        threading.Thread(target=self._read, args=(lines,), name="enter key", daemon=True).start()

    def wait(self) -> bool:
        """Until it is pressed, if it was not since the last `wait`; False once the lines are at their end."""
        return self._presses.get()

    def _read(self, lines: Iterable[object]) -> None:
        for _ in lines:
            self._on_press()
            self._presses.put(True)
        self._presses.put(False)


def recordings(enter: EnterKey) -> Iterator[np.ndarray]:
    """What is said between two presses, float32 [S] at 16 kHz, until there are no more."""
    print("Enter: talk. Enter again: have it answered, or interrupted. Ctrl-D: end.", file=sys.stderr)
    while enter.wait():
        yield record(enter.wait)


def record(wait: Callable[[], object]) -> np.ndarray:
    """What the microphone hears while `wait` waits, float32 [S] at 16 kHz."""
    blocks = [np.zeros(0, np.float32)]

    def keep(block: np.ndarray, *_: object) -> None:
        blocks.append(block[:, 0].copy())  # the array is the sound card's

    with find_microphone().InputStream(samplerate=RATE_HZ, channels=1, dtype="float32", callback=keep):
        print("listening ...", file=sys.stderr)
        wait()
    return np.concatenate(blocks)


def find_microphone() -> ModuleType:
    """The package that has the system's default input. Raises LowVRAMError if there is none."""
    if (sounddevice := find_sounddevice()) is None:
        raise LowVRAMError(
            "sounddevice or PortAudio is not installed", hint="pip install 'lowvram[play]', or name a WAV"
        )
    try:
        sounddevice.check_input_settings(samplerate=RATE_HZ, channels=1, dtype="float32")
    except (sounddevice.PortAudioError, ValueError) as error:
        raise LowVRAMError(f"there is no microphone: {error}", hint="connect one, or name a WAV") from error
    return sounddevice
