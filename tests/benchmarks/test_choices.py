from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from choices import Question, compare_choices, named_choice, read_questions
from PIL import Image

from lowvram.errors import MediaError, OptionError


def write_questions(folder: Path, *questions: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(question) for question in questions), encoding="utf-8")
    return path


@pytest.mark.parametrize("answer", ["B", "b", "a red one"])
def test_an_answer_is_a_letter_or_one_of_the_choices(tmp_path: Path, answer: str):
    path = write_questions(tmp_path, {"question": "Which?", "choices": ["a dog", "a red one"], "answer": answer})
    assert read_questions(path) == [Question("Which?", ("a dog", "a red one"), answer=1)]


def test_media_lie_beside_the_file_and_are_taken_for_what_they_are(tmp_path: Path):
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "black.png")
    asked = {"question": "Which?", "choices": ["black", "white"], "answer": "A", "media": "black.png"}
    (question,) = read_questions(write_questions(tmp_path, asked))
    assert question.media == (("image", tmp_path / "black.png"),)
    picture, words = question.messages()[0]["content"]
    assert picture == {"type": "image", "image": str(tmp_path / "black.png")}
    assert words["text"].splitlines()[:3] == ["Which?", "A. black", "B. white"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 1 is no question"),
        ('{"question": "?", "choices": ["yes", "no"]}', "line 1 is no question: KeyError"),
        ('["?"]', "line 1 is no question"),
        ('{"question": "?", "choices": ["yes"], "answer": "A"}', r"line 1 has 1 choices \(2 to 26"),
        (
            '{"question": "?", "choices": ["yes", "no"], "answer": "C"}',
            r"answer 'C' is none of 2 choices \(a letter of AB",
        ),
        ("  ", "has 0 questions"),
    ],
)
def test_what_is_no_question_is_refused_by_its_line(tmp_path: Path, line: str, message: str):
    path = tmp_path / "questions.jsonl"
    path.write_text(line)
    with pytest.raises(OptionError, match=message):
        read_questions(path)


def test_a_missing_file_and_a_missing_medium_are_named(tmp_path: Path):
    with pytest.raises(OptionError, match=r"questions.jsonl cannot be read"):
        read_questions(tmp_path / "questions.jsonl")
    asked = {"question": "?", "choices": ["yes", "no"], "answer": "A", "media": ["gone.png"]}
    with pytest.raises(MediaError, match=r"cannot read .*gone"):
        read_questions(write_questions(tmp_path, asked))


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1),
        ("B.", 1),
        ("(C) because", 2),
        ("The answer is **A**", 0),
        ("**B**", 1),
        ("NASA said C", 2),
        ("Dogs", None),
        ("E", None),
    ],
)
def test_a_choice_is_the_first_letter_that_stands_alone(answer: str, index: int | None):
    assert named_choice(answer, 4) == index


def test_an_answer_that_names_no_choice_is_wrong_and_counted():
    questions = [Question("?", ("yes", "no"), answer) for answer in (0, 1, 0, 1)]
    found = compare_choices(questions, [0, 1, 1, None], [0, 0, 0, None])
    assert (found["reference"]["accuracy"], found["reference"]["unread"]) == (0.5, 1)
    assert (found["only_reference_right"], found["only_candidate_right"]) == (1, 1)
    low, high = found["reference"]["interval"]
    assert 0.1 < low < 0.5 < high < 0.9
