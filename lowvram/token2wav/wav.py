"""Sound to 16-bit PCM, as a WAV file that is valid after every chunk or as raw samples in a pipe.

The file's header is 44 bytes of our own: libsndfile could keep it true after each write, but soundfile does not let
one ask for that. Samples are written first and the sizes in the header after them, so that a process killed in
between leaves a file that is whole up to the chunk before.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from ..errors import LowVRAMError, OptionError
from .windows import SAMPLE_RATE_HZ

BYTES_PER_SAMPLE = 2
HEADER_BYTES = 44
MAX_SAMPLES = (2**32 - 1 - HEADER_BYTES) // BYTES_PER_SAMPLE
"""The sizes in a WAV header are 32-bit: 4 GiB, 24.9 hours at 24 kHz."""


def pcm16(samples: np.ndarray) -> bytes:
    """float [S] in -1..1 as little-endian int16: clipped to that range, times 32767, rounded half to even."""
    return np.rint(np.clip(samples, -1.0, 1.0) * 32767).astype("<i2").tobytes()


def write_pcm(stream: BinaryIO, samples: np.ndarray) -> None:
    """Raw s16le, 24 kHz mono, flushed: for a player at the other end of a pipe. `BrokenPipeError` is the caller's."""
    stream.write(pcm16(samples))
    stream.flush()


class WavWriter:
    """A 24 kHz mono 16-bit WAV file that can be played, or copied, at any moment while it grows.

    The file is made (and an old one emptied) at once, so that a bad path shows before any work is done: it raises
    `OptionError`. A disk that fills up raises `LowVRAMError` from `write`, as does the end of the format's 24.9 hours;
    what was written before stays valid. "Valid" is for other readers and after a kill; a power cut is not covered.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.samples = 0
        try:
            # Unbuffered: a buffer would try its bytes again, and fail again, when a full disk's file is closed.
            self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115
        except FileNotFoundError as error:
            raise OptionError(f"output folder {self.path.parent} does not exist", hint="make it first") from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise OptionError(f"cannot write {self.path}: {reason}", hint="name another output file") from error
        try:
            self._write_at(0, _header(0))
        except LowVRAMError:
            self._file.close()
            raise

    @property
    def seconds(self) -> float:
        """The sound in the file so far."""
        return self.samples / SAMPLE_RATE_HZ

    def write(self, samples: np.ndarray) -> None:
        """Append float samples [S] in -1..1; on return the file is valid with them in it."""
        total = self.samples + len(samples)
        if total > MAX_SAMPLES:
            hours = MAX_SAMPLES / SAMPLE_RATE_HZ / 3600
            raise LowVRAMError(
                f"{self.path} is full: a WAV file holds {hours:.1f} h of speech", hint="write raw samples with -o -"
            )
        self._write_at(HEADER_BYTES + self.samples * BYTES_PER_SAMPLE, pcm16(samples))
        self._write_at(0, _header(total))
        self.samples = total

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> WavWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_at(self, offset_bytes: int, content: bytes) -> None:
        try:
            self._file.seek(offset_bytes)
            left = memoryview(content)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            reason = error.strerror or str(error)
            raise LowVRAMError(
                f"{self.path} ends after {self.seconds:.2f} s of speech: {reason}",
                hint="the file is valid up to there; free some space or name another disk",
            ) from error


def _header(samples: int) -> bytes:
    """RIFF header of a mono 16-bit PCM file (Microsoft, "Multimedia Programming Interface", 1991)."""
    sound_bytes = samples * BYTES_PER_SAMPLE
    pcm, mono = 1, 1
    form = struct.pack(
        "<4sIHHIIHH",
        b"fmt ",
        16,
        pcm,
        mono,
        SAMPLE_RATE_HZ,
        SAMPLE_RATE_HZ * BYTES_PER_SAMPLE,
        BYTES_PER_SAMPLE,
        8 * BYTES_PER_SAMPLE,
    )
    riff = struct.pack("<4sI4s", b"RIFF", HEADER_BYTES - 8 + sound_bytes, b"WAVE")
    return riff + form + struct.pack("<4sI", b"data", sound_bytes)
