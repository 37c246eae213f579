"""What only a CUDA card can show. Skipped without one; `benchmarks/gpu.sh` runs it where there is one."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from test_turn import CUTS, MEDIA, MESSAGES, SAMPLING, SPEECH, STAGES, plan_of, turn_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowvram.attention import attend, explicit_attention
from lowvram.demo import build_demo
from lowvram.device import BFLOAT16_CAPABILITY, MemoryCap, exact_arithmetic, open_device
from lowvram.events import AudioChunk, Event, TextDelta
from lowvram.graphs import CudaRecorder, _capture_stream
from lowvram.kv_cache import TailedHeads
from lowvram.offload.allocator import CachingAllocator
from lowvram.offload.budget import MIB
from lowvram.offload.plan import CONTEXT_BYTES, WORKSPACE_BYTES, Placement, Plan
from lowvram.offload.streams import CudaStreams
from lowvram.options import SamplingParams, SpeechParams
from lowvram.quant.borrowed import BorrowedBackend
from lowvram.quant.cuda import CudaBackend
from lowvram.quant.int8 import pack_int8, unpack_int8
from lowvram.quant.int8_matmul import choose_int8
from lowvram.quant.matmul import BORROWED, choose_backend
from lowvram.quant.packing import pack_awq, unpack_awq
from lowvram.quantize import QuantizeOptions, quantize_checkpoint
from lowvram.runtime import OmniRuntime

T = TypeVar("T")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")

TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of attention. In float32 tensor cores multiply by three products of 11 bits each."""

STREAMS_OF_A_PRIORITY = 32
"""That torch has for each card, and hands out in turns."""

GREEDY = replace(SPEECH, sampling=replace(SPEECH.sampling, temperature=0.0))
BRIEF = replace(GREEDY, sampling=replace(GREEDY.sampling, max_tokens=20), steps=2)


@pytest.fixture
def demo(deep_demo: Path) -> Path:
    """Deep enough for layers to pass through slots."""
    return deep_demo


