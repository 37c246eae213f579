"""A checkpoint of 4 and 8 bits, every part of it quantized, on a card: resident and streamed, inside the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sim.harness import QUESTIONS, Answer, Host, Question, furnished_card
from sim.test_any_budget import budgets, try_within

from lowvram.demo import TINY, build_demo
from lowvram.device import open_device
from lowvram.offload.plan import Placement
from lowvram.quantize import QuantizeOptions, quantize_checkpoint
from lowvram.runtime import OmniRuntime

OPTIONS = QuantizeOptions(
    group_size=32, samples=2, sample_tokens=16, also=("talker", "encoders", "lm_head"), also_bits=8
)


WHERE = {"spoken": {Placement.PHASE}, "in text alone": {Placement.RESIDENT, Placement.STREAMED}}
"""Placements that the budgets tried for each question lead to."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    build_demo(folder / "16-bit", size=replace(TINY, layers=4), quantized=False, dtype="bfloat16")
    for _ in quantize_checkpoint(folder / "16-bit", folder / "new", OPTIONS, device=open_device("cpu")):
        pass
    return folder / "new"


@pytest.mark.parametrize("asked", WHERE)
def test_every_budget_gives_the_answer_of_the_cpu_inside_the_plan(mixed: Path, asked: str):
    question: Question = QUESTIONS[asked]
    with OmniRuntime.open(mixed, device="cpu", dtype="float32", kernel="reference") as omni:
        expected: Answer = question.answer(omni)
    placements: set[Placement] = set()
    with furnished_card() as card, Host(card, mixed) as host:
        assert host.omni.kernel == "reference and int8-slices"
        for vram_bytes in budgets(host, question, 3):
            tried = try_within(host, question, vram_bytes)
            placements |= {place for phase in tried.plan.phases for place in phase.placements.values()}
            assert tried.answer.says(expected)
            assert not tried.refusals
    assert WHERE[asked] <= placements, placements
