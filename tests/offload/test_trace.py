"""Traces at full size: the plan holds for the code that runs, and what a trace skips would not have changed it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest
from turns import clip

from lowvram import trace
from lowvram.checkpoint import Headers, TensorHeader
from lowvram.demo.config import TINY, omni_config
from lowvram.demo.weights import stored_tensors
from lowvram.model import OmniModel
from lowvram.offload.ahead import blocks_ahead, divide
from lowvram.offload.budget import Budget
from lowvram.offload.footprint import Footprint, read_footprint
from lowvram.offload.meter import LiveBytes
from lowvram.offload.plan import Placement, Plan, Turn, plan_memory
from lowvram.offload.profile import PLANNED, SIMULATED_ALLOCATOR, TRACED, MemoryProfile
from lowvram.options import Limits, SamplingParams, SpeechParams
from lowvram.shapes import shipped_headers
from lowvram.trace import allocator_of, trace_turn, traceable_model
from lowvram.workload import turn_of

BRIEF_SPEECH = SpeechParams(steps=3)
"""Two evaluations in place of nine: less work, and a plan that knows it. benchmarks/memory.py traces all nine."""

BRIEF_WAYS = {
    "exact, most at its end": SpeechParams(steps=6, chunk_s=0.24),
    "offload": SpeechParams(steps=6, mode="offload"),
    "balanced": SpeechParams(steps=3, mode="balanced", chunk_s=0.24),
    "low-latency, half precision": SpeechParams(steps=3, mode="low-latency", dtype="float16"),
}
"""Other ways to decode speech than exactly and in single precision."""


@dataclass(frozen=True)
class Traceable:
    """A model without weights, and what plans are made of."""

    model: OmniModel
    footprint: Footprint
    limits: Limits

    @classmethod
    def of(cls, headers: Headers, **limits: Any) -> Traceable:
        footprint = read_footprint(headers.tensors, headers.config, width_bytes=2)
        return cls(traceable_model(headers), footprint, Limits(**limits))

    def plan(self, turn: Turn, vram: str | None) -> Plan:
        return plan_memory(self.footprint, Budget.of(vram), self.limits, turn)

    def trace(
        self,
        turn: Turn,
        vram: str | None,
        speech: SpeechParams = BRIEF_SPEECH,
        ledger: LiveBytes | None = None,
    ) -> MemoryProfile:
        return trace_turn(self.model, self.plan(turn, vram), turn, speech, ledger=ledger)


@pytest.fixture(scope="module")
def seven_b_awq() -> Traceable:
    """The published 7B-AWQ's shape."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    headers = shipped_headers("Qwen/Qwen2.5-Omni-7B-AWQ")
    assert headers
    return Traceable.of(headers)


@pytest.fixture(scope="module")
def tiny() -> Traceable:
    """A small model in chunks so small that each stage takes several."""
    config = omni_config(TINY, user_id=1, quantized=True, dtype="float16")
    tensors = {tensor.name: TensorHeader(tensor.dtype, tensor.shape) for tensor in stored_tensors(config, TINY, "F16")}
    headers = Headers("tiny", config, tensors, None, "made here")
    return Traceable.of(headers, prefill_chunk_tokens=64, vision_chunk_patches=192, audio_chunk_windows=1)


def spoken(seconds: int, **options: Any) -> Turn:
    """A clip answered in text and speech, in a new voice."""
    return clip(seconds, ode_evaluations=2, is_conditioned=False, **options)


def written(seconds: int, **options: Any) -> Turn:
    """A clip answered in text alone."""
    return clip(seconds, codes=0, **options)


PHOTOGRAPH = Turn(16_400, 256, grids=((1, 250, 260),), is_conditioned=True)
"""More patches than are computed at once."""

SMALL = spoken(5, grid=(8, 12), codes=64, text_tokens=8)


@pytest.fixture(scope="module")
def answered(tiny: Traceable) -> tuple[MemoryProfile, LiveBytes]:
    """A small turn's profile, and the ledger it was counted by."""
    ledger = LiveBytes("meta", explain=True)
    return tiny.trace(SMALL, None, ledger=ledger), ledger


