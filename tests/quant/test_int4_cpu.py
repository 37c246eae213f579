from __future__ import annotations

import pytest
import torch
from awq_by_hand import random_stored, weight_by_hand
from on_this_cpu import needs_int4_cpu
from torch import Tensor

from lowvram.quant import int4_cpu
from lowvram.quant.int4_cpu import UNPACK_FROM_ROWS, Int4CpuBackend
from lowvram.quant.matmul import choose_backend
from lowvram.quant.packing import stored_layout

CPU = torch.device("cpu")


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_weight_takes_half_a_byte_and_a_pair_per_group(group_size: int):
    layout = Int4CpuBackend().layout(3584, 18944, group_size, torch.bfloat16)
    n_bytes = sum(torch.empty(spec.shape, dtype=spec.dtype, device="meta").nbytes for spec in layout.values())
    assert n_bytes == 3584 * 18944 // 2 + 3584 // group_size * 18944 * 2 * 2


@pytest.mark.parametrize(("in_features", "out_features", "group_size"), [(96, 64, 48), (64, 72, 32), (512, 64, 512)])
def test_a_linear_that_the_kernel_cannot_take_keeps_awq_s_tensors(in_features: int, out_features: int, group_size: int):
    layout = Int4CpuBackend().layout(in_features, out_features, group_size, torch.bfloat16)
    assert layout == stored_layout(in_features, out_features, group_size)


def product_of_many_rows(backend: Int4CpuBackend) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Packed weights of 256 inputs and 128 outputs, as many rows as are unpacked for, and their product by hand."""
    layout = backend.layout(256, 128, 32, torch.bfloat16)
    weights = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in layout.items()}
    stored = random_stored(256, 128, 32)
    backend.pack(*stored, 32, weights)
    x = torch.randn(UNPACK_FROM_ROWS, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    return weights, x, x.double() @ weight_by_hand(stored, 32).t()


def test_torch_s_two_ways_read_the_same_weights():
    backend = Int4CpuBackend(load=None)
    weights, x, exact = product_of_many_rows(backend)
    long = backend.matmul(x, weights, 32)
    short = torch.cat([backend.matmul(row, weights, 32) for row in x.split(1)])
    for product in (long, short):
        assert (product - exact).norm() <= 3e-3 * exact.norm()


def test_bytes_as_torch_packs_them_for_avx2_are_unpacked_for_many_rows(monkeypatch: pytest.MonkeyPatch):
    def blocks_of_32_columns(values: Tensor) -> Tensor:
        low, high = values.unflatten(0, (-1, 2, 16)).unbind(1)
        return (low | high << 4).transpose(1, 2).to(torch.uint8).reshape(len(values), -1)

    monkeypatch.setattr(int4_cpu, "_pack_for_kernel", blocks_of_32_columns)
    backend = Int4CpuBackend()
    weights, x, exact = product_of_many_rows(backend)
    assert (backend.matmul(x, weights, 32) - exact).norm() <= 3e-3 * exact.norm()


@needs_int4_cpu
def test_a_kernel_that_computes_wrongly_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    pack = int4_cpu._pack_for_kernel
    monkeypatch.setattr(int4_cpu, "_pack_for_kernel", lambda values: pack(values.roll(1, dims=0)))
    backend = choose_backend(CPU, torch.bfloat16)
    assert backend.name == "reference"
    assert "int4-cpu was passed over: torch's kernel is wrong on this machine" in backend.reason


def test_a_kernel_that_this_torch_lacks_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    def missing(values: Tensor) -> Tensor:
        return torch.ops.aten._no_such_operator(values)

    monkeypatch.setattr(int4_cpu, "_pack_for_kernel", missing)
    backend = choose_backend(CPU, torch.bfloat16)
    assert backend.name == "reference"
    assert "int4-cpu was passed over: torch's kernel fails on this machine" in backend.reason


def test_a_kernel_that_unpacks_for_each_row_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    def neighbours_in_a_byte(values: Tensor) -> Tensor:
        even, odd = values.unflatten(0, (-1, 32)).transpose(1, 2).unflatten(2, (-1, 2)).unbind(-1)
        return (even | odd << 4).to(torch.uint8).reshape(len(values), -1)

    monkeypatch.setattr(int4_cpu, "_pack_for_kernel", neighbours_in_a_byte)
    backend = choose_backend(CPU, torch.bfloat16)
    assert backend.name == "reference"
    assert "int4-cpu was passed over: torch's kernel unpacks weights anew for each row" in backend.reason
