from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lowvram.offload.plan import Phase, Placement
from lowvram.offload.residency import Residency

CPU = torch.device("cpu")


class CountingBlock:
    """A block of one float parameter that remembers how often it was filled."""

    def __init__(self, name: str, value: float) -> None:
        self.name, self.n_bytes, self.fills = name, 4, 0
        self.module = nn.Module()
        self.module.weight = nn.Parameter(torch.empty(1, device="meta"))
        self._value = value

    def fill(self, run: torch.Tensor) -> None:
        self.fills += 1
        run.view(torch.float32).fill_(self._value)

    def bind(self, run: torch.Tensor) -> None:
        self.module.weight = nn.Parameter(run.view(torch.float32), requires_grad=False)

    def unbind(self) -> None:
        self.module.weight = nn.Parameter(torch.empty(1, device="meta"), requires_grad=False)


@pytest.fixture
def blocks() -> dict[str, tuple[CountingBlock, ...]]:
    return {
        "thinker": (CountingBlock("thinker.0", 1.0), CountingBlock("thinker.1", 2.0)),
        "talker": (CountingBlock("talker.0", 3.0),),
    }


def phase(**placements: Placement) -> Phase:
    return Phase("phase", (), placements, weights_bytes=0, kv_bytes=0, activation_bytes=0, traffic_bytes=0)


def enter(residency: Residency, **placements: Placement) -> list[tuple[int, int]]:
    return list(residency.enter(phase(**placements)))


def test_a_phase_loads_what_it_places_and_reports_the_bytes(blocks: Mapping):
    residency = Residency(blocks, CPU)
    assert enter(residency, thinker=Placement.PHASE) == [(4, 8), (8, 8)]
    assert residency.live_bytes == 8


def test_the_next_phase_takes_the_room_of_the_last(blocks: Mapping):
    residency = Residency(blocks, CPU)
    enter(residency, thinker=Placement.PHASE)
    enter(residency, talker=Placement.PHASE)
    assert residency.live_bytes == 4
    assert blocks["thinker"][0].module.weight.is_meta


def test_a_resident_component_stays_across_phases_and_turns(blocks: Mapping):
    residency = Residency(blocks, CPU)
    enter(residency, thinker=Placement.RESIDENT)
    enter(residency, thinker=Placement.RESIDENT, talker=Placement.PHASE)
    residency.leave()
    enter(residency, thinker=Placement.RESIDENT)
    assert [block.fills for block in blocks["thinker"]] == [1, 1]


def test_residents_of_an_earlier_plan_leave_when_a_later_one_does_not_name_them(blocks: Mapping):
    residency = Residency(blocks, CPU)
    enter(residency, thinker=Placement.RESIDENT)
    residency.leave()
    enter(residency, talker=Placement.RESIDENT)
    assert residency.live_bytes == 4


def test_a_streamed_component_is_there_only_while_used(blocks: Mapping):
    residency = Residency(blocks, CPU)
    enter(residency, thinker=Placement.STREAMED)
    live = []
    for block in residency.component("thinker"):
        with block as module:
            live.append((float(module.weight), residency.live_bytes))
    assert live == [(1.0, 4), (2.0, 4)]
    assert residency.live_bytes == 0


def test_leaving_a_turn_drops_what_was_there_for_a_phase(blocks: Mapping):
    residency = Residency(blocks, CPU)
    enter(residency, thinker=Placement.PHASE)
    residency.leave()
    assert residency.live_bytes == 0


def test_room_is_given_back_when_blocks_leave_for_good_and_only_then(blocks: Mapping):
    trims: list[str] = []
    residency = Residency(blocks, CPU, trim=lambda: trims.append("trim"))
    enter(residency, thinker=Placement.STREAMED)
    for block in residency.component("thinker"):
        with block:
            pass
    assert trims == []
    enter(residency, thinker=Placement.PHASE)
    enter(residency, talker=Placement.PHASE)
    assert trims == ["trim"]


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


def test_leaving_copies_no_weight_back_to_the_host(blocks: Mapping):
    """No operator so much as sees a block's memory while it leaves: there is nothing it could have been copied by."""
    residency = Residency(blocks, CPU)
    enter(residency, thinker=Placement.PHASE)
    with _Reads(residency._runs.values()) as reads:
        residency.leave()
    assert (residency.live_bytes, reads.count) == (0, 0)


def test_release_drops_residents_too(blocks: Mapping):
    residency = Residency(blocks, CPU)
    enter(residency, thinker=Placement.RESIDENT)
    residency.release()
    assert residency.live_bytes == 0
    assert blocks["thinker"][1].module.weight.is_meta


def test_a_block_leaves_the_device_when_its_use_fails(blocks: Mapping):
    residency = Residency(blocks, CPU)
    enter(residency, talker=Placement.STREAMED)
    with pytest.raises(ZeroDivisionError), residency.component("talker")[0]:
        raise ZeroDivisionError
    assert residency.live_bytes == 0


def test_an_absent_component_has_no_blocks(blocks: Mapping):
    assert Residency(blocks, CPU).component("dit") == ()