def ratios(profile: MemoryProfile) -> dict[str, float]:
    """Planned over traced peak, by phase."""
    planned, traced = profile.columns[PLANNED], profile.columns[TRACED]
    assert planned.keys() == traced.keys()
    return {phase: planned[phase] / traced[phase] for phase in planned}


@pytest.mark.parametrize(
    ("turn", "vram"),
    [
        (written(15), "3GiB"),
        (written(15), "6GiB"),
        (written(15, kv="int8"), "6GiB"),
        (written(60), "8GiB"),
        (spoken(15), "12GiB"),
        (spoken(60), "8GiB"),
        (PHOTOGRAPH, "3GiB"),
    ],
    ids=[
        "15 s in 3 GiB, streamed",
        "15 s in 6 GiB",
        "15 s with int8 caches in 6 GiB",
        "60 s in 8 GiB",
        "15 s with speech in 12 GiB",
        "60 s with speech in 8 GiB",
        "a photograph of 12 megapixels in 3 GiB",
    ],
)
def test_a_plan_is_never_below_what_the_code_holds_and_at_most_15_percent_above(
    seven_b_awq: Traceable, turn: Turn, vram: str
):
    profile = seven_b_awq.trace(turn, vram)
    assert all(1 <= ratio <= 1.15 for ratio in ratios(profile).values()), f"\n{profile}"


@pytest.mark.parametrize("speech", BRIEF_WAYS.values(), ids=BRIEF_WAYS)
def test_each_way_to_decode_speech_is_planned_as_it_runs(seven_b_awq: Traceable, speech: SpeechParams):
    """What the DiT computes with and remembers is a small part of a phase, so it is held against its own plan."""
    turn = turn_of(60, (), 0, SamplingParams(max_tokens=64), speech, "16bit")
    traced, phases = seven_b_awq.trace(turn, "3GiB", speech).columns[TRACED], seven_b_awq.plan(turn, "3GiB").phases
    components = seven_b_awq.footprint.speaking_in(speech.dtype).components
    for phase, following in zip(phases, (*phases[1:], None), strict=True):
        if phase.stages in [("conditioning",), ("token2wav",)]:
            coming = blocks_ahead(phase, following, components) if following else ()
            weights_bytes = sum(block.n_bytes for block in (*divide(phase, components)[0], *coming))
            traced_bytes = traced.pop(phase.name) - weights_bytes
            assert traced_bytes <= phase.activation_bytes <= 1.3 * traced_bytes, (phase.name, speech)
    assert list(traced) == ["think", "talk"]


@pytest.mark.parametrize(
    ("turn", "chunk_tokens", "vram"),
    [(written(15), 512, "3GiB"), (Turn(60, 64, kv="int8"), 1024, "2GiB")],
    ids=["chunks of 512", "a short question with int8 caches"],
)
def test_a_streamed_thinker_that_reads_little_at_once_computes_with_no_more_than_is_planned(
    seven_b_awq: Traceable, turn: Turn, chunk_tokens: int, vram: str
):
    """The slice of a 4-bit weight that is being dequantized is then much of it, but a small part of the phase."""
    careful = replace(seven_b_awq, limits=Limits(prefill_chunk_tokens=chunk_tokens))
    think, traced = careful.plan(turn, vram).phases[-1], careful.trace(turn, vram).columns[TRACED]
    traced_bytes = traced[think.name] - think.weights_bytes - think.kv_bytes
    assert think.placements["thinker"] is Placement.STREAMED
    assert traced_bytes <= think.activation_bytes <= 1.15 * traced_bytes


@pytest.mark.parametrize("chunk_patches", [4096, 1024])
@pytest.mark.parametrize("turn", [PHOTOGRAPH, written(3, audio_windows=0)], ids=["a photograph", "3 s of video"])
def test_seeing_computes_with_what_is_planned(seven_b_awq: Traceable, turn: Turn, chunk_patches: int):
    """Of pictures that are less than a chunk, and more."""
    careful = replace(seven_b_awq, limits=Limits(vision_chunk_patches=chunk_patches))
    see, ledger = careful.plan(turn, "4GiB").phases[0], LiveBytes("meta", explain=True)
    careful.trace(turn, "4GiB", ledger=ledger)
    held = [held for held in ledger.largest("see") if held.dtype != "uint8"]  # which runs of weights are
    traced_bytes = sum(tensor.n_bytes for tensor in held)
    assert see.stages == ("visual",)
    assert traced_bytes <= see.activation_bytes <= 1.05 * traced_bytes


