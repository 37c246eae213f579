"""What only a CUDA card can show. Skipped without one; `benchmarks/gpu.sh` runs it where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_turn import CUTS, MEDIA, MESSAGES, SAMPLING, SPEECH, STAGES, plan_of, turn_of

from lowvram.attention import attend, explicit_attention
from lowvram.events import Event
from lowvram.offload.plan import Placement, Plan
from lowvram.runtime import OmniRuntime

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
