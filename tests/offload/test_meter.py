"""The ledger of live tensors counts storages, once, while they live."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowvram.offload.budget import GIB
from lowvram.offload.meter import MOST_MOMENTS, AllocatorMeter, LiveBytes, Meter, Timeline, open_meter, process_bytes
from lowvram.offload.profile import Moment

KIB_OF_FLOATS = 256


def test_a_tensor_counts_while_it_lives():
    with LiveBytes() as ledger:
        tensor = torch.zeros(KIB_OF_FLOATS)
        assert ledger.live_bytes == 1024
        del tensor
        assert ledger.live_bytes == 0
    assert ledger.peak_bytes == 1024


def test_a_view_keeps_its_whole_storage_counted_once():
    with LiveBytes() as ledger:
        tensor = torch.zeros(KIB_OF_FLOATS)
        row = tensor.view(16, 16)[3]
        del tensor
        assert ledger.live_bytes == 1024
        del row
        assert ledger.live_bytes == 0


def test_memory_from_before_does_not_count_even_when_written_or_viewed():
    weight = torch.zeros(16, 16)
    with LiveBytes() as ledger:
        weight.add_(1)
        turned = weight.t()
        assert ledger.live_bytes == 0, turned.shape


def test_memory_from_before_counts_once_announced():
    weight = torch.zeros(KIB_OF_FLOATS)
    ledger = LiveBytes()
    ledger.track(weight, weight.view(16, 16))
    with ledger:
        doubled = weight * 2
        assert ledger.live_bytes == 2048, doubled.shape
    del weight
    assert ledger.live_bytes == 1024


def test_a_slice_announces_the_whole_storage_it_keeps_alive():
    ledger, row = LiveBytes(), torch.zeros(16, 16)[3]
    ledger.track(row)
    assert ledger.live_bytes == 1024


def test_a_tensor_made_from_a_list_counts():
    with LiveBytes() as ledger:
        tensor = torch.tensor([1.0, 2.0])
        assert ledger.live_bytes == tensor.nbytes


def test_memory_held_only_by_autograd_still_counts():
    with LiveBytes() as ledger:
        result = (torch.zeros(KIB_OF_FLOATS, requires_grad=True) * 2).exp()
        saved_by = result.grad_fn
        del result
        assert ledger.live_bytes >= 1024
        del saved_by
        gc.collect()
        assert ledger.live_bytes == 0


def test_storages_reusing_an_address_are_told_apart():
    with LiveBytes() as ledger:
        for _ in range(100):
            torch.zeros(KIB_OF_FLOATS)
            assert ledger.live_bytes == 0
    assert ledger.peak_bytes == 1024


def test_only_the_chosen_device_counts():
    with LiveBytes("meta") as ledger:
        here, there = torch.zeros(KIB_OF_FLOATS), torch.zeros(KIB_OF_FLOATS, device="meta")
        assert ledger.live_bytes == 1024, (here.shape, there.shape)


def test_a_layers_intermediate_results_are_in_the_peak_but_not_left_over():
    layer = nn.Sequential(nn.Linear(16, 64, bias=False), nn.ReLU(), nn.Linear(64, 16, bias=False))
    with torch.inference_mode(), LiveBytes() as ledger:
        result = layer(torch.zeros(4, 16))
        assert ledger.live_bytes == result.nbytes
    # The input is dropped by nobody while the layer runs; the widest pair is 64 wide before and after the ReLU.
    assert ledger.peak_bytes == 4 * (16 + 64 + 64) * 4


def test_phases_have_peaks_of_their_own():
    ledger = LiveBytes()
    with ledger:
        with ledger.phase("see"):
            kept = torch.zeros(KIB_OF_FLOATS)
        with ledger.phase("think"):
            torch.zeros(3 * KIB_OF_FLOATS)
    assert ledger.peaks == {"see": 1024, "think": 4096}, kept.shape


def test_a_phase_met_again_keeps_its_highest_peak():
    ledger = LiveBytes()
    with ledger:
        for n in (2, 3, 1):
            with ledger.phase("see"):
                torch.zeros(n * KIB_OF_FLOATS)
    assert ledger.peaks == {"see": 3072}


def test_a_phase_that_fails_is_over():
    ledger = LiveBytes()
    with ledger:
        with pytest.raises(ZeroDivisionError), ledger.phase("see"):
            raise ZeroDivisionError
        torch.zeros(KIB_OF_FLOATS)
    assert ledger.peaks == {"see": 0}


def test_what_an_earlier_phase_left_is_not_a_phases_own_if_it_drops_it_first():
    ledger = LiveBytes()
    with ledger:
        with ledger.phase("see"):
            left = torch.zeros(4 * KIB_OF_FLOATS)
        with ledger.phase("think"):
            del left
            torch.zeros(KIB_OF_FLOATS)
    assert ledger.peaks == {"see": 4096, "think": 1024}


def test_what_an_earlier_phase_left_counts_in_a_phase_that_keeps_it():
    ledger = LiveBytes()
    with ledger:
        with ledger.phase("see"):
            kept = torch.zeros(4 * KIB_OF_FLOATS)
        with ledger.phase("think"):
            pass
    assert ledger.peaks == {"see": 4096, "think": 4096}, kept.shape


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_operator_composed_of_others_counts_what_they_make(mode: type[torch.no_grad] | type[torch.inference_mode]):
    row, wide, column = torch.ones(1, 16), torch.ones(16, KIB_OF_FLOATS), torch.ones(KIB_OF_FLOATS, 1)
    with mode(), LiveBytes() as ledger:
        product = torch.einsum("ij,jk,kl->il", row, wide, column)  # by way of a row of 1 KiB
    assert (ledger.live_bytes, ledger.peak_bytes) == (product.nbytes, product.nbytes + 1024)


def test_an_explained_peak_lists_what_was_held_then_and_who_made_it():
    ledger = LiveBytes(explain=True)
    with ledger, ledger.phase("see"):
        kept = torch.zeros(KIB_OF_FLOATS)
        doubled = torch.cat((kept, kept))
        del doubled
        later = torch.zeros(8)
    largest = ledger.largest("see")
    assert [(held.n_bytes, held.operator, held.shape) for held in largest] == [
        (2048, "aten.cat.default", (512,)),
        (1024, "aten.zeros.default", (256,)),
    ], later.shape


def test_a_moment_has_the_highest_since_the_one_before_less_what_is_known():
    ledger = LiveBytes()
    with ledger, ledger.phase("think"):
        weights = torch.zeros(KIB_OF_FLOATS)
        ledger.mark("load", 1024, 0)
        torch.zeros(3 * KIB_OF_FLOATS)
        cache = torch.zeros(2 * KIB_OF_FLOATS)
        ledger.mark("prefill", 1024, 2048)
        ledger.mark("text", 1024, 2048)
    assert ledger.timeline == (
        Moment("load", "think", 1024, 0, 0),
        Moment("prefill", "think", 1024, 2048, 1024),
        Moment("text", "think", 1024, 2048, 0),
    ), (weights.shape, cache.shape)


def test_where_weights_have_moved_what_is_held_now_stands_for_the_peak():
    timeline = Timeline()
    timeline.mark("load", "see", 700, 0, peak_bytes=900, held_bytes=710)
    timeline.mark("see", "see", 700, 0, peak_bytes=900, held_bytes=710)
    assert [moment.activation_bytes for moment in timeline.moments] == [10, 200]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5 * MOST_MOMENTS))
def test_a_timeline_stays_short_and_keeps_its_highest(peaks: list[int]):
    timeline = Timeline()
    for peak_bytes in peaks:
        timeline.mark("text", "think", 0, 0, peak_bytes=peak_bytes, held_bytes=0)
    totals = [moment.total_bytes for moment in timeline.moments]
    assert len(totals) <= MOST_MOMENTS and max(totals) == max(peaks)


def test_moments_that_are_merged_stay_in_order_and_evenly_spaced():
    timeline = Timeline()
    for n in range(3 * MOST_MOMENTS):
        timeline.mark(str(n), "think", 0, 0, peak_bytes=n, held_bytes=0)
    order = [int(moment.label) for moment in timeline.moments]
    assert order == list(range(3, 3 * MOST_MOMENTS, 4))


def test_a_turn_begins_without_the_last_ones_peaks_and_moments():
    ledger = LiveBytes()
    with ledger:
        with ledger.phase("see"):
            torch.zeros(KIB_OF_FLOATS)
        ledger.mark("see", 0, 0)
        ledger.begin(0)
    assert (ledger.peaks, ledger.timeline) == ({}, ())


def test_outside_its_scope_nothing_is_counted():
    ledger = LiveBytes()
    with ledger.phase("see"):
        torch.zeros(KIB_OF_FLOATS)
    assert ledger.peaks == {"see": 0}


def test_a_cpu_is_not_measured_unless_asked_and_says_so():
    meter: Meter = open_meter(torch.device("cpu"))
    with meter.phase("see"):
        torch.zeros(KIB_OF_FLOATS)
    assert (meter.kind, meter.peaks) == ("not measured", {})


def test_the_resident_set_holds_what_was_just_written():
    before = process_bytes()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    after = process_bytes()
    assert after.resident_bytes - before.resident_bytes > block.nbytes // 2
    assert after.peak_resident_bytes is None or after.peak_resident_bytes >= block.nbytes


def test_what_an_application_holds_is_no_part_of_a_phases_peak(monkeypatch: pytest.MonkeyPatch):
    ours, theirs = 2 * GIB, 3 * GIB
    allocated = {"current": ours + theirs, "peak": ours + theirs + GIB}
    stats = {"allocated_bytes": {"all": allocated}, "reserved_bytes": {"all": {"current": 7 * GIB, "peak": 8 * GIB}}}
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _device: ours + theirs)
    monkeypatch.setattr("torch.cuda.memory_stats_as_nested_dict", lambda _device: stats)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda _device: None)
    meter = AllocatorMeter(torch.device("cuda", 0))
    meter.begin(held_bytes=ours)
    with meter.phase("think"):
        meter.mark("text", weights_bytes=ours, kv_bytes=0)
    assert meter.peaks == {"think": 3 * GIB}
    assert meter.reserved_peaks == {"think": 8 * GIB}
    assert [moment.total_bytes for moment in meter.timeline] == [ours]  # nothing is known of weights that have come
