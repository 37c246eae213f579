"""What only a CUDA card can show. Skipped without one; `benchmarks/gpu.sh` runs it where there is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from test_turn import CUTS, MEDIA, MESSAGES, SAMPLING, SPEECH, STAGES, plan_of, turn_of

from lowvram.attention import attend, explicit_attention
from lowvram.events import AudioChunk, Event, TextDelta
from lowvram.graphs import CudaRecorder
from lowvram.kv_cache import TailedHeads
from lowvram.offload.plan import Placement, Plan
from lowvram.runtime import OmniRuntime

T = TypeVar("T")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
GREEDY = replace(SPEECH, sampling=replace(SPEECH.sampling, temperature=0.0))


@pytest.fixture
def demo(deep_demo: Path) -> Path:
    """Deep enough for layers to pass through slots."""
    return deep_demo


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "past"), [(1, 0), (1, 300), (64, 0), (64, 300), (200, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_its_slow_twin(dtype: torch.dtype, n: int, past: int, causal: bool):
    torch.manual_seed(0)
    q = torch.randn(1, 8, n, 128, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, past + n, 128, dtype=torch.float64)
    exact, _ = explicit_attention(q, k, v, causal=causal)
    ours = attend(*(heads.to("cuda", dtype) for heads in (q, k, v)), causal=causal)
    assert (ours.double().cpu() - exact).abs().max() <= TOLERANCE[dtype]


def test_a_later_chunk_needs_no_room_for_its_past():
    q = torch.randn(1, 28, 1024, 128, dtype=torch.float16, device="cuda")
    k, v = torch.randn(2, 1, 4, 40_000, 128, dtype=torch.float16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    attend(q, k, v, causal=True)
    assert torch.cuda.max_memory_allocated() - before_bytes < 16 * q.nbytes


def last_event(folder: Path, device: str, plan: Plan) -> Event:
    with (
        OmniRuntime.open(folder, device=device, dtype="float32") as omni,
        omni.preprocessor.open(MESSAGES, MEDIA) as prompt,
    ):
        *_, finished = turn_of(omni, prompt.inputs, plan, speech=GREEDY).run()
    return finished


@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("cuts", [[STAGES], *CUTS.values()], ids=["one phase", *CUTS])
def test_the_card_says_what_the_cpu_says(demo: Path, cuts: Sequence[Sequence[str]], placement: Placement):
    on_cpu = last_event(demo, "cpu", plan_of([STAGES]))
    on_card = last_event(demo, "cuda", plan_of(cuts, placement))
    assert (on_card.text_ids, on_card.codec_ids) == (on_cpu.text_ids, on_cpu.codec_ids)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("past", "seen"), [(0, 1), (0, 256), (300, 1), (300, 77), (3000, 200)])
def test_attention_to_a_tail_equals_its_slow_twin(dtype: torch.dtype, past: int, seen: int):
    torch.manual_seed(0)
    q = torch.randn(1, 12, 1, 128, dtype=torch.float64)
    k, v = torch.randn(2, 1, 4, past + 256, 128, dtype=torch.float64)
    exact, _ = explicit_attention(q, k[:, :, : past + seen], v[:, :, : past + seen], causal=False)
    bias = torch.zeros(1, 1, 1, 256).masked_fill(torch.arange(256) >= seen, -torch.inf).to("cuda", dtype)
    tailed = [
        TailedHeads(heads[:, :, :past].to("cuda", dtype), heads[:, :, past:].to("cuda", dtype), bias)
        for heads in (k, v)
    ]
    ours = attend(q.to("cuda", dtype), *tailed, causal=True)
    assert (ours.double().cpu() - exact).abs().max() <= TOLERANCE[dtype]


class Counted(CudaRecorder):
    """Counts its captures."""

    captures = 0

    def capture(self, step: Callable[[], T]) -> Callable[[], T]:
        type(self).captures += 1
        again = super().capture(step)
        assert again is not step, "the card refused"
        return again


class Refused:
    """Leaves what is to be captured as it is: the same kernels, one after another."""

    def capture(self, step: Callable[[], T]) -> Callable[[], T]:
        return step


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    """Captures of turns, counted; each is for 16 steps."""
    monkeypatch.setattr("lowvram.turn.open_recorder", Counted)
    monkeypatch.setattr("lowvram.graphs.STRETCH_TOKENS", 16)
    monkeypatch.setattr(Counted, "captures", 0)
    return Counted


def spoken(omni: OmniRuntime, seed: int, disturb: Callable[[OmniRuntime], object] = lambda omni: None) -> tuple:
    """The ids of a drawn answer; something happens at its second piece of text, and at its first sound."""
    speech = replace(SPEECH, sampling=replace(SPEECH.sampling, seed=seed))
    met: Counter[type] = Counter()
    for event in omni.generate(MESSAGES, sampling=SAMPLING, speech=speech, media=MEDIA):
        met[type(event)] += 1
        if (type(event), met[type(event)]) in ((TextDelta, 2), (AudioChunk, 1)):
            disturb(omni)
    return event.text_ids, event.codec_ids


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_graph_says_what_its_kernels_say_one_by_one(
    demo: Path, counted: type[Counted], monkeypatch: pytest.MonkeyPatch, seed: int, dtype: str
):
    with OmniRuntime.open(demo, device="cuda", dtype=dtype) as omni:
        captured = spoken(omni, seed)
        monkeypatch.setattr("lowvram.turn.open_recorder", lambda device: Refused())
        assert captured == spoken(omni, seed)
    # The last id of either kind is read too, unless it is the last that is allowed.
    fewest, most = (sum(-(-(len(ids) - last) // 16) for ids in captured) for last in (1, 0))
    assert fewest <= counted.captures <= most


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_graph_says_what_steps_say_that_were_never_to_be_captured(
    demo: Path, counted: type[Counted], monkeypatch: pytest.MonkeyPatch, seed: int
):
    with OmniRuntime.open(demo, device="cuda", dtype="float32") as omni:
        captured = spoken(omni, seed)
        monkeypatch.setattr("lowvram.turn.open_recorder", lambda device: None)
        assert captured == spoken(omni, seed)


def release_and_resume(omni: OmniRuntime) -> None:
    omni.release()
    omni.resume()


DISTURBANCES = {
    "another budget": lambda omni: omni.set_budget(omni.budget.vram_bytes * 3 // 4),
    "a release": release_and_resume,
}


@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=DISTURBANCES)
def test_weights_that_have_moved_are_captured_again(
    demo: Path, counted: type[Counted], disturb: Callable[[OmniRuntime], object]
):
    with OmniRuntime.open(demo, device="cuda", dtype="float32") as omni:
        undisturbed = spoken(omni, 0)
        captures, counted.captures = counted.captures, 0
        assert spoken(omni, 0, disturb) == undisturbed
    assert counted.captures > captures


def test_closing_gives_the_cards_memory_back(demo: Path):
    torch.cuda.empty_cache()
    before_bytes = torch.cuda.memory_reserved()
    last_event(demo, "cuda", plan_of([STAGES], Placement.RESIDENT))
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before_bytes + 32 * 2**20  # the libraries' own workspaces stay


def test_the_default_plan_keeps_its_word(demo: Path):
    with OmniRuntime.open(demo, device="cuda") as omni:
        plan = omni.plan(MESSAGES, sampling=SAMPLING, speech=SPEECH, media=MEDIA)
        *_, finished = omni.generate(MESSAGES, sampling=SAMPLING, speech=SPEECH, media=MEDIA)
    assert finished.memory["kind"] == "device allocator"
    assert max(finished.memory["peak_bytes"].values()) <= plan.peak_bytes