def test_a_longer_clip_holds_more_by_its_kv_cache_alone(tiny: Traceable):
    turns = written(30, grid=(8, 12)), written(60, grid=(8, 12))
    kv_bytes = [tiny.plan(turn, None).phases[0].kv_bytes for turn in turns]
    short, long = (max(tiny.trace(turn, None).columns[TRACED].values()) for turn in turns)
    assert long - short == kv_bytes[1] - kv_bytes[0]


@pytest.mark.parametrize(
    ("turn", "vram"),
    [
        (spoken(15), "3GiB"),
        (spoken(15), "10GiB"),
        (spoken(60), "8GiB"),
        (spoken(60), "12GiB"),
        (PHOTOGRAPH, "4.5GiB"),
    ],
    ids=["15 s in 3 GiB", "15 s in 10 GiB", "60 s in 8 GiB", "60 s in 12 GiB", "a photograph in 4.5 GiB"],
)
def test_a_card_of_what_is_planned_does_not_run_out_by_how_its_allocator_keeps_memory(
    seven_b_awq: Traceable, turn: Turn, vram: str
):
    peak_bytes = seven_b_awq.plan(turn, vram).peak_bytes
    plan = seven_b_awq.plan(turn, f"{peak_bytes}")
    allocator = allocator_of(plan)
    seven_b_awq.trace(turn, f"{peak_bytes}", ledger=LiveBytes("meta", allocator=allocator))
    assert allocator.short_bytes == 0


def test_a_card_that_would_run_out_is_told_of(tiny: Traceable, caplog: pytest.LogCaptureFixture):
    plan = tiny.plan(SMALL, None)
    allocator = allocator_of(replace(plan, budget_bytes=plan.context_bytes + plan.workspace_bytes))
    profile = tiny.trace(SMALL, None, ledger=LiveBytes("meta", allocator=allocator))
    assert "would run out by" in caplog.text
    traced, reserved = profile.columns[TRACED], profile.columns[SIMULATED_ALLOCATOR]
    assert all(reserved[phase] >= traced[phase] for phase in traced)


def highest(profile: MemoryProfile) -> dict[str, int]:
    """The most that each kind of step held."""
    steps: dict[str, int] = {}
    for moment in profile.timeline:
        steps[moment.label] = max(steps.get(moment.label, 0), moment.total_bytes)
    return steps


def test_skipping_repeated_work_changes_no_peak_of_any_kind_of_step(
    tiny: Traceable, answered: tuple[MemoryProfile, LiveBytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trace, "LAYERED", ())
    assert highest(tiny.trace(SMALL, None)) == highest(answered[0])


def test_what_a_phase_holds_at_its_peak_can_be_listed(answered: tuple[MemoryProfile, LiveBytes]):
    profile, ledger = answered
    for phase, peak_bytes in profile.columns[TRACED].items():
        assert sum(held.n_bytes for held in ledger.largest(phase)) == peak_bytes


def test_a_timeline_divides_what_was_held_by_kind(tiny: Traceable, answered: tuple[MemoryProfile, LiveBytes]):
    profile, _ = answered
    labels = list(dict.fromkeys(moment.label for moment in profile.timeline))
    assert labels == ["load", "condition", "hear", "see", "prefill", "text", "sound"]
    blocks = [block for blocks in tiny.model.components.values() for block in blocks]
    assert max(moment.weights_bytes for moment in profile.timeline) == sum(block.n_bytes for block in blocks)
    assert max(moment.kv_bytes for moment in profile.timeline) == tiny.plan(SMALL, None).phases[-1].kv_bytes
    assert max(moment.total_bytes for moment in profile.timeline) == max(profile.columns[TRACED].values())


def test_nothing_of_a_turn_is_left_on_the_device(answered: tuple[MemoryProfile, LiveBytes]):
    assert answered[1].live_bytes == 0
