"""A file of multiple-choice questions, and what a model answered -> how many it got right.

One JSON object a line: {"question": "…", "choices": ["…", "…"], "answer": "B", "media": "clip.mp4"}. `answer` is a
letter or one of the choices; `media`, if there are any, is a path or a list of them, relative to the file.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agreement import wilson_interval
from text_files import read_text

from lowvram.errors import OptionError
from lowvram.media import Kind, open_medium
from lowvram.options import Limits

INSTRUCTION = "Answer with the letter of the right choice alone."
EXAMPLE = '{"question": "…", "choices": ["…", "…"], "answer": "B"}'


@dataclass(frozen=True)
class Question:
    """`answer` is the index of the right choice; `media` are (kind, path)."""

    question: str
    choices: tuple[str, ...]
    answer: int
    media: tuple[tuple[Kind, Path], ...] = ()

    def messages(self) -> list[Mapping[str, Any]]:
        """The prompt: media, then the question, its choices under letters, and the instruction."""
        lettered = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, self.choices, strict=False)]
        words = "\n".join([self.question, *lettered, INSTRUCTION])
        parts: list[Mapping[str, Any]] = [{"type": kind, kind: str(path)} for kind, path in self.media]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The questions of a file, at most `limit`. Raises OptionError, with the line, for one that is none."""
    lines = read_text(path, f"a line for each question: {EXAMPLE}").split("\n")
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise OptionError(f"{path} has 0 questions", hint=f"a line for each: {EXAMPLE}")
    return [_question(line, f"{path}, line {number}", path.parent) for number, line in filled[:limit]]


def named_choice(answer: str, n_choices: int) -> int | None:
    """The index of the choice that an answer names: the first of their letters to stand alone. None without any."""
    letters = string.ascii_uppercase[:n_choices]
    match = re.search(rf"(?<![^\W_])[{letters}](?![^\W_])", answer)
    return letters.index(match[0]) if match else None


def compare_choices(
    questions: Sequence[Question], reference: Sequence[int | None], candidate: Sequence[int | None]
) -> dict[str, Any]:
    """Both models' share of right answers with its 95 % interval, and on how many questions only one was right.

    An answer that names no choice is wrong, and counted as unread, too.
    """
    right = [
        [picked == question.answer for question, picked in zip(questions, picks, strict=True)]
        for picks in (reference, candidate)
    ]
    pairs = list(zip(*right, strict=True))
    return {
        "questions": len(questions),
        "reference": _share(right[0], reference),
        "candidate": _share(right[1], candidate),
        "only_reference_right": sum(one and not other for one, other in pairs),
        "only_candidate_right": sum(other and not one for one, other in pairs),
    }


def _share(right: Sequence[bool], picks: Sequence[int | None]) -> dict[str, Any]:
    interval = wilson_interval(sum(right), len(right))
    return {"accuracy": sum(right) / len(right), "interval": list(interval), "unread": sum(p is None for p in picks)}


def _question(line: str, where: str, folder: Path) -> Question:
    try:
        stored = json.loads(line)
        question, choices, answer = str(stored["question"]), tuple(map(str, stored["choices"])), str(stored["answer"])
        media = stored.get("media") or ()
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{where} is no question: {error!r}", hint=EXAMPLE) from error
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise OptionError(f"{where} has {len(choices)} choices", hint="2 to 26 of them")
    paths = [folder / name for name in ([media] if isinstance(media, str) else media)]
    return Question(question, choices, _index(answer, choices, where), tuple((_kind(path), path) for path in paths))


def _index(answer: str, choices: tuple[str, ...], where: str) -> int:
    if answer in choices:
        return choices.index(answer)
    letters = string.ascii_uppercase[: len(choices)]
    if len(answer) == 1 and answer.upper() in letters:
        return letters.index(answer.upper())
    raise OptionError(
        f"{where}: the answer {answer!r} is none of {len(choices)} choices", hint=f"a letter of {letters}"
    )


def _kind(path: Path) -> Kind:
    with open_medium(path, Limits()) as medium:
        return medium.kind
