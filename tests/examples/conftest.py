"""Examples are found as `python examples/batch.py` finds what it imports; a sound device that needs no hardware."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from media_files import sine, write_sound

sys.path.append(str(Path(__file__).parents[2] / "examples"))


class Loudspeaker:
    """Hears at once what it is given to play, and tells before each block."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []
        self.calls: list[str] = []
        self.before_block: Callable[[], None] = lambda: None

    def write(self, samples: np.ndarray) -> None:
        self.before_block()
        self.blocks.append(samples.copy())

    @contextmanager
    def open(self, samplerate: int, channels: int = 1, dtype: str = "float32") -> Iterator[Loudspeaker]:
        self.calls.append(f"open {samplerate} Hz")
        yield self
        self.calls.append("close")

    @property
    def sound(self) -> np.ndarray:
        return np.concatenate(self.blocks)


class SoundDevice(ModuleType):
    """What the examples use of the package sounddevice. Its microphone hears `spoken`, float32 [S]."""

    class PortAudioError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("sounddevice")
        self.loudspeaker = Loudspeaker()
        self.spoken = np.zeros(0, np.float32)
        self.has_output = self.has_input = True
        self.OutputStream = self.loudspeaker.open

    def check_output_settings(self, **_: object) -> None:
        if not self.has_output:
            raise self.PortAudioError("Error querying device -1")

    def check_input_settings(self, **_: object) -> None:
        if not self.has_input:
            raise self.PortAudioError("Error querying device -1")

    @contextmanager
    def InputStream(  # noqa: N802 (the package's name)
        self, *, samplerate: int, channels: int, dtype: str, callback: Callable[..., None]
    ) -> Iterator[None]:
        assert (samplerate, channels, dtype) == (16_000, 1, "float32")
        block = np.zeros((160, 1), np.float32)  # one for all, as PortAudio's own
        for begin in range(0, len(self.spoken), len(block)):
            piece = self.spoken[begin : begin + len(block), None]
            block[: len(piece)] = piece
            callback(block[: len(piece)], len(piece), None, None)
        yield


@pytest.fixture
def sound_device(monkeypatch: pytest.MonkeyPatch) -> SoundDevice:
    device = SoundDevice()
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    return device


@pytest.fixture
def no_sound_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)


@pytest.fixture
def question(tmp_path: Path) -> Path:
    """Half a second of sound."""
    return write_sound(tmp_path / "question.wav", sine(16_000, 0.5)[None], 16_000, "pcm_s16le")
