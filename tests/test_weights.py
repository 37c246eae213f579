from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from lowvram.checkpoint import TensorEntry
from lowvram.offload.footprint import BLOCK_ALIGNMENT_BYTES
from lowvram.offload.transfer import Transfer
from lowvram.quant.linear import AWQLinear
from lowvram.quant.matmul import choose_backend
from lowvram.quant.packing import pack_awq, unpack_awq
from lowvram.weights import HostRows, WeightBlock

CPU = torch.device("cpu")


@dataclass
class Shelf:
    """Tensors by name, served as a checkpoint's reader would."""

    tensors: dict[str, torch.Tensor]

    def entries(self) -> dict[str, TensorEntry]:
        kinds = {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32"}
        return {
            name: TensorEntry(name, Path("shelf"), kinds[t.dtype], tuple(t.shape), 0, t.nbytes)
            for name, t in self.tensors.items()
        }

    def read_into(self, entry: TensorEntry, buffer: memoryview, start: int = 0) -> None:
        stored = self.tensors[entry.name].reshape(-1).view(torch.uint8).numpy()
        buffer[:] = stored[start : start + len(buffer)].tobytes()


def block_of(module: nn.Module, shelf: Shelf, dtype: torch.dtype = torch.float32) -> WeightBlock:
    return WeightBlock("block", module, "stored.", shelf.entries(), Transfer(shelf, CPU), dtype)


@pytest.fixture
def linear() -> tuple[nn.Module, Shelf]:
    shelf = Shelf({"stored.weight": torch.randn(3, 5), "stored.bias": torch.randn(3).half()})
    return nn.Linear(5, 3, device="meta"), shelf


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
    stored = dict(zip(("qweight", "qzeros", "scales"), pack_awq(weight, 32), strict=True))
    shelf = Shelf({f"stored.proj.{leaf}": tensor for leaf, tensor in stored.items()})
    backend = choose_backend(CPU, torch.float32, "reference")
    parent = nn.Module()
    parent.proj = AWQLinear(32, 16, bias=False, group_size=32, backend=backend, dtype=torch.float32)
    load(block_of(parent, shelf))
    x = torch.randn(4, 32)
    torch.testing.assert_close(parent.proj(x), x @ unpack_awq(*stored.values(), 32, torch.float32).T)


def test_stored_names_are_all_that_a_block_reads(linear: tuple):
    module, shelf = linear
    assert block_of(module, shelf).stored_names == set(shelf.tensors)


def test_host_rows_come_in_the_compute_dtype():
    rows = HostRows(torch.arange(12.0).view(4, 3).half(), torch.float32)
    assert (len(rows), rows.width) == (4, 3)
    torch.testing.assert_close(rows(torch.tensor([2, 0])), torch.tensor([[6.0, 7, 8], [0, 1, 2]]))
