"""Weights that are not numbers: an answer ends with a sentence, and what was said before it stays said."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lowvram.cli import app
from lowvram.errors import CheckpointError
from lowvram.events import AudioChunk, Event, TextDelta
from lowvram.options import TALKER_SAMPLING, SamplingParams, SpeechParams
from lowvram.runtime import OmniRuntime

ASK = [{"role": "user", "content": "hello"}]
SPEECH = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=8, seed=1), steps=2)


def damaged(demo: Path, folder: Path, tensor: str, value: float, row: int | None = None) -> Path:
    """A copy of the demo in which a tensor, or one row of it, begins with `value`."""
    shutil.copytree(demo, folder)
    (path,) = (path for path in folder.glob("*.safetensors") if tensor in safe_open(path, "pt").keys())  # noqa: SIM118
    tensors = load_file(path)
    tensors[tensor].view(-1)[0 if row is None else row * tensors[tensor].shape[1]] = value
    save_file(tensors, path)
    return folder


def heard(events: Iterator[Event]) -> tuple[str, int, CheckpointError]:
    """What came before the error: words, and samples of sound."""
    words, samples = [], 0
    with pytest.raises(CheckpointError, match="cannot choose a token") as refused:
        for event in events:
            if isinstance(event, TextDelta):
                words.append(event.text)
            if isinstance(event, AudioChunk):
                samples += len(event.samples)
                assert np.isfinite(event.samples).all()
    return "".join(words), samples, refused.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["thinker.model.norm.weight", "thinker.model.layers.1.input_layernorm.weight"])
def test_a_thinker_with_a_weight_that_is_no_number_says_nothing(demo: Path, tmp_path: Path, tensor: str, value: float):
    with OmniRuntime.open(damaged(demo, tmp_path / "model", tensor, value), vram="64MiB", device="cpu") as omni:
        words, _, error = heard(omni.generate(ASK, speech=None))
        assert (words, error.exit_code, error.tensor) == ("", 3, "thinker.")
        with pytest.raises(CheckpointError):  # and may be asked again
            list(omni.generate(ASK, speech=None))


def test_words_before_a_row_that_is_no_number_stay_said(demo: Path, tmp_path: Path):
    sampling = SamplingParams(max_tokens=12)
    with OmniRuntime.open(demo, vram="64MiB", device="cpu") as omni:
        *_, whole = omni.generate(ASK, sampling=sampling, speech=None)
    fourth = whole.text_ids[3]
    assert fourth not in whole.text_ids[:3]
    model = damaged(demo, tmp_path / "model", "thinker.model.embed_tokens.weight", float("nan"), fourth)
    with OmniRuntime.open(model, vram="64MiB", device="cpu") as omni:
        words, _, _ = heard(omni.generate(ASK, sampling=sampling, speech=None))
        assert words and whole.text.startswith(words)
        assert words == omni.preprocessor.detokenize(whole.text_ids[:4])


def test_a_talker_with_a_weight_that_is_no_number_ends_the_answer(demo: Path, tmp_path: Path):
    model = damaged(demo, tmp_path / "model", "talker.model.norm.weight", float("nan"))
    with OmniRuntime.open(model, vram="64MiB", device="cpu") as omni:
        _, samples, error = heard(omni.generate(ASK, sampling=SamplingParams(max_tokens=4), speech=SPEECH))
        assert (samples, error.tensor) == (0, "talker.")
        list(omni.generate(ASK, sampling=SamplingParams(max_tokens=4), speech=None))  # it can still write


def test_the_program_ends_with_one_sentence(demo: Path, tmp_path: Path):
    model = damaged(demo, tmp_path / "model", "thinker.model.norm.weight", float("nan"))
    done = CliRunner().invoke(app, ["run", "-p", "hello", "--model", str(model), "--no-speech", "--quiet"])
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr.startswith("error: the thinker cannot choose a token") and done.stderr.count("\n") == 1


def test_a_healthy_model_ends_nothing(demo: Path):
    with OmniRuntime.open(demo, vram="64MiB", device="cpu") as omni:
        list(omni.generate(ASK, sampling=SamplingParams(max_tokens=4), speech=SPEECH))
