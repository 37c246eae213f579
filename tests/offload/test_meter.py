"""The ledger of live tensors counts storages, once, while they live."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from lowvram.offload.meter import LiveBytes, Meter, open_meter, process_bytes

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
