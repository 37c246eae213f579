"""Speech to the kind of file that a name's ending asks for: WAV by our own writer, FLAC, Ogg and MP3 by libsndfile.

A WAV file is whole after every chunk. The others are written as chunks come too, but can be read only once they are
closed: their last block, and what says how long they are, come at the end.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import BackendError, LowVRAMError, OptionError
from .token2wav.wav import WavWriter, pcm16
from .token2wav.windows import SAMPLE_RATE_HZ, SAMPLES_PER_CODE

WAV_ENDINGS = ("", ".wav")
ENCODINGS = {".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"), ".mp3": ("MP3", "MPEG_LAYER_III")}
"""libsndfile's names of format and encoding. FLAC keeps the very samples of the WAV file."""


class SoundWriter(Protocol):
    """Takes float samples [S] in -1..1, 24 kHz mono, until it is closed."""

    def write(self, samples: np.ndarray) -> None: ...

    def close(self) -> None: ...


def check_ending(path: Path) -> None:
    """Refuse a name whose ending promises what cannot be written here.

    Raises OptionError for an unknown ending, BackendError with libsndfile's reason for one that this build of it lacks.
    """
    ending = path.suffix.lower()
    if ending in WAV_ENDINGS:
        return
    if ending not in ENCODINGS:
        raise OptionError(
            f"{path.name} ends in {path.suffix}, which is none of the {1 + len(ENCODINGS)} kinds of sound file that can"
            " be written",
            hint=f"one of: .wav, {', '.join(ENCODINGS)}",
        )
    import soundfile

    try:
        _open(io.BytesIO(), ending).close()
    except (soundfile.SoundFileError, ValueError) as error:
        raise BackendError(
            f"{path.name} cannot be written by libsndfile {soundfile.__libsndfile_version__}: {error}",
            backend="libsndfile",
            reason=str(error),
            hint="name a .wav file, or install a newer soundfile",
        ) from error


def open_sound_file(path: Path) -> SoundWriter:
    """A new file of the kind that its name says, of `check_ending`'s kinds; an older one is emptied.

    Raises LowVRAMError, here and from its methods, when the file cannot be written.
    """
    return WavWriter(path) if path.suffix.lower() in WAV_ENDINGS else EncodedWriter(path)


class EncodedWriter:
    """A FLAC, Ogg or MP3 file, complete once it is closed, with all the sound that was written by then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._samples = 0
        with self._system_errors():
            self._file = _open(path, path.suffix.lower())

    def write(self, samples: np.ndarray) -> None:
        with self._system_errors():
            self._file.write(np.frombuffer(pcm16(samples), "<i2"))
        self._samples += len(samples)

    def close(self) -> None:
        with self._system_errors():
            if not self._samples:
                # An empty FLAC or MP3 file cannot be read; one code's silence can.
                self._file.write(np.zeros(SAMPLES_PER_CODE, "<i2"))
            self._file.close()

    @contextmanager
    def _system_errors(self) -> Iterator[None]:
        import soundfile

        try:
            yield
        except soundfile.SoundFileError as error:
            raise LowVRAMError(
                f"{self._path} cannot be written on after {self._samples / SAMPLE_RATE_HZ:.2f} s of speech: {error}",
                hint="free some space, or name another place",
            ) from error


def _open(file: Path | io.BytesIO, ending: str) -> Any:
    import soundfile

    encoding, subtype = ENCODINGS[ending]
    return soundfile.SoundFile(file, "w", SAMPLE_RATE_HZ, 1, format=encoding, subtype=subtype)
