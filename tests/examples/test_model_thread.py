from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from model_thread import Closed, ModelThread, Opened, Report

from lowvram import (
    AudioChunk,
    Finished,
    LowVRAMError,
    OmniRuntime,
    Plan,
    Progress,
    SamplingParams,
    SpeechParams,
    TextDelta,
)

MESSAGES = [{"role": "user", "content": "hello green river"}]
SPEECH = SpeechParams(sampling=replace(SpeechParams().sampling, max_tokens=12, seed=1), steps=2)
PATIENCE_S = 60

R = TypeVar("R")


def until(model: ModelThread, kind: type[R]) -> tuple[list[Report], R]:
    """The reports before the first of a kind, and that."""
    before: list[Report] = []
    while not isinstance(report := model.reports.get(timeout=PATIENCE_S), kind):
        before.append(report)
    return before, report


@pytest.fixture
def open_model(demo: Path) -> Iterator[Callable[[int], ModelThread]]:
    """A model that is ready and answers in so many tokens; closed afterwards, whatever happened."""
    models: list[ModelThread] = []

    def opened(max_tokens: int = 4) -> ModelThread:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=2.0, seed=1)
        models.append(ModelThread(str(demo), sampling=sampling, speech=SPEECH).__enter__())
        return models[-1]

    yield opened
    for model in models:
        model.__exit__(None, None, None)


def test_an_answer_begins_with_its_plan_and_ends_with_its_summary(open_model):
    model = open_model()
    until(model, Opened)
    model.ask(MESSAGES)
    (plan, *events), finished = until(model, Finished)
    assert isinstance(plan, Plan) and plan.peak_bytes > 0 and plan.text_tokens == 4 and plan.codes == 12
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == finished.text
    assert any(isinstance(event, AudioChunk) for event in events)


def test_questions_are_answered_one_after_another(open_model):
    model = open_model()
    model.ask(MESSAGES)
    model.ask(MESSAGES)
    assert until(model, Finished)[1].text_ids == until(model, Finished)[1].text_ids


def test_an_error_is_reported_and_the_next_question_answered(open_model, tmp_path: Path):
    model = open_model()
    model.ask([{"role": "user", "content": [{"type": "image", "image": tmp_path / "nowhere.png"}]}])
    model.ask(MESSAGES)
    assert "nowhere.png" in str(until(model, LowVRAMError)[1])
    assert until(model, Finished)[1].finish_reason == "length"


def test_an_answer_is_cancelled_from_its_plan_on(open_model):
    model = open_model(max_tokens=1000)
    _, opened = until(model, Opened)
    model.ask(MESSAGES)
    until(model, Plan)
    opened.omni.cancel()
    assert until(model, Finished)[1].finish_reason == "cancelled"


def test_closing_in_mid_answer_ends_the_thread(open_model):
    model = open_model(max_tokens=1000)
    model.ask(MESSAGES)
    until(model, TextDelta)
    model.close()
    model.join(PATIENCE_S)
    assert not model.is_alive()
    assert [report.finish_reason for report in until(model, Closed)[0] if isinstance(report, Finished)] == ["cancelled"]


def test_closing_before_the_model_is_open_ends_the_thread(demo: Path):
    with ModelThread(str(demo)) as model:
        model.ask(MESSAGES)
    assert not model.is_alive()
    assert Plan not in {type(report) for report in until(model, Closed)[0]}


def test_closing_ends_a_download(monkeypatch: pytest.MonkeyPatch):
    deadline_s = time.monotonic() + PATIENCE_S

    def download(model: str, *, on_download: Callable[[int, int | None], None], **_: object) -> None:
        while time.monotonic() < deadline_s:
            on_download(1, 2)
            time.sleep(0.001)
        raise LowVRAMError("it was downloaded to the end")

    monkeypatch.setattr(OmniRuntime, "open", download)
    with ModelThread("Qwen/Qwen2.5-Omni-7B-AWQ") as model:
        assert isinstance(model.reports.get(timeout=PATIENCE_S), Progress)
    assert "the download was ended" in str(until(model, LowVRAMError)[1]) and not model.is_alive()


def test_a_model_that_cannot_be_opened_is_an_error_and_the_end(tmp_path: Path):
    with ModelThread(str(tmp_path / "nowhere")) as model:
        _, error = until(model, LowVRAMError)
        assert "nowhere" in str(error) and isinstance(model.reports.get(timeout=PATIENCE_S), Closed)


def test_closing_ends_an_answer_that_waits_for_the_card(open_model):
    model = open_model(max_tokens=1000)
    _, opened = until(model, Opened)
    model.ask(MESSAGES)
    until(model, TextDelta)
    opened.omni.release()
    model.close()
    model.join(PATIENCE_S)
    assert not model.is_alive()