@pytest.fixture(params=TOLERANCE)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each that the card is good at."""
    if request.param is torch.bfloat16 and torch.cuda.get_device_capability() < BFLOAT16_CAPABILITY:
        pytest.skip("bfloat16 needs an Ampere card")
    chosen: torch.dtype = request.param
    return chosen


@pytest.mark.parametrize(("n", "past"), [(1, 0), (1, 300), (64, 0), (64, 300), (200, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_its_slow_twin(dtype: torch.dtype, n: int, past: int, causal: bool):
    torch.manual_seed(0)
    q = torch.randn(1, 8, n, 128, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, past + n, 128, dtype=torch.float64)
    exact, _ = explicit_attention(q, k, v, causal=causal)
    ours = attend(*(heads.to("cuda", dtype) for heads in (q, k, v)), causal=causal)
    assert (ours.double().cpu() - exact).abs().max() <= TOLERANCE[dtype]


def test_the_allocator_reserves_what_its_simulation_says():
    """Tensors of all sizes, made and dropped in one order on the card, in a pool of their own, and in its model.

    Before anything is captured: torch 2.11 loses sight of its pools when it is asked for one beside those of graphs.
    """
    draw, simulated, pool = random.Random(0), CachingAllocator(), torch.cuda.MemPool()
    alive: list[tuple[torch.Tensor, Callable[[], None]]] = []
    with torch.cuda.use_mem_pool(pool):
        for _ in range(500):
            n_bytes = round(2 ** draw.uniform(8, 26))
            alive.append((torch.empty(n_bytes, dtype=torch.uint8, device="cuda"), simulated.allocate(n_bytes)))
            if draw.random() < 0.6:
                tensor, give_back = alive.pop(draw.randrange(len(alive)))
                del tensor
                give_back()
            reserved_bytes = sum(segment["total_size"] for segment in pool.snapshot())
            assert reserved_bytes == simulated.reserved_bytes


def test_a_later_chunk_needs_no_room_for_its_past():
    q = torch.randn(1, 28, 1024, 128, dtype=torch.float16, device="cuda")
    k, v = torch.randn(2, 1, 4, 40_000, 128, dtype=torch.float16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    attend(q, k, v, causal=True)
    assert torch.cuda.max_memory_allocated() - before_bytes < 16 * q.nbytes


@pytest.mark.parametrize("causal", [True, False])
def test_no_switch_of_the_application_makes_attention_spell_out_all_scores(causal: bool):
    q, k, v = torch.randn(3, 1, 16, 4096, 64, dtype=torch.float16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    with sdpa_kernel(SDPBackend.MATH):
        attend(q, k, v, causal=causal)
    assert torch.cuda.max_memory_allocated() - before_bytes < 8 * q.nbytes  # all scores are 64 times as large


def last_event(
    folder: Path, device: str, plan: Plan, sampling: SamplingParams = SAMPLING, speech: SpeechParams = GREEDY
) -> Event:
    with (
        OmniRuntime.open(folder, device=device, dtype="float32") as omni,
        omni.preprocessor.open(MESSAGES, MEDIA) as prompt,
    ):
        *_, finished = turn_of(omni, prompt.inputs, plan, sampling=sampling, speech=speech).run()
    return finished


@pytest.fixture
def float32_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's default cuDNN rounds the factors of float32 convolutions to 11 bits: the encoders begin with some."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def on_cpu(deep_demo: Path) -> Event:
    """How the answer ends on the CPU."""
    return last_event(deep_demo, "cpu", plan_of([STAGES]))


@pytest.mark.usefixtures("float32_convolutions")
@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("cuts", [[STAGES], *CUTS.values()], ids=["one phase", *CUTS])
def test_the_card_says_what_the_cpu_says(
    demo: Path, on_cpu: Event, cuts: Sequence[Sequence[str]], placement: Placement
):
    on_card = last_event(demo, "cuda", plan_of(cuts, placement))
    assert (on_card.text_ids, on_card.codec_ids) == (on_cpu.text_ids, on_cpu.codec_ids)


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


def test_no_lane_for_copies_is_the_stream_that_captures():
    device = torch.device("cuda", torch.cuda.current_device())
    lanes = [CudaStreams(device)._copy for _ in range(STREAMS_OF_A_PRIORITY + 1)]
    assert _capture_stream(device) not in lanes


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


@pytest.mark.skipif("TORCH_CUDA_SANITIZER" not in os.environ, reason="needs TORCH_CUDA_SANITIZER=1, as in gpu.sh")
def test_the_sanitizer_reports_nothing_of_a_turn_that_streams_layers_and_captures_steps(
    demo: Path, counted: type[Counted]
):
    """The thinker's layers pass through, the talker's stay and are captured. What a graph repeats, it does not see."""
    *encode, answer = plan_of([STAGES[:2], STAGES[2:]], Placement.STREAMED).phases
    answer = replace(answer, placements={**answer.placements, "talker": Placement.PHASE})
    plan = replace(plan_of([STAGES]), phases=(*encode, answer))
    last_event(demo, "cuda", plan, SamplingParams(max_tokens=4), BRIEF)
    assert counted.captures


def test_a_capture_that_breaks_costs_neither_the_answer_nor_memory(caplog: pytest.LogCaptureFixture):
    device = torch.device("cuda", torch.cuda.current_device())
    recorder, ones = CudaRecorder(device), torch.ones(4, device=device)
    assert recorder.capture(lambda: float(ones.sum()))() == 4.0  # to wait for a number breaks a capture
    assert "cannot be captured" in caplog.text
    before_bytes = torch.cuda.memory_reserved()
    torch.empty(64 * MIB, dtype=torch.uint8, device=device)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before_bytes
    assert float(recorder.capture(lambda: ones + 1)()[0]) == 2.0


def test_two_runtimes_at_once_say_what_each_says_alone(demo: Path):
    def answers(omni: OmniRuntime) -> list[tuple]:
        return [spoken(omni, seed) for seed in range(6)]

    opened = partial(OmniRuntime.open, demo, device="cuda", dtype="float32", vram="1GiB")
    with opened() as one, opened() as other, ThreadPoolExecutor(2) as threads:
        alone = answers(one)
        assert list(threads.map(answers, (one, other))) == [alone, alone]


def test_a_cap_lets_the_budget_be_used_beside_the_applications_tensors_and_no_more():
    device = open_device("cuda").torch
    allocate = partial(torch.empty, dtype=torch.uint8, device=device)
    held = [allocate(256 * MIB)]
    torch.cuda.empty_cache()
    with MemoryCap(device, held_bytes=0).at(CONTEXT_BYTES + WORKSPACE_BYTES + 128 * MIB):
        held.append(allocate(120 * MIB))
        with pytest.raises(torch.OutOfMemoryError):
            held.append(allocate(64 * MIB))
    held.append(allocate(64 * MIB))
    assert len(held) == 3


def test_convolutions_of_a_step_are_of_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 384, 500, dtype=torch.float64), torch.randn(384, 384, 7, dtype=torch.float64)
    exact = torch.nn.functional.conv1d(x, weight)
    with exact_arithmetic(torch.device("cuda")):
        ours = torch.nn.functional.conv1d(x.float().cuda(), weight.float().cuda()).cpu()
    assert (ours - exact).norm() < 1e-5 * exact.norm()  # TF32: 3e-4


def test_an_applications_tensors_are_no_part_of_what_a_turn_held(demo: Path):
    theirs = torch.zeros(256 * MIB, dtype=torch.uint8, device="cuda")
    with OmniRuntime.open(demo, device="cuda") as omni:
        *_, finished = omni.generate(MESSAGES, sampling=SAMPLING, speech=SPEECH, media=MEDIA)
    assert max(finished.memory["peak_bytes"].values()) < theirs.nbytes


def test_closing_gives_the_cards_memory_back(demo: Path):
    last_event(demo, "cuda", plan_of([STAGES], Placement.RESIDENT))  # the libraries' own workspaces are made, and stay
    torch.cuda.empty_cache()
    before_bytes = torch.cuda.memory_reserved()
    last_event(demo, "cuda", plan_of([STAGES], Placement.RESIDENT))
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before_bytes + 2 * MIB


def test_the_default_plan_keeps_its_word(demo: Path):
    with OmniRuntime.open(demo, device="cuda") as omni:
        plan = omni.plan(MESSAGES, sampling=SAMPLING, speech=SPEECH, media=MEDIA)
        *_, finished = omni.generate(MESSAGES, sampling=SAMPLING, speech=SPEECH, media=MEDIA)
    assert finished.memory["kind"] == "device allocator"
    assert max(finished.memory["peak_bytes"].values()) <= plan.peak_bytes


BORROWED_ERROR = {
    ("autoawq", torch.float16): 4.2e-4,
    ("autoawq", torch.bfloat16): 3e-3,
    ("gptqmodel", torch.float16): 3.5e-4,
}


@pytest.fixture
def borrowed(kind: type[BorrowedBackend]) -> type[BorrowedBackend]:
    """Another project's kernel, where it is installed."""
    if find_spec(kind.package) is None or find_spec("triton") is None:
        pytest.skip(f"{kind.name} is not installed")
    return kind


