from __future__ import annotations

import logging

import pytest
import torch
from sim.device import DEVICE, simulated_card
from toy_blocks import CPU, Locks, Shelf, expected, stack

from lowvram.errors import CheckpointError
from lowvram.offload.host import HostCopies
from lowvram.offload.placement import HostTier
from lowvram.offload.transfer import Transfer
from lowvram.weights import WeightBlock

WIDTHS = [600, 1000, 8]


class Host:
    """Three blocks on their way to a simulated card, and what the host keeps of them."""

    def __init__(self, streams: Locks, device: torch.device = DEVICE) -> None:
        self.shelf, self.streams = Shelf(), streams
        self.device = device
        self.transfer = Transfer(self.shelf, device, streams, staging_bytes=1024)
        self.blocks = stack(self.shelf, self.transfer, "talker", WIDTHS)
        self.copies = HostCopies(self.transfer)

    def send(self, block: WeightBlock) -> list[float]:
        """The values that arrive."""
        run = torch.empty(block.n_bytes, dtype=torch.uint8, device=self.device)
        self.copies.send(block, run)
        block.bind(run)
        return block.module.weight.cpu().unique().tolist()


@pytest.fixture
def host():
    with simulated_card(1 << 20):
        host = Host(Locks())
        yield host
        host.copies.drop()


def tiers(tier: HostTier) -> dict[str, HostTier]:
    return {f"talker.{i}": tier for i in range(len(WIDTHS))}


@pytest.mark.parametrize("tier", HostTier)
def test_every_tier_sends_the_same_bytes_each_time(host: Host, tier: HostTier):
    host.copies.prepare(tiers(tier))
    for _ in range(2):
        assert [host.send(block) for block in host.blocks] == [[expected("talker", i)] for i in range(len(WIDTHS))]


@pytest.mark.parametrize("tier", [HostTier.PAGEABLE, HostTier.PINNED])
def test_a_copy_is_read_from_the_file_once(host: Host, tier: HostTier):
    host.copies.prepare(tiers(tier))
    host.send(host.blocks[0])
    before = list(host.shelf.reads)
    host.send(host.blocks[0])
    assert host.shelf.reads == before


def test_a_block_that_the_plan_leaves_in_its_file_is_read_each_time(host: Host):
    host.copies.prepare({"talker.1": HostTier.PAGEABLE})
    host.send(host.blocks[0])
    host.send(host.blocks[0])
    assert set(host.shelf.reads) == {"talker.0.weight"}
    assert len(host.shelf.reads) > 2
    assert host.copies.n_bytes == 0


def test_copies_are_made_as_blocks_are_sent_and_counted_to_the_byte(host: Host):
    host.copies.prepare(tiers(HostTier.PINNED))
    assert host.copies.n_bytes == 0
    for i, block in enumerate(host.blocks):
        host.send(block)
        assert host.copies.n_bytes == sum(block.n_bytes for block in host.blocks[: i + 1])


def test_only_pinned_copies_are_page_locked(host: Host):
    host.copies.prepare({"talker.0": HostTier.PINNED, "talker.1": HostTier.PAGEABLE})
    staging = 2 * 4096
    for block in host.blocks[:2]:
        host.send(block)
    assert sum(host.streams.locked.values()) - staging == 4096


def test_another_plan_drops_what_it_does_not_want_and_keeps_the_rest(host: Host):
    host.copies.prepare(tiers(HostTier.PAGEABLE))
    for block in host.blocks:
        host.send(block)
    host.copies.prepare({"talker.1": HostTier.PAGEABLE})
    assert host.copies.n_bytes == host.blocks[1].n_bytes
    reads = len(host.shelf.reads)
    assert host.send(host.blocks[1]) == [expected("talker", 1)]
    assert len(host.shelf.reads) == reads


def test_a_copy_changes_its_tier_without_being_read_again(host: Host):
    host.transfer._staging.take(1)
    staging = dict(host.streams.locked)
    for tier, locks in [(HostTier.PAGEABLE, 0), (HostTier.PINNED, 1), (HostTier.PAGEABLE, 0)]:
        host.copies.prepare({"talker.0": tier})
        assert host.send(host.blocks[0]) == [expected("talker", 0)]
        assert len(host.streams.locked) - len(staging) == locks
    assert host.shelf.reads.count("talker.0.weight") == 1


def test_dropping_gives_all_back_and_the_next_send_makes_copies_again(host: Host):
    host.copies.prepare(tiers(HostTier.PINNED))
    host.send(host.blocks[0])
    host.copies.drop()
    host.transfer.release()
    assert (host.copies.n_bytes, host.streams.locked) == (0, {})
    host.send(host.blocks[0])
    assert host.copies.n_bytes == host.blocks[0].n_bytes


def test_where_locking_is_refused_ordinary_memory_serves_and_it_is_said_once(caplog: pytest.LogCaptureFixture):
    with simulated_card(1 << 20), caplog.at_level(logging.WARNING):
        host = Host(Locks(limit_bytes=2 * 4096 + 4096))
        host.transfer._staging.take(1)
        host.copies.prepare(tiers(HostTier.PINNED))
        sent = [host.send(block) for block in host.blocks * 2]
        assert sent == [[expected("talker", i)] for i in range(len(WIDTHS))] * 2
    assert host.copies.pinning_refused
    assert host.copies.n_bytes == sum(block.n_bytes for block in host.blocks)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_copy_that_could_not_be_read_is_not_kept(host: Host):
    host.copies.prepare(tiers(HostTier.PINNED))
    host.shelf.damaged.add("talker.0.weight")
    with pytest.raises(CheckpointError):
        host.send(host.blocks[0])
    assert host.copies.n_bytes == 0
    host.shelf.damaged.clear()
    assert host.send(host.blocks[0]) == [expected("talker", 0)]


def test_where_the_device_is_the_host_no_second_copy_is_kept():
    shelf = Shelf()
    transfer = Transfer(shelf, CPU)
    blocks = stack(shelf, transfer, "talker", WIDTHS)
    copies = HostCopies(transfer)
    copies.prepare(tiers(HostTier.PINNED))
    copies.send(blocks[0], torch.empty(blocks[0].n_bytes, dtype=torch.uint8))
    assert copies.n_bytes == 0
