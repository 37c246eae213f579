"""The whole comparison on tiny checkpoints: a model beside itself, and beside its own weights in 4 bits."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quality
import soundfile
import torch
from prompts import media_prompts
from quality_table import lines_of
from teacher_forcing import read_answer
from tiny_pair import build_pair

from lowvram import OmniRuntime
from lowvram.demo import TINY, build_demo

BRIEF = ("--device", "cpu", "--dtype", "float32", "--limit", "1", "--max-tokens", "6", "--max-codes", "14")
KINDS = ["text", "picture", "sound", "video"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in 16 bit, and the same rounded to 4."""
    return build_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that give two tasks their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, words in (("a", "one two three"), ("b", "four five")):
        soundfile.write(folder / f"{name}.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 16_000)
        (folder / f"{name}.txt").write_text(words)
    asked = {"question": "Which?", "choices": ["yes", "no"], "answer": "A"}
    (folder / "questions.jsonl").write_text(json.dumps(asked))
    return ["--wer", str(folder), "--choices", str(folder / "questions.jsonl")]


def run(*arguments: object) -> tuple[str, dict[str, Any]]:
    """What a comparison prints, and what it keeps."""
    with redirect_stdout(StringIO()) as printed:
        assert quality.main([*map(str, arguments), *BRIEF, "--json"]) == 0
    result = json.loads(printed.getvalue())
    return "\n".join(lines_of(result)), result


@pytest.fixture(scope="module")
def beside_itself(pair: tuple[Path, Path], tasks: list[str]) -> tuple[str, dict[str, Any]]:
    return run(pair[0], pair[0], *tasks)


@pytest.fixture(scope="module")
def beside_rounded(pair: tuple[Path, Path]) -> tuple[str, dict[str, Any]]:
    return run(*pair)


def test_a_model_beside_itself_differs_in_nothing(beside_itself: tuple[str, dict[str, Any]]):
    found = beside_itself[1]
    distributions = [*found["next_token"].values(), found["speech"]]
    assert list(found["next_token"]) == KINDS
    assert all(row["kl_mean_nats"] <= 1e-6 and row["kl_p99_nats"] <= 1e-6 for row in distributions)
    assert all(row["top1_agreement"] == 1 for row in distributions)
    assert all(row["identical"] == row["answers"] == 1 for row in found["answers"].values())
    assert found["speech"]["waveform_relative_error_max"] == 0
    assert found["speech"]["log_spectral_distance_db_mean"] == 0
    assert found["word_errors"]["surplus"] == {"rate": 0.0, "interval": [0.0, 0.0]}
    assert found["choices"]["only_reference_right"] == found["choices"]["only_candidate_right"] == 0


def test_rounded_weights_are_somewhat_apart_in_every_kind_of_prompt(beside_rounded: tuple[str, dict[str, Any]]):
    found = beside_rounded[1]
    rows = [*found["next_token"].values(), found["speech"]]
    assert all(1e-4 < row["kl_mean_nats"] < 0.3 for row in rows)
    assert all(row["kl_mean_nats"] < row["kl_p99_nats"] for row in rows)


def test_both_make_the_same_sound_of_the_same_codes_where_only_the_thinker_is_rounded(
    beside_rounded: tuple[str, dict[str, Any]],
):
    speech = beside_rounded[1]["speech"]
    assert speech["codes"] > 0 and speech["top1_agreement"] < 1
    assert speech["waveform_relative_error_max"] == 0


def test_texts_count_at_every_position_and_media_at_the_answer_s(beside_rounded: tuple[str, dict[str, Any]]):
    found = beside_rounded[1]
    assert found["next_token"]["text"]["positions"] > 100
    for kind in KINDS[1:]:
        answered = found["answers"][kind]["reference_tokens_median"]
        assert found["next_token"][kind]["positions"] == answered + 1


def test_a_candidate_is_asked_about_the_reference_s_answer_not_its_own(pair: tuple[Path, Path]):
    (picture,) = (prompt for prompt in media_prompts() if prompt.kind == "picture")
    work = quality.Work([picture], (), (), max_tokens=2, max_codes=1)
    before = quality.Testimony([quality.Thought((5, 6, 7, 8, 9), torch.empty(0))], (), (), ())
    with OmniRuntime.open(pair[1], device="cpu", dtype="float32") as omni:
        (thought,) = quality.question(omni, work, before).thoughts
        expected = read_answer(omni, picture.messages, (5, 6, 7, 8, 9))
    assert len(thought.answer) == 2
    assert torch.equal(thought.hidden, expected)


def test_a_card_says_what_was_compared_on_what(beside_itself: tuple[str, dict[str, Any]]):
    _, found = beside_itself
    conditions = found["card"]["conditions"]
    assert (found["reference"], found["candidate"]) == ("16-bit", "16-bit")
    assert conditions["prompts"] == "1 text, 1 picture, 1 sound, 1 video"
    assert conditions["kernels"] == "torch in float32 and torch in float32" and "KiB" in conditions["kept on the host"]
    assert "speech recognition" in conditions["recognition"] and "apostrophes" in conditions["word normalization"]
    assert found["card"]["commit"] and found["card"]["device"].startswith("CPU")


def test_people_read_tables_with_intervals_and_the_published_figures(beside_itself: tuple[str, dict[str, Any]]):
    printed = beside_itself[0]
    for words in (
        "KL mean",
        "same top",
        "greedy text",
        "sound of the same",
        "word error rate, recordings: 1",
        "Wilson",
    ):
        assert words in printed
    assert "LibriSpeech test-other, WER %        3.4    3.91" in printed


def test_a_budget_without_room_for_both_heads_is_refused_with_one_that_has_it(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    assert quality.main([*map(str, pair), *BRIEF, "--vram", "600KiB"]) == 4
    refused = capsys.readouterr().err
    assert "output heads and 16 positions' logits need" in refused and "budget is 600.0 KiB (--vram 1MiB)" in refused


def test_checkpoints_that_split_text_differently_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    build_demo(tmp_path, size=replace(TINY, first_special_id=400))
    assert quality.main([str(pair[0]), str(tmp_path), *BRIEF]) == 2
    assert "the checkpoints read a picture of clip.mp4 as different ids, from position" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a comparison takes 2 checkpoints (REFERENCE and CANDIDATE, or --tiny"),
        (["demo"], "a comparison takes 2 checkpoints"),
        (["demo", "demo", "--tiny"], "a comparison takes 2 checkpoints"),
        (["demo", "demo", "--limit", "0"], "limit is 0"),
        (["demo", "demo", "--wer", "nowhere"], "nowhere has 0 recordings"),
        (["demo", "demo", "--texts", "missing.txt"], "missing.txt cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert quality.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
