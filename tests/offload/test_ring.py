from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_blocks import CPU, Shelf, expected, stack

from lowvram.errors import CheckpointError
from lowvram.offload.host import HostCopies
from lowvram.offload.ring import Ring
from lowvram.offload.transfer import Transfer
from lowvram.weights import WeightBlock

WIDTHS = [100, 300, 200, 64, 300]


class Layers:
    """Blocks in a ring, used as a stage uses them; `reads` counts how often each was fetched."""

    def __init__(self, n: int = 5, n_slots: int = 2) -> None:
        self.shelf = Shelf()
        transfer = Transfer(self.shelf, CPU)
        self.blocks = stack(self.shelf, transfer, "thinker", [WIDTHS[i % 5] for i in range(n)])
        self.ring = Ring(self.blocks, n_slots, HostCopies(transfer), transfer.streams, CPU)
        for _ in self.ring.awaited():
            self.ring.load_next()

    def use(self, i: int, breaking: bool = False) -> None:
        """Use a block and check that it sees its own bytes and nothing else does."""
        block = self.blocks[i]
        self.ring.begin(block)
        assert block.module.weight.unique().tolist() == [expected("thinker", i)]
        assert [b for b in self.blocks if not b.module.weight.is_meta] == [block]
        self.ring.end(block, broken_off=breaking)
        assert block.module.weight.is_meta

    @property
    def reads(self) -> list[int]:
        return [self.shelf.reads.count(f"thinker.{i}.weight") for i in range(len(self.blocks))]


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("n_slots", [1, 2, 3])
def test_undisturbed_walks_miss_nothing_whatever_the_number_of_layers_and_slots(n: int, n_slots: int):
    layers = Layers(n, min(n, n_slots))
    for _ in range(4):
        for i in range(n):
            layers.use(i)
    assert layers.ring.misses == 0


def test_each_use_fetches_one_block_the_one_whose_turn_comes_when_all_slots_were_used():
    layers = Layers(5, 2)
    assert layers.reads == [1, 1, 0, 0, 0]
    layers.use(0)
    assert layers.reads == [1, 1, 1, 0, 0]
    for i in (1, 2, 3):
        layers.use(i)
    assert layers.reads == [2, 1, 1, 1, 1]


@settings(deadline=None)
@given(
    n=st.integers(2, 7),
    n_slots=st.integers(1, 3),
    walks=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.booleans()), max_size=8),
)
def test_walks_that_begin_and_end_anywhere_see_their_own_bytes(n: int, n_slots: int, walks: list):
    """Each walk goes from one block to another, and then ends inside of the last or after it."""
    layers = Layers(n, min(n, n_slots))
    for first, last, breaking in walks:
        for i in range(first, min(last, n)):
            layers.use(i, breaking and i == last - 1)
    assert layers.ring.misses <= len(walks)


def test_a_block_that_is_asked_for_out_of_turn_is_a_miss_and_the_walk_goes_on_from_it():
    layers = Layers(5, 2)
    for i in (0, 3, 4, 0, 1):
        layers.use(i)
    assert layers.ring.misses == 1


def test_the_slots_are_as_large_as_the_largest_block():
    layers = Layers(5, 2)
    assert layers.ring.n_bytes == 2 * max(block.n_bytes for block in layers.blocks)


def test_a_walk_broken_off_inside_a_block_fetches_nothing_more():
    layers = Layers(5, 2)
    layers.use(0, breaking=True)
    assert layers.reads == [1, 1, 0, 0, 0]
    layers.use(0)
    assert layers.ring.misses == 0


def test_a_block_that_cannot_be_read_fails_the_walk_and_the_next_one_reads_it_again():
    layers = Layers(5, 2)
    layers.shelf.damaged.add("thinker.2.weight")
    with pytest.raises(CheckpointError):
        layers.use(0)
    layers.shelf.damaged.clear()
    assert layers.ring.awaited() == (layers.blocks[2],)
    for i in (1, 2, 3, 4, 0):
        layers.use(i)


def test_a_walk_that_starts_again_at_a_block_that_cannot_be_read_fails_and_the_ring_recovers():
    layers = Layers(5, 2)
    layers.shelf.damaged.add("thinker.3.weight")
    with pytest.raises(CheckpointError):
        layers.use(3)
    with suppress(CheckpointError):
        layers.use(2)
    layers.shelf.damaged.clear()
    for i in (3, 4, 0, 1, 2, 3):
        layers.use(i)


def test_two_blocks_of_a_ring_are_never_in_use_together():
    layers = Layers(5, 2)
    layers.ring.begin(layers.blocks[0])
    with pytest.raises(AssertionError, match=r"thinker\.1 is asked for while thinker\.0"):
        layers.ring.begin(layers.blocks[1])


def test_a_ring_that_is_closed_in_the_middle_of_a_use_leaves_no_module_with_memory():
    """As after an interrupt that came before the use could end."""
    layers = Layers(5, 2)
    layers.ring.begin(layers.blocks[0])
    layers.ring.close()
    assert layers.ring.n_bytes == 0
    assert all(block.module.weight.is_meta for block in layers.blocks)


def bytes_of(blocks: tuple[WeightBlock, ...]) -> list[int]:
    return [block.n_bytes for block in blocks]


def test_a_new_ring_says_what_it_will_load_first():
    shelf = Shelf()
    transfer = Transfer(shelf, CPU)
    blocks = stack(shelf, transfer, "thinker", WIDTHS)
    ring = Ring(blocks, 2, HostCopies(transfer), transfer.streams, CPU)
    assert bytes_of(ring.awaited()) == bytes_of(blocks[:2])
    ring.load_next()
    assert bytes_of(ring.awaited()) == bytes_of(blocks[1:2])
