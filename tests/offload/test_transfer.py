from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sim.device import DEVICE, Card, simulated_card
from torch.utils._python_dispatch import TorchDispatchMode
from toy_blocks import CPU, Shelf

from lowvram.checkpoint import TensorEntry, TensorReader
from lowvram.errors import CheckpointError
from lowvram.offload.pages import HostPages
from lowvram.offload.streams import InOrder
from lowvram.offload.transfer import Staging, Transfer

SMALL_STAGING_BYTES = 1024


@pytest.fixture
def card() -> Iterator[Card]:
    with simulated_card(1 << 20) as card:
        yield card


def shelf_of(tensor: torch.Tensor) -> tuple[Shelf, TensorEntry]:
    shelf = Shelf({"stored": tensor})
    return shelf, shelf.entries()["stored"]


def test_bytes_of_the_same_dtype_arrive_unchanged():
    shelf, entry = shelf_of(torch.randn(5, 3))
    target = torch.empty(5, 3)
    Transfer(shelf, CPU).load(entry, target)
    assert torch.equal(target, shelf.tensors["stored"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wider_target_gets_the_same_values(dtype: torch.dtype):
    shelf, entry = shelf_of(torch.randn(7, 3).to(dtype))
    target = torch.empty(7, 3)
    Transfer(shelf, CPU).load(entry, target)
    assert torch.equal(target, shelf.tensors["stored"].float())


@pytest.mark.parametrize("n", [1, 3, 159, 160, 161, 1000])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_a_device_gets_the_values_through_staging_whatever_their_number(
    card: Card, n: int, stored: torch.dtype, target: torch.dtype
):
    shelf, entry = shelf_of(torch.randn(n).to(stored))
    run = torch.empty(n, dtype=target, device=DEVICE)
    Transfer(shelf, DEVICE, staging_bytes=SMALL_STAGING_BYTES).load(entry, run)
    assert torch.equal(run.cpu(), shelf.tensors["stored"].to(target))
    assert shelf.largest_bytes <= SMALL_STAGING_BYTES


class _Arrivals(TorchDispatchMode):
    """Notes the dtypes (of source, of target) of each copy to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[0].device == DEVICE:
            self.dtypes.add((args[1].dtype, args[0].dtype))
        return func(*args, **(kwargs or {}))


def test_a_cast_happens_before_the_copy_not_in_memory_that_torch_takes_on_the_device(card: Card):
    shelf, entry = shelf_of(torch.randn(1000).half())
    run = torch.empty(1000, device=DEVICE)
    with _Arrivals() as arrivals:
        Transfer(shelf, DEVICE, staging_bytes=SMALL_STAGING_BYTES).load(entry, run)
    assert arrivals.dtypes == {(torch.float32, torch.float32)}


def test_a_copy_kept_on_the_host_arrives_unchanged(card: Card):
    transfer = Transfer(Shelf(), DEVICE, staging_bytes=SMALL_STAGING_BYTES)
    pages = HostPages(3000, transfer.streams)
    pages.run.copy_(torch.arange(3000).remainder(251))
    run = torch.empty(3000, dtype=torch.uint8, device=DEVICE)
    transfer.send(pages, run)
    assert torch.equal(run.cpu(), pages.run)


def test_a_tensor_that_ends_early_is_a_checkpoint_error_and_the_next_load_works(card: Card):
    shelf, entry = shelf_of(torch.randn(1000))
    transfer, run = Transfer(shelf, DEVICE, staging_bytes=SMALL_STAGING_BYTES), torch.empty(1000, device=DEVICE)
    shelf.damaged.add("stored")
    with pytest.raises(CheckpointError):
        transfer.load(entry, run)
    shelf.damaged.clear()
    transfer.load(entry, run)
    assert torch.equal(run.cpu(), shelf.tensors["stored"])


def test_a_file_cut_short_while_open_is_a_checkpoint_error(tmp_path: Path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(4000))
    entry = TensorEntry("w", path, "F32", (1000,), 0, 4000)
    with TensorReader() as reader:
        transfer, target = Transfer(reader, CPU, staging_bytes=SMALL_STAGING_BYTES), torch.empty(1000).half()
        transfer.load(entry, target)
        path.write_bytes(bytes(2000))
        with pytest.raises(CheckpointError, match=r"is truncated: .* bytes of w are missing"):
            transfer.load(entry, target)


def test_read_returns_the_stored_dtype_and_shape():
    shelf, entry = shelf_of(torch.arange(6, dtype=torch.int32).view(2, 3))
    assert torch.equal(Transfer(shelf, CPU).read(entry), shelf.tensors["stored"])


def test_rooms_of_one_buffer_do_not_overlap():
    staging = Staging(SMALL_STAGING_BYTES, InOrder(apart=True))
    rooms = [staging.take(100).fill_(value) for value in range(8)]
    assert [set(room.tolist()) for room in rooms] == [{value} for value in range(8)]


def test_a_device_apart_has_two_staging_buffers_and_the_host_itself_one():
    def addresses(apart: bool) -> int:
        staging = Staging(SMALL_STAGING_BYTES, InOrder(apart=apart))
        return len({staging.take(SMALL_STAGING_BYTES).data_ptr() for _ in range(5)})

    assert (addresses(True), addresses(False)) == (2, 1)


def test_releasing_gives_the_staging_buffers_back():
    shelf, entry = shelf_of(torch.zeros(10).half())
    transfer = Transfer(shelf, CPU)
    transfer.load(entry, torch.empty(10))
    room = transfer._staging.take(10)
    transfer.release()
    assert not transfer._staging._buffers
    transfer.load(entry, torch.empty(10))
    assert transfer._staging.take(10).data_ptr() != room.data_ptr()
