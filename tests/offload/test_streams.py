from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from toy_blocks import Shelf, expected, phase, stack, walk

from lowvram.offload.pages import HostPages
from lowvram.offload.placement import HostTier, Placement, Plan
from lowvram.offload.residency import Residency
from lowvram.offload.streams import CudaStreams, InOrder, Lane, in_a_thread, open_streams
from lowvram.offload.transfer import Transfer

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
needs_sanitizer = pytest.mark.skipif(
    "TORCH_CUDA_SANITIZER" not in os.environ, reason="needs TORCH_CUDA_SANITIZER=1, as in benchmarks/gpu.sh"
)


@pytest.fixture
def streams() -> Iterator[CudaStreams]:
    yield CudaStreams(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize(("device", "apart"), [("cpu", False), ("meta", False), ("lazy", True)])
def test_only_a_device_with_memory_of_its_own_is_apart(device: str, apart: bool):
    assert open_streams(torch.device(device)).apart is apart


def test_work_beside_is_done_when_its_result_is_called_and_raises_what_it_raised():
    told = threading.Event()
    in_a_thread(told.set)()
    assert told.is_set()
    with pytest.raises(ZeroDivisionError):
        in_a_thread(lambda: 1 // 0)()


def test_where_all_is_in_order_work_beside_is_done_at_once():
    done: list[bool] = []
    InOrder(apart=True).beside(lambda: done.append(True))
    assert done


@needs_card
def test_another_thread_computes_in_the_stream_of_the_one_that_let_it(streams: CudaStreams):
    with torch.cuda.stream(torch.cuda.Stream()):
        ours, here = torch.cuda.current_stream(), streams.here()
    with here():
        assert torch.cuda.current_stream() == ours
    assert torch.cuda.current_stream() != ours


TO_THE_SECOND_CARD = """
import torch
from lowvram.offload.streams import CudaStreams

streams = CudaStreams(torch.device("cuda", 1))
with streams.copying():
    torch.ones(1, device="cuda:1")
with streams.here()():
    torch.ones(1, device="cuda:1")
raise SystemExit(torch._C._cuda_hasPrimaryContext(0))
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards")
def test_the_second_card_is_used_without_a_context_on_the_first():
    assert subprocess.run([sys.executable, "-c", TO_THE_SECOND_CARD]).returncode == 0


@needs_card
def test_weights_that_came_in_a_thread_are_seen_with_their_own_bytes(streams: CudaStreams):
    shelf, device = Shelf(), torch.device("cuda", torch.cuda.current_device())
    transfer = Transfer(shelf, device, streams, staging_bytes=1 << 20)
    widths = {"visual": [1 << 10], "thinker": [1 << 20] * 8}
    residency = Residency({name: stack(shelf, transfer, name, some) for name, some in widths.items()}, transfer)
    see = replace(phase(visual=Placement.PHASE), prefetch_bytes=1 << 30)
    think = phase(thinker=Placement.PHASE)
    for _ in range(10):
        list(residency.enter(see, think))
        list(residency.enter(think))
        seen = walk(residency.component("thinker"))
        assert seen == [expected("thinker", i) for i in range(8)]
    residency.release()


@needs_card
def test_compute_waits_for_a_copy_that_it_is_told_of(streams: CudaStreams):
    source = torch.ones(1 << 26, dtype=torch.uint8).pin_memory()
    target = torch.zeros(1 << 26, dtype=torch.uint8, device="cuda")
    streams.wait(Lane.COPY, streams.record(Lane.COMPUTE))
    with streams.copying():
        target.copy_(source, non_blocking=True)
    streams.wait(Lane.COMPUTE, streams.record(Lane.COPY))
    assert int(target[-1]) == 1


@needs_card
def test_pages_are_locked_at_their_exact_size(streams: CudaStreams):
    pages = HostPages(129 << 20, streams)
    run = torch.from_numpy(pages.run.numpy())  # torch answers for the beginning of a storage: the pages' is in it
    assert pages.lock()
    assert run.is_pinned()
    pages.unlock()
    assert not run.is_pinned()


@needs_card
def test_a_refused_lock_leaves_no_error_for_the_next_kernel(streams: CudaStreams):
    pages = torch.zeros(1 << 20, dtype=torch.uint8)
    assert streams.lock_pages(pages)
    assert not streams.lock_pages(pages)
    assert int(torch.ones(1, device="cuda").add_(1)) == 2
    streams.unlock_pages(pages)


def pass_through(streams: CudaStreams, tier: HostTier, times: int, staging_bytes: int) -> torch.Tensor:
    """What each of 8 layers of 4 MiB was seen with, its least and its largest weight [times * 8, 2]."""
    shelf, device = Shelf(), torch.device("cuda", torch.cuda.current_device())
    transfer = Transfer(shelf, device, streams, staging_bytes)
    residency = Residency({"thinker": stack(shelf, transfer, "thinker", [1 << 20] * 8)}, transfer)
    tiers = {f"thinker.{i}": tier for i in range(8)}
    residency.prepare(Plan("cuda", None, (), 1, 1, 0, 1, 1, 1, host_tiers=tiers))
    list(residency.enter(phase({"thinker": 1}, thinker=Placement.STREAMED)))
    seen = []  # on the card until the end, since to look at a value is to wait for it
    for _ in range(times):
        for use in residency.component("thinker"):
            with use as linear:
                seen.append(torch.stack(linear.weight.aminmax()))
    assert residency.misses == 0
    on_host = torch.stack(seen).cpu()
    residency.release()
    return on_host


@needs_card
@pytest.mark.parametrize("tier", HostTier)
def test_layers_that_pass_through_a_card_are_seen_with_their_own_bytes(streams: CudaStreams, tier: HostTier):
    seen = pass_through(streams, tier, times=20, staging_bytes=1 << 20)
    assert seen.tolist() == [[expected("thinker", i)] * 2 for i in range(8)] * 20


WHOLE_LAYERS = 8 << 20
"""Of staging that takes a layer at once: the sanitizer knows memory by where a tensor begins, so of a layer that comes
in pieces it would watch the first alone, which is there before the last is staged."""


@needs_card
@needs_sanitizer
@pytest.mark.parametrize("tier", HostTier)
def test_the_sanitizer_reports_no_layer_that_passes_through(streams: CudaStreams, tier: HostTier):
    pass_through(streams, tier, times=2, staging_bytes=WHOLE_LAYERS)


@needs_card
@needs_sanitizer
@pytest.mark.parametrize("tier", HostTier)
@pytest.mark.parametrize("deaf", Lane)
def test_the_sanitizer_reports_layers_that_pass_through_where_a_lane_does_not_wait(
    streams: CudaStreams, monkeypatch: pytest.MonkeyPatch, tier: HostTier, deaf: Lane
):
    from torch.cuda._sanitizer import CUDASanitizerErrors  # to import it is to have every event traced from then on

    wait = streams.wait
    monkeypatch.setattr(streams, "wait", lambda lane, event: None if lane is deaf else wait(lane, event))
    with pytest.raises(CUDASanitizerErrors) as reported:
        pass_through(streams, tier, times=2, staging_bytes=WHOLE_LAYERS)
    torch.cuda.synchronize()  # before the memory that copies are under way from, which `reported` holds, is freed
    assert "possible data race" in str(reported.value.errors[0])
