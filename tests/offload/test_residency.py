from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.device import DEVICE, Card, simulated_card
from test_turn import SPEECH, STAGES, plan_of, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from toy_blocks import CPU, Shelf, expected, phase, stack, walk

from lowvram.demo import TINY, build_demo
from lowvram.errors import CheckpointError
from lowvram.events import Finished
from lowvram.offload.placement import STREAM_SLOTS, HostTier, Phase, Placement, Plan
from lowvram.offload.residency import Residency
from lowvram.offload.transfer import Transfer
from lowvram.runtime import OmniRuntime

WIDTHS = {"thinker": [100, 300, 200, 64, 300, 128, 8], "talker": [50, 80, 50, 80, 20], "lm_head": [500]}
PLENTY_BYTES = 1 << 20


class CountingTransfer(Transfer):
    """Counts how often the device was given its freed memory back."""

    trims = 0

    def trim(self) -> None:
        self.trims += 1


class House:
    """Three components, where they are, and what was read for them."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.shelf = Shelf()
        self.transfer = CountingTransfer(self.shelf, device, staging_bytes=1024)
        self.components = {name: stack(self.shelf, self.transfer, name, widths) for name, widths in WIDTHS.items()}
        self.residency = Residency(self.components, self.transfer)

    def enter(self, to: Phase, following: Phase | None = None) -> list[tuple[int, int]]:
        return list(self.residency.enter(to, following))

    def check(self, *components: str) -> None:
        """Walk components and see every block's own bytes."""
        for name in components:
            uses = self.residency.component(name)
            assert walk(uses) == [expected(name, i) for i in range(len(uses))]

    def bytes_of(self, component: str, *blocks: int) -> int:
        """Of some blocks of a component, or of all."""
        of = self.components[component]
        return sum(of[i].n_bytes for i in blocks or range(len(of)))

    @property
    def bound(self) -> set[str]:
        """Names of the blocks whose modules hold memory."""
        return {b.name for blocks in self.components.values() for b in blocks if not b.module.weight.is_meta}


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture
def card() -> Iterator[Card]:
    with simulated_card(PLENTY_BYTES) as card:
        yield card