@pytest.mark.parametrize("shape", [(3584, 3584), (3584, 512), (18944, 3584)], ids=str)
@pytest.mark.parametrize(("kind", "dtype"), [(kind, dtype) for kind in BORROWED for dtype in kind.dtypes])
def test_another_projects_kernel_errs_as_said_and_the_same_every_time(
    borrowed: type[BorrowedBackend], dtype: torch.dtype, shape: tuple[int, int]
):
    in_features, out_features = shape
    generator = torch.Generator().manual_seed(0)
    stored = pack_awq(torch.randn(out_features, in_features, generator=generator), 128)
    x = torch.randn(100, in_features, generator=generator).to(dtype)
    weights = dict(zip(("qweight", "qzeros", "scales"), (tensor.cuda() for tensor in stored), strict=True))
    backend = choose_backend(torch.device("cuda", 0), dtype, borrowed.name)
    product, again, one_row = (backend.matmul(rows.cuda(), weights, 128) for rows in (x, x, x[70:71]))
    exact = x.double() @ unpack_awq(*stored, 128, torch.float64).t()
    assert (product.cpu() - exact).norm() <= BORROWED_ERROR[borrowed.name, dtype] * exact.norm()
    assert torch.equal(again, product) and torch.equal(one_row, product[70:71])


