from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_blocks import CPU, Shelf

from lowvram.offload.footprint import BLOCK_ALIGNMENT_BYTES
from lowvram.offload.pages import HostPages
from lowvram.offload.streams import InOrder
from lowvram.offload.transfer import Transfer
from lowvram.quant.linear import AWQLinear
from lowvram.quant.matmul import choose_backend
from lowvram.quant.packing import TensorSpec, pack_awq, unpack_awq
from lowvram.quant.reference import ReferenceBackend
from lowvram.weights import HostRows, WeightBlock

GROUP_SIZE = 32


def block_of(module: nn.Module, shelf: Shelf, dtype: torch.dtype = torch.float32) -> WeightBlock:
    return WeightBlock("block", module, "stored.", shelf.entries(), Transfer(shelf, CPU), dtype)


@pytest.fixture
def linear() -> tuple[nn.Module, Shelf]:
    shelf = Shelf({"stored.weight": torch.randn(3, 5), "stored.bias": torch.randn(3).half()})
    return nn.Linear(5, 3, device="meta"), shelf


def four_bit(weight: torch.Tensor, backend: Any, dtype: torch.dtype) -> tuple[nn.Module, Shelf]:
    """A module whose child `proj` is a 4-bit linear of (nearly) these weights [N, K]."""
    stored = dict(zip(("qweight", "qzeros", "scales"), pack_awq(weight, GROUP_SIZE), strict=True))
    shelf = Shelf({f"stored.proj.{leaf}": tensor for leaf, tensor in stored.items()})
    parent = nn.Module()
    n_out, n_in = weight.shape
    parent.proj = AWQLinear(n_in, n_out, bias=False, group_size=GROUP_SIZE, backend=backend, dtype=dtype)
    return parent, shelf


def load(block: WeightBlock) -> torch.Tensor:
    run = torch.empty(block.n_bytes, dtype=torch.uint8)
    block.fill(run)
    block.bind(run)
    return run


def test_a_bound_module_computes_with_the_stored_weights(linear: tuple):
    module, shelf = linear
    load(block_of(module, shelf))
    x = torch.randn(2, 5)
    expected = x @ shelf.tensors["stored.weight"].T + shelf.tensors["stored.bias"].float()
    torch.testing.assert_close(module(x), expected)


def test_parameters_are_aligned_views_of_one_run(linear: tuple):
    module, shelf = linear
    run = load(block_of(module, shelf))
    offsets = [parameter.data_ptr() - run.data_ptr() for parameter in module.parameters()]
    assert offsets == [0, BLOCK_ALIGNMENT_BYTES]
    assert {parameter.untyped_storage().data_ptr() for parameter in module.parameters()} == {run.data_ptr()}


def test_a_block_binds_to_a_run_that_has_room_for_more(linear: tuple):
    """As a slot has, which is made for the largest block of a ring."""
    module, shelf = linear
    block, slot = block_of(module, shelf), torch.empty(4096, dtype=torch.uint8)
    block.fill(slot[: block.n_bytes])
    block.bind(slot)
    assert torch.equal(module.weight, shelf.tensors["stored.weight"])


def test_an_unbound_module_holds_no_memory(linear: tuple):
    module, shelf = linear
    block = block_of(module, shelf)
    load(block)
    block.unbind()
    assert all(parameter.is_meta for parameter in module.parameters())


def test_a_block_can_be_loaded_again(linear: tuple):
    module, shelf = linear
    block = block_of(module, shelf)
    load(block)
    block.unbind()
    load(block)
    assert torch.equal(module.weight, shelf.tensors["stored.weight"])


def test_four_bit_linears_are_packed_on_the_way():
    weight = torch.randn(16, 32)
    parent, shelf = four_bit(weight, choose_backend(CPU, torch.float32, "reference"), torch.float32)
    load(block_of(parent, shelf))
    x = torch.randn(4, 32)
    stored = [shelf.tensors[f"stored.proj.{leaf}"] for leaf in ("qweight", "qzeros", "scales")]
    torch.testing.assert_close(parent.proj(x), x @ unpack_awq(*stored, GROUP_SIZE, torch.float32).T)


class Lanes(InOrder):
    """Knows which lane work is issued to."""

    lane = "compute"

    @contextmanager
    def copying(self) -> Iterator[None]:
        self.lane = "copy"
        yield
        self.lane = "compute"


class Repacking:
    """A backend whose layout is not AWQ's, so that weights are packed for it; `lanes` notes where that was done."""

    name = "repacking"

    def __init__(self, streams: Lanes) -> None:
        self._streams = streams
        self.lanes: list[str] = []

    def layout(self, *sizes: Any) -> dict[str, TensorSpec]:
        return {f"packed_{leaf}": spec for leaf, spec in ReferenceBackend().layout(*sizes).items()}

    def pack(self, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, out: Mapping[str, Tensor]) -> None:
        self.lanes.append(self._streams.lane)
        for packed, stored in zip(out.values(), (qweight, qzeros, scales), strict=True):
            packed.copy_(stored.flip(0))


@pytest.fixture
def repacked() -> tuple[WeightBlock, Repacking]:
    streams = Lanes(apart=True)
    backend = Repacking(streams)
    parent, shelf = four_bit(torch.randn(16, 64), backend, torch.float32)
    transfer = Transfer(shelf, CPU, streams)
    return WeightBlock("block", parent, "stored.", shelf.entries(), transfer, torch.float32), backend


def test_packing_is_issued_to_the_copy_lane(repacked: tuple):
    block, backend = repacked
    block.fill(torch.empty(block.n_bytes, dtype=torch.uint8))
    assert backend.lanes == ["copy"]


def test_a_copy_on_the_host_has_the_layout_of_the_device(repacked: tuple):
    """Packed once, and then sent as it is."""
    block, backend = repacked
    pages = HostPages(block.n_bytes, InOrder(apart=True))
    direct, sent = (torch.zeros(block.n_bytes, dtype=torch.uint8) for _ in range(2))
    pages.run.zero_()
    block.fill(direct)
    block.fill(pages.run)
    block._transfer.send(pages, sent)
    assert torch.equal(sent, direct)
    assert len(backend.lanes) == 2


def test_stored_names_are_all_that_a_block_reads(linear: tuple):
    module, shelf = linear
    assert block_of(module, shelf).stored_names == set(shelf.tensors)


def test_host_rows_come_in_the_compute_dtype():
    rows = HostRows(torch.arange(12.0).view(4, 3).half(), torch.float32)
    assert (len(rows), rows.width) == (4, 3)
    torch.testing.assert_close(rows(torch.tensor([2, 0])), torch.tensor([[6.0, 7, 8], [0, 1, 2]]))
