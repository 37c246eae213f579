"""Weights that come ahead of their phase: there when it begins, in nobody's way before, and gone if it never does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from sim.device import DEVICE, Card, simulated_card
from toy_blocks import Shelf, expected, phase, stack, walk

from lowvram.errors import CheckpointError
from lowvram.offload.placement import HostTier, Phase, Placement, Plan
from lowvram.offload.prefetch import Prefetch
from lowvram.offload.residency import Residency
from lowvram.offload.streams import InOrder, in_a_thread
from lowvram.offload.transfer import Transfer

WIDTHS = {"visual": [50, 80, 20], "thinker": [100, 300, 200, 64], "talker": [40, 40]}
PATIENCE_S = 30.0
"""For another thread to come to a point; only a failure takes so long."""

SEE = replace(phase(visual=Placement.PHASE), name="see", prefetch_bytes=10**6)
THINK = replace(phase(thinker=Placement.PHASE), name="think")
TALK = replace(phase(talker=Placement.PHASE), name="talk")


class Threaded(InOrder):
    """Fetches beside, as a card with streams of its own does."""

    def beside(self, work):
        return in_a_thread(work)


class House:
    """Three components, and the executor that moves them."""

    def __init__(self, streams: InOrder) -> None:
        self.shelf = Shelf()
        self.transfer = Transfer(self.shelf, DEVICE, streams, staging_bytes=4096)
        components = {name: stack(self.shelf, self.transfer, name, widths) for name, widths in WIDTHS.items()}
        self.sizes = {name: [block.n_bytes for block in blocks] for name, blocks in components.items()}
        self.bytes = {name: sum(sizes) for name, sizes in self.sizes.items()}
        self.residency = Residency(components, self.transfer)

    def enter(self, to: Phase, following: Phase | None = None) -> list[tuple[int, int]]:
        return list(self.residency.enter(to, following))

    def check(self, component: str) -> None:
        uses = self.residency.component(component)
        assert walk(uses) == [expected(component, i) for i in range(len(uses))]

    def reads_of(self, component: str) -> list[str]:
        return [name for name in self.shelf.reads if name.startswith(component)]


@pytest.fixture(autouse=True)
def card() -> Iterator[Card]:
    with simulated_card(1 << 20) as card:
        yield card


@pytest.fixture(params=[InOrder(apart=True), Threaded(apart=True)], ids=["in order", "in a thread"])
def house(request: pytest.FixtureRequest) -> House:
    return House(request.param)


def test_what_came_ahead_is_neither_read_nor_reported_again(house: House):
    house.enter(SEE, THINK)
    house.check("visual")
    house.residency._prefetch._join()
    assert house.enter(THINK) == []
    house.check("thinker")
    assert house.reads_of("thinker") == [f"thinker.{i}.weight" for i in range(4)]
    assert house.residency.prefetched_bytes == house.bytes["thinker"]


def test_no_more_comes_than_the_phase_lets(house: House):
    first_bytes = sum(house.sizes["thinker"][:2])
    house.enter(replace(SEE, prefetch_bytes=first_bytes), THINK)
    assert house.residency.live_bytes == house.bytes["visual"] + first_bytes
    house.enter(THINK)
    house.check("thinker")
    assert house.residency.prefetched_bytes <= first_bytes


def test_what_comes_counts_as_live_from_the_beginning(house: House, card: Card):
    house.enter(SEE, THINK)
    assert house.residency.live_bytes == card.live_bytes == house.bytes["visual"] + house.bytes["thinker"]


@pytest.mark.parametrize("other", [TALK, SEE], ids=["another phase", "the same phase"])
def test_whatever_else_is_entered_finds_the_room_free(house: House, card: Card, other: Phase):
    house.enter(SEE, THINK)
    house.enter(other)
    assert card.live_bytes == house.residency.live_bytes == house.bytes[next(iter(other.placements))]
    house.check(next(iter(other.placements)))


def test_a_turn_that_ends_or_lets_go_keeps_nothing_of_it(house: House, card: Card):
    for end in (house.residency.leave, house.residency.release):
        house.enter(SEE, THINK)
        end()
        assert (card.live_bytes, house.residency.live_bytes) == (0, 0)


def test_a_file_that_cannot_be_read_is_the_error_of_the_phase_that_needs_it(house: House, card: Card):
    house.shelf.damaged.add("thinker.2.weight")
    house.enter(SEE, THINK)
    house.check("visual")
    with pytest.raises(CheckpointError):
        house.enter(THINK)
    assert card.live_bytes == house.residency.live_bytes
    house.shelf.damaged.clear()
    house.enter(THINK)
    house.check("thinker")


def test_a_card_without_room_for_it_says_so_and_keeps_the_phase(house: House, card: Card):
    house.enter(SEE)
    card.capacity_bytes = house.bytes["visual"] + 2000
    with pytest.raises(torch.OutOfMemoryError):
        house.enter(SEE, THINK)
    assert card.live_bytes == house.residency.live_bytes == house.bytes["visual"]
    house.check("visual")


def test_what_began_in_inference_mode_comes_outside_of_it(house: House):
    with torch.inference_mode():
        house.enter(SEE, THINK)
    house.enter(THINK)
    house.check("thinker")


class Gate:
    """Stops whoever reads a tensor, until it is opened."""

    def __init__(self, shelf: Shelf, tensor: str) -> None:
        self._shelf, self._tensor = shelf, tensor
        self.reached, self.opened = threading.Event(), threading.Event()
        shelf.on_write = self._pass

    def _pass(self, _: memoryview) -> None:
        if self._shelf.reads[-1] == self._tensor:
            self.reached.set()
            assert self.opened.wait(PATIENCE_S)

    def open_once_taken(self, prefetch: Prefetch) -> None:
        """Open the gate when somebody waits for what is coming; after a while also if nobody does."""

        def wait() -> None:
            latest_s = time.monotonic() + 0.5
            while not prefetch._taken and time.monotonic() < latest_s:
                time.sleep(0.001)
            self.opened.set()

        threading.Thread(target=wait, daemon=True).start()


def test_computing_goes_on_while_a_file_is_slow():
    house = House(Threaded(apart=True))
    gate = Gate(house.shelf, "thinker.1.weight")
    house.enter(SEE, THINK)
    assert gate.reached.wait(PATIENCE_S)
    house.check("visual")
    gate.opened.set()
    house.enter(THINK)
    house.check("thinker")


def test_a_phase_waits_for_the_block_that_is_coming_and_for_no_further_one():
    house = House(Threaded(apart=True))
    gate = Gate(house.shelf, "thinker.1.weight")
    house.enter(SEE, THINK)
    assert gate.reached.wait(PATIENCE_S)
    gate.open_once_taken(house.residency._prefetch)
    assert len(house.enter(THINK)) == 2
    house.check("thinker")
    assert house.residency.prefetched_bytes == sum(house.sizes["thinker"][:2])


def test_another_plan_for_the_host_waits_for_the_block_that_is_coming():
    """Otherwise a copy that the plan does not want would be kept after all."""
    house = House(Threaded(apart=True))
    tiers = {f"thinker.{i}": HostTier.PAGEABLE for i in range(4)}
    house.residency.prepare(Plan("cuda", None, (), 1, 1, 0, 1, 1, 1, host_tiers=tiers))
    gate = Gate(house.shelf, "thinker.1.weight")
    house.enter(SEE, THINK)
    assert gate.reached.wait(PATIENCE_S)
    prefetch = house.residency._prefetch
    gate.open_once_taken(prefetch)
    house.residency.prepare(Plan("cuda", None, (), 1, 1, 0, 1, 1, 1))
    prefetch._join()
    assert house.residency.host_bytes == 0
    house.enter(THINK)
    house.check("thinker")