@pytest.mark.parametrize("kind", BORROWED)
def test_another_projects_kernel_can_be_captured(borrowed: type[BorrowedBackend]):
    stored = pack_awq(torch.randn(512, 256, generator=torch.Generator().manual_seed(0)), 128)
    weights = dict(zip(("qweight", "qzeros", "scales"), (tensor.cuda() for tensor in stored), strict=True))
    backend, x = (
        choose_backend(torch.device("cuda", 0), torch.float16, borrowed.name),
        torch.zeros(1, 256).half().cuda(),
    )
    backend.matmul(x, weights, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.matmul(x, weights, 128)
    x.copy_(torch.randn(1, 256))
    graph.replay()
    assert torch.equal(captured, backend.matmul(x, weights, 128))


@pytest.mark.parametrize(("int8_dtype", "tolerance"), [(torch.float16, 3.5e-4), (torch.bfloat16, 3e-3)], ids=str)
@pytest.mark.parametrize("shape", [(3584, 3584), (3584, 512), (896, 18944), (18944, 3584)], ids=str)
def test_8_bit_products_are_right_and_the_same_every_time(
    shape: tuple[int, int], int8_dtype: torch.dtype, tolerance: float
):
    generator = torch.Generator().manual_seed(0)
    stored = pack_int8(torch.randn(shape[1], shape[0], generator=generator), 128)
    packed, scales = (tensor.cuda() for tensor in stored)
    backend = choose_int8(torch.device("cuda", 0), int8_dtype, CudaBackend())
    assert backend.name == "int8-cuda"
    x = torch.randn(100, shape[0], generator=generator).to(int8_dtype)
    exact = x.double() @ unpack_int8(*stored, 128, torch.float64).t()
    alone = torch.cat([backend.matmul(row.cuda(), packed, scales, 128) for row in x[:16].split(1)])
    for rows in (1, 5, 16, 17, 100):
        product, again = (backend.matmul(x[:rows].cuda(), packed, scales, 128) for _ in range(2))
        assert (product.cpu() - exact[:rows]).norm() <= tolerance * exact[:rows].norm()
        assert torch.equal(product, again) and (rows > 16 or torch.equal(product, alone[:rows]))


@pytest.fixture
def eight_bits(tmp_path: Path) -> Path:
    """A checkpoint whose thinker, talker and output head are in 8 bits."""
    build_demo(tmp_path / "16-bit", quantized=False, dtype="float16")
    options = QuantizeOptions(
        bits=8, group_size=32, samples=2, sample_tokens=16, also=("talker", "lm_head"), also_bits=8
    )
    for _ in quantize_checkpoint(tmp_path / "16-bit", tmp_path / "8-bit", options, device=open_device("cpu")):
        pass
    return tmp_path / "8-bit"


def test_8_bits_can_be_captured(eight_bits: Path, counted: type[Counted], monkeypatch: pytest.MonkeyPatch):
    with OmniRuntime.open(eight_bits, device="cuda", dtype="float16") as omni:
        captured = spoken(omni, 0)
        assert omni.kernel == "int8-cuda" and counted.captures
        monkeypatch.setattr("lowvram.turn.open_recorder", lambda device: Refused())
        assert captured == spoken(omni, 0)