def planned_bytes(house: House, to: Phase) -> int:
    """What a plan prices: slots, kept layers and the rest of what is streamed, and all of what is not."""
    total = 0
    for component, placement in to.placements.items():
        sizes = [block.n_bytes for block in house.components[component]]
        if placement is Placement.STREAMED:
            *layers, rest = sizes
            kept = {i * len(layers) // to.kept_layers[component] for i in range(to.kept_layers.get(component, 0))}
            streamed = [size for i, size in enumerate(layers) if i not in kept]
            slots = min(STREAM_SLOTS, len(streamed)) * max(streamed, default=0)
            total += rest + sum(layers) - sum(streamed) + slots
        else:
            total += sum(sizes)
    return total


def test_a_phase_loads_what_it_places_and_reports_the_bytes(house: House):
    sizes = [block.n_bytes for block in house.components["talker"]]
    progress = house.enter(phase(talker=Placement.PHASE))
    assert progress == [(sum(sizes[: i + 1]), sum(sizes)) for i in range(len(sizes))]
    assert house.residency.live_bytes == sum(sizes)


def test_the_next_phase_takes_the_room_of_the_last(house: House):
    house.enter(phase(thinker=Placement.PHASE))
    house.enter(phase(talker=Placement.PHASE))
    assert house.residency.live_bytes == house.bytes_of("talker")
    assert {name.split(".")[0] for name in house.bound} == {"talker"}


def test_a_resident_component_stays_across_phases_and_turns(house: House):
    house.enter(phase(talker=Placement.RESIDENT))
    house.enter(phase(talker=Placement.RESIDENT, lm_head=Placement.PHASE))
    house.residency.leave()
    assert house.residency.live_bytes == house.bytes_of("talker")
    assert house.enter(phase(talker=Placement.RESIDENT)) == []


def test_residents_of_an_earlier_plan_leave_when_a_later_one_does_not_name_them(house: House):
    house.enter(phase(thinker=Placement.RESIDENT))
    house.residency.leave()
    house.enter(phase(talker=Placement.RESIDENT))
    assert house.residency.live_bytes == house.bytes_of("talker")


def test_a_streamed_component_takes_two_of_its_largest_layer_and_its_rest(house: House):
    house.enter(phase(thinker=Placement.STREAMED))
    assert house.residency.live_bytes == 2 * house.bytes_of("thinker", 1) + house.bytes_of("thinker", 6)
    house.check("thinker")
    assert house.residency.live_bytes == planned_bytes(house, phase(thinker=Placement.STREAMED))


def test_the_first_layers_of_a_streamed_component_are_there_when_its_phase_begins(house: House):
    total = house.bytes_of("thinker", 0, 1, 6)
    assert house.enter(phase(thinker=Placement.STREAMED))[-1] == (total, total)
    assert sorted(house.shelf.reads) == ["thinker.0.weight", "thinker.1.weight", "thinker.6.weight"]


def test_kept_layers_are_read_once_and_the_others_at_every_walk(house: House):
    house.enter(phase({"thinker": 2}, thinker=Placement.STREAMED))
    for _ in range(3):
        house.check("thinker")
    reads = [house.shelf.reads.count(f"thinker.{i}.weight") for i in range(7)]
    assert reads == [1, 4, 4, 1, 3, 3, 1]


def test_no_more_layers_than_slots_stay_for_the_phase(house: House):
    house.enter(phase({"thinker": 4}, thinker=Placement.STREAMED))
    for _ in range(3):
        house.check("thinker")
    assert len(house.shelf.reads) == 7
    assert house.residency.live_bytes <= planned_bytes(house, phase({"thinker": 4}, thinker=Placement.STREAMED))


def test_a_component_of_one_block_is_its_own_rest(house: House):
    house.enter(phase(lm_head=Placement.STREAMED))
    house.check("lm_head", "lm_head")
    assert house.shelf.reads == ["lm_head.0.weight"]


def test_an_undisturbed_turn_never_waits_for_a_block_out_of_turn(house: House):
    alone = phase(thinker=Placement.STREAMED)
    together = phase({"talker": 1}, thinker=Placement.STREAMED, talker=Placement.STREAMED)
    for to in (alone, together):
        house.enter(to)
        for _ in range(5):
            house.check(*to.placements)
    house.residency.leave()
    assert house.residency.misses == 0


def test_a_walk_broken_off_is_counted_also_after_its_phase(house: House):
    house.enter(phase(thinker=Placement.STREAMED))
    walk(house.residency.component("thinker")[:3])
    house.check("thinker")
    house.enter(phase(talker=Placement.PHASE))
    assert house.residency.misses == 1


def test_entering_the_same_phase_again_moves_nothing(house: House):
    to = phase({"thinker": 2}, thinker=Placement.STREAMED, talker=Placement.PHASE)
    house.enter(to)
    house.check("thinker")
    reads = len(house.shelf.reads)
    assert house.enter(replace(to)) == []
    house.check("talker")
    assert len(house.shelf.reads) == reads


def test_a_budget_that_changes_between_two_walks_moves_to_the_new_placements(house: House):
    for kept in (4, 0, 1, 3, 6):
        to = phase({"thinker": kept}, thinker=Placement.STREAMED, lm_head=Placement.PHASE)
        house.enter(to)
        house.check("thinker", "lm_head", "thinker")
        assert house.residency.live_bytes <= planned_bytes(house, to)
    assert house.residency.misses == 0
    house.enter(phase(thinker=Placement.PHASE))
    house.check("thinker")


def test_what_leaves_is_gone_before_what_comes(card: Card):
    house = House(DEVICE)
    phases = [
        phase(thinker=Placement.PHASE),
        phase({"thinker": 2}, thinker=Placement.STREAMED, lm_head=Placement.PHASE),
        phase({"thinker": 1}, thinker=Placement.STREAMED, talker=Placement.STREAMED),
        phase(talker=Placement.PHASE, lm_head=Placement.RESIDENT),
    ]
    for before, after in pairwise(phases):
        house.enter(before)
        card.peak_bytes = 0
        house.enter(after)
        assert card.peak_bytes <= planned_bytes(house, after)


def test_leaving_a_turn_drops_what_was_there_for_a_phase(house: House):
    house.enter(phase(thinker=Placement.STREAMED, talker=Placement.PHASE))
    house.residency.leave()
    assert (house.residency.live_bytes, house.bound) == (0, set())


def test_room_is_given_back_before_a_phase_also_where_no_block_leaves_and_not_inside_one(house: House):
    house.enter(phase(thinker=Placement.STREAMED))
    house.check("thinker")
    assert house.transfer.trims == 1
    house.enter(phase(thinker=Placement.STREAMED, talker=Placement.PHASE))
    assert house.transfer.trims == 2


class _Reads(TorchDispatchMode):
    """Counts the operators that are handed memory of one of the given runs."""

    def __init__(self, runs: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.count = 0
        self._storages = {run.untyped_storage().data_ptr() for run in runs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
        self.count += any(tensor.untyped_storage().data_ptr() in self._storages for tensor in tensors)
        return func(*args, **(kwargs or {}))


def test_leaving_copies_no_weight_back_to_the_host(house: House):
    """No operator so much as sees a block's memory while it leaves: there is nothing it could have been copied by."""
    house.enter(phase(thinker=Placement.PHASE))
    with _Reads(house.residency._runs.values()) as reads:
        house.residency.leave()
    assert (house.residency.live_bytes, reads.count) == (0, 0)


def plan(**tiers: HostTier) -> Plan:
    """A plan that matters for where the host keeps blocks, by component."""
    named = {f"{component}.{i}": tier for component, tier in tiers.items() for i in range(len(WIDTHS[component]))}
    return Plan("cuda", None, (), 1, 1, 0, 1, 1, 1, host_tiers=named)


def test_what_the_host_keeps_is_read_once_however_often_it_is_sent(card: Card):
    house = House(DEVICE)
    house.residency.prepare(plan(thinker=HostTier.PAGEABLE))
    for to in (phase(thinker=Placement.STREAMED), phase(talker=Placement.PHASE), phase(thinker=Placement.PHASE)):
        house.enter(to)
        house.check(*to.placements, *to.placements)
    assert house.residency.host_bytes == house.bytes_of("thinker")
    assert len([name for name in house.shelf.reads if name.startswith("thinker")]) == 7


def test_another_plan_drops_what_the_host_need_not_keep_any_more(card: Card):
    house = House(DEVICE)
    house.residency.prepare(plan(thinker=HostTier.PAGEABLE, talker=HostTier.PAGEABLE))
    house.enter(phase(thinker=Placement.STREAMED, talker=Placement.PHASE))
    house.residency.prepare(plan(talker=HostTier.PINNED))
    assert house.residency.host_bytes == house.bytes_of("talker")
    house.check("thinker", "talker")


def test_release_gives_all_back_and_the_plan_still_holds(card: Card):
    house = House(DEVICE)
    house.residency.prepare(plan(thinker=HostTier.PAGEABLE))
    to = phase(thinker=Placement.RESIDENT, talker=Placement.STREAMED)
    house.enter(to)
    house.residency.release()
    assert (house.residency.live_bytes, house.residency.host_bytes, card.live_bytes) == (0, 0, 0)
    assert house.bound == set()
    house.enter(to)
    house.check("thinker", "talker")
    assert house.residency.host_bytes == house.bytes_of("thinker")


def test_layers_pass_through_slots_that_were_made_in_inference_mode(card: Card):
    """A step in that mode may be the one that heeds another budget; the next need not be in it."""
    house = House(DEVICE)
    house.residency.prepare(plan(thinker=HostTier.PAGEABLE))
    with torch.inference_mode():
        house.enter(phase(thinker=Placement.STREAMED))
    house.check("thinker", "thinker")


def test_a_block_whose_use_fails_leaves_its_module_without_memory(house: House):
    house.enter(phase(thinker=Placement.STREAMED))
    with pytest.raises(ZeroDivisionError), house.residency.component("thinker")[0]:
        raise ZeroDivisionError
    assert house.bound == {"thinker.6"}
    house.check("thinker")


def test_an_absent_component_has_no_blocks(house: House):
    assert house.residency.component("dit") == ()


def test_a_block_that_the_phase_does_not_place_cannot_be_used(house: House):
    house.enter(phase(talker=Placement.PHASE))
    with (
        pytest.raises(AssertionError, match=r"thinker\.0 has no place in the phase"),
        house.residency.component("thinker")[0],
    ):
        pass


def test_entering_may_be_broken_off_at_any_block_and_the_next_time_goes_on(house: House):
    to = phase(thinker=Placement.STREAMED, talker=Placement.PHASE)
    blocks = len(house.enter(to))
    for there in range(blocks):
        house.residency.release()
        loading = house.residency.enter(to)
        for _ in range(there):
            next(loading)
        loading.close()
        assert len(house.enter(to)) == blocks - there
        house.check("thinker", "talker", "thinker")
    assert house.residency.misses == 0


TO = phase({"thinker": 1}, thinker=Placement.STREAMED, talker=Placement.STREAMED, lm_head=Placement.RESIDENT)
FROM = phase(thinker=Placement.PHASE, talker=Placement.RESIDENT)


def test_a_device_that_runs_out_at_any_allocation_leaves_nothing_untold_and_the_next_try_works(card: Card):
    for nth in count(1):
        house = House(DEVICE)
        house.enter(FROM)
        card.fail(nth)
        try:
            house.enter(TO)
        except torch.OutOfMemoryError:
            pass
        else:
            break
        assert card.live_bytes == house.residency.live_bytes
        house.enter(TO)
        house.check("thinker", "talker", "lm_head")
        assert card.live_bytes == house.residency.live_bytes
        house.residency.release()
        assert card.live_bytes == 0
    assert nth == 1 + 1 + 2 * STREAM_SLOTS  # the head and four slots; what is kept of the others is there already


@pytest.mark.parametrize("tier", [HostTier.FILE, HostTier.PAGEABLE])
def test_a_file_that_cannot_be_read_at_any_block_leaves_nothing_untold_and_the_next_try_works(
    card: Card, tier: HostTier
):
    for name in [f"{component}.{i}.weight" for component, widths in WIDTHS.items() for i in range(len(widths))]:
        house = House(DEVICE)
        house.residency.prepare(plan(thinker=tier, talker=tier))
        house.shelf.damaged.add(name)
        with pytest.raises(CheckpointError):
            house.enter(TO)
            house.check("thinker", "talker", "lm_head")
        assert card.live_bytes == house.residency.live_bytes
        house.shelf.damaged.clear()
        house.enter(TO)
        house.check("thinker", "talker", "lm_head", "thinker")
        house.residency.release()
        assert (card.live_bytes, house.bound) == (0, set())


Walks = Sequence[tuple[str, int, bool]]


@settings(max_examples=40, deadline=None)
@given(
    phases=st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from(list(WIDTHS)), st.sampled_from(Placement), min_size=1),
            st.integers(0, 6),
            st.integers(0, 4),
            st.integers(0, 4000),
            st.lists(st.tuples(st.integers(1, 7), st.booleans()), max_size=4),
        ),
        max_size=4,
    )
)
def test_every_use_sees_its_own_bytes_and_no_phase_holds_more_than_planned(phases: list):
    """Phases one after another, each with walks that end anywhere, inside of a block or after it, while some of the
    next one comes."""
    house = House()
    entered = [
        replace(phase({"thinker": thinker, "talker": talker}, **placements), prefetch_bytes=ahead_bytes)
        for placements, thinker, talker, ahead_bytes, _ in phases
    ]
    for (placements, *_, walks), to, following in zip(phases, entered, [*entered[1:], None], strict=False):
        if any(placement is Placement.STREAMED for placement in placements.values()):
            to, following = replace(to, prefetch_bytes=0), None
        house.enter(to, following)
        for length, failing in walks:
            for component in placements:
                uses = house.residency.component(component)[:length]
                seen = []
                with suppress(ZeroDivisionError):
                    for use in uses:
                        with use as linear:
                            seen.append(linear.weight.unique().tolist())
                            if failing and len(seen) == len(uses):
                                raise ZeroDivisionError
                assert seen == [[expected(component, i)] for i in range(len(uses))]
                assert house.residency.live_bytes <= planned_bytes(house, to) + to.prefetch_bytes
    house.residency.release()
    assert (house.residency.live_bytes, house.bound) == (0, set())


@pytest.mark.parametrize("cuts", [[STAGES], [[stage] for stage in STAGES]], ids=["one phase", "a phase for each stage"])
def test_a_whole_streamed_turn_fetches_next_to_no_block_out_of_turn(tmp_path: Path, cuts: Sequence[Sequence[str]]):
    """The first walk through the DiT at each evaluation ends at the layer that looks ahead."""
    build_demo(tmp_path, size=replace(TINY, layers=5, talker_layers=3, audio_layers=4))
    with OmniRuntime.open(tmp_path, device="cpu", dtype="float32") as omni:
        streamed = [event for event in run(omni, plan_of(cuts, Placement.STREAMED)) if isinstance(event, Finished)]
        misses = omni._machine.residency.misses
        resident = [event for event in run(omni, plan_of(cuts)) if isinstance(event, Finished)]
    assert misses == SPEECH.steps - 1
    assert (streamed[0].text_ids, streamed[0].codec_ids) == (resident[0].text_ids, resident[0].codec_ids)
