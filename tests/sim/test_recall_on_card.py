"""A conversation on a card just as large as planned: what is known comes and goes without room of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from sim.harness import PLENTY_BYTES, QUESTIONS, SAMPLING, Answer, Host, Question, furnished_card
from test_turn import MEDIA

from lowvram.runtime import OmniRuntime


@pytest.fixture
def host(demo: Path) -> Iterator[Host]:
    with furnished_card() as card, Host(card, demo, remember="64MiB") as host:
        yield host


def continued(question: Question, reply: str) -> Question:
    more = [{"role": "assistant", "content": reply}, {"role": "user", "content": "and now?"}]
    return Question([*question.messages, *more], question.speech)


@pytest.mark.parametrize("room", [1.0, 1.5])
@pytest.mark.parametrize("name", QUESTIONS)
def test_what_is_known_keeps_to_the_plan_and_says_the_same(
    host: Host, demo: Path, on_cpu: Mapping[str, Answer], name: str, room: float
):
    question = QUESTIONS[name]
    first = question.answer(host.omni)
    assert first.says(on_cpu[name])
    more = continued(question, first.finished.text)
    host.omni.release()
    host.omni.resume()
    vram_bytes = int(more.plan(host.omni).smallest_budget_bytes * room)
    host.set_capacity(vram_bytes)
    host.omni.set_budget(vram_bytes)
    events = more.ask(host.omni)
    seen = [next(events)]
    plan = host.omni._turn.room.plan
    said = Answer.of([*seen, *events])
    host.set_capacity(PLENTY_BYTES)

    assert said.finished.recalled_tokens == first.finished.prompt_tokens
    assert not {"audio_tower", "visual"} & {stage for phase in plan.phases for stage in phase.stages}
    assert {phase.name: host.meter.peaks[phase.name] <= phase.peak_bytes for phase in plan.phases} == {
        phase.name: True for phase in plan.phases
    }
    assert host.leaked_bytes == 0
    with OmniRuntime.open(demo, device="cpu", dtype="float32", kernel="reference") as afresh:
        events = afresh.generate(more.messages, sampling=SAMPLING, speech=more.speech, media=MEDIA)
        expected = Answer.of(events).finished
    assert (said.finished.text_ids, said.finished.codec_ids) == (expected.text_ids, expected.codec_ids)
