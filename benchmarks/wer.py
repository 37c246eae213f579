"""A folder of recordings with transcripts, and what a model heard in them -> its word error rate.

The rate is errors by words over all recordings together: substitutions, insertions and deletions of the shortest edit
(Levenshtein 1966) by the words of the transcripts. Its interval, and that of the difference between two models, comes
from drawing recordings again and again (bootstrap), since words of one recording go wrong together.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from text_files import read_text

from lowvram.errors import OptionError

SYSTEM_PROMPT = "You are a speech recognition model."
QUESTION = "Transcribe the English audio into text without any punctuation marks."
"""As the authors ask (QwenLM/Qwen2.5-Omni, cookbooks/universal_audio_understanding.ipynb)."""

SOUNDS = (".flac", ".wav", ".mp3", ".ogg", ".opus", ".m4a")

IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W_{IDEOGRAPHS}]+(?:'[^\W_{IDEOGRAPHS}]+)*")

NORMALIZATION = (
    "NFKC, lower case; words are runs of letters and digits, with apostrophes inside; a CJK ideograph is a"
    " word of its own; all else is dropped; numbers are not spelled out"
)
"""What `words_of` does, for the card."""

RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Recording:
    """A sound and what is said in it."""

    sound: Path
    transcript: str

    def messages(self) -> list[Mapping[str, Any]]:
        """The prompt: the question, then the sound."""
        parts = [{"type": "text", "text": QUESTION}, {"type": "audio", "audio": str(self.sound)}]
        return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": parts}]


@dataclass(frozen=True)
class Errors:
    """Of one recording: edits from the transcript's words to those heard, and how many words the transcript has."""

    edits: int
    words: int


def read_recordings(folder: Path, limit: int | None = None) -> list[Recording]:
    """Recordings below `folder` in the order of their names, at most `limit`.

    Transcripts lie as in LibriSpeech (`*.trans.txt`, lines of a recording's name and its words) or each beside its
    sound under the same name, ending in .txt. Raises OptionError for a folder without any.
    """
    found = sorted({**dict(_same_name(folder)), **dict(_librispeech(folder))}.items())
    if not found:
        raise OptionError(
            f"{folder} has 0 recordings with a transcript",
            hint=f"sounds ({', '.join(SOUNDS)}) beside *.trans.txt as in LibriSpeech, or beside a .txt of their name",
        )
    return [Recording(sound, transcript) for sound, transcript in found[:limit]]


def words_of(text: str) -> list[str]:
    """What counts as the words of a text; see `NORMALIZATION`."""
    return WORD.findall(unicodedata.normalize("NFKC", text).replace("’", "'").lower())


def edit_distance(reference: Sequence[Hashable], heard: Sequence[Hashable]) -> int:
    """The fewest insertions, deletions and substitutions that turn one sequence into the other."""
    row = list(range(len(heard) + 1))  # from nothing to each beginning of `heard`
    for index, word in enumerate(reference, start=1):
        above_left, row[0] = row[0], index
        for column, other in enumerate(heard, start=1):
            cost = min(row[column] + 1, row[column - 1] + 1, above_left + (word != other))
            above_left, row[column] = row[column], cost
    return row[-1]


def count_errors(transcript: str, heard: str) -> Errors:
    reference = words_of(transcript)
    return Errors(edit_distance(reference, words_of(heard)), len(reference))


def compare_rates(reference: Sequence[Errors], candidate: Sequence[Errors]) -> dict[str, Any]:
    """Both models' error rates on the same recordings and the candidate's surplus, each with its 95 % interval."""
    edits = np.array([[one.edits, other.edits] for one, other in zip(reference, candidate, strict=True)], dtype=float)
    words = np.array([errors.words for errors in reference], dtype=float)
    drawn = np.random.default_rng(SEED).integers(0, len(words), (RESAMPLES, len(words)))
    rates = edits[drawn].sum(1) / np.maximum(words[drawn].sum(1), 1)[:, None]
    whole = edits.sum(0) / max(words.sum(), 1)
    return {
        "recordings": len(words),
        "words": int(words.sum()),
        "reference": _estimate(whole[0], rates[:, 0]),
        "candidate": _estimate(whole[1], rates[:, 1]),
        "surplus": _estimate(whole[1] - whole[0], rates[:, 1] - rates[:, 0]),
    }


def _estimate(rate: float, resampled: np.ndarray) -> dict[str, Any]:
    return {"rate": float(rate), "interval": [float(end) for end in np.quantile(resampled, (0.025, 0.975))]}


def _librispeech(folder: Path) -> Iterator[tuple[Path, str]]:
    for listing in sorted(folder.rglob("*.trans.txt")):
        for line in read_text(listing, "a transcript in UTF-8").splitlines():
            name, _, transcript = line.strip().partition(" ")
            sound = _sound(listing.parent, name) if name else None
            if sound:
                yield sound, transcript


def _same_name(folder: Path) -> Iterator[tuple[Path, str]]:
    for text in sorted(folder.rglob("*.txt")):
        sound = _sound(text.parent, text.stem)
        if sound:
            yield sound, read_text(text, "a transcript in UTF-8").strip()


def _sound(folder: Path, name: str) -> Path | None:
    return next((path for suffix in SOUNDS if (path := folder / f"{name}{suffix}").is_file()), None)
