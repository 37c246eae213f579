"""What of the next phase may come while this one computes: room decides, and an order that both sides know."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.offload.ahead import blocks_ahead, divide, with_prefetch
from lowvram.offload.footprint import BlockSize
from lowvram.offload.placement import Phase, Placement

SIZES = {"visual": [5, 5, 7, 1], "thinker": [10, 10, 10, 10, 4], "lm_head": [30], "talker": [8, 8, 8, 2]}
COMPONENTS = {
    name: tuple(BlockSize(f"{name}.{i}", n_bytes) for i, n_bytes in enumerate(sizes)) for name, sizes in SIZES.items()
}


@dataclass(frozen=True)
class Block:
    """As much of a block as is asked for."""

    name: str
    n_bytes: int


def phase(peak_bytes: int = 0, kept: int = 0, streamed: int = 0, **placements: Placement) -> Phase:
    """A phase that holds so much; `kept` layers of the thinker stay where it is streamed."""
    return Phase(
        "+".join(placements),
        (),
        placements,
        weights_bytes=peak_bytes,
        kv_bytes=0,
        activation_bytes=0,
        traffic_bytes=0,
        kept_layers={"thinker": kept} if kept else {},
        streamed_layers={"thinker": streamed} if streamed else {},
    )


SEE = phase(20, visual=Placement.PHASE)
THINK = phase(84, thinker=Placement.PHASE, lm_head=Placement.PHASE)


def names(blocks: tuple[BlockSize, ...]) -> list[str]:
    return [block.name for block in blocks]


@pytest.mark.parametrize(
    ("highest_bytes", "coming"), [(29, []), (30, [0]), (49, [0, 1]), (63, [0, 1, 2, 3]), (64, [0, 1, 2, 3, 4])]
)
def test_as_many_whole_blocks_come_as_the_phase_has_room_for_beneath_the_highest_peak(
    highest_bytes: int, coming: list[int]
):
    see, think = with_prefetch([SEE, replace(THINK, weights_bytes=highest_bytes)], COMPONENTS)
    assert see.prefetch_bytes == sum(SIZES["thinker"][i] for i in coming)
    assert see.peak_bytes == SEE.peak_bytes + see.prefetch_bytes
    assert names(blocks_ahead(see, think, COMPONENTS)) == [f"thinker.{i}" for i in coming]


def test_the_last_phase_lets_nothing_come():
    assert with_prefetch([SEE, THINK], COMPONENTS)[-1] == THINK
    assert with_prefetch([THINK, SEE], COMPONENTS) == (THINK, SEE)
    assert with_prefetch([SEE], COMPONENTS) == (SEE,)


def test_a_phase_that_streams_lets_nothing_come():
    streaming = phase(20, streamed=3, thinker=Placement.STREAMED)
    high = replace(SEE, weights_bytes=10**9)
    assert with_prefetch([streaming, high], COMPONENTS) == (streaming, high)


def test_what_is_there_already_does_not_come_again():
    resident = {"lm_head": Placement.RESIDENT, "thinker": Placement.RESIDENT}
    see = phase(64, visual=Placement.PHASE, **resident)
    talk = phase(99, talker=Placement.PHASE, **resident)
    assert with_prefetch([see, talk], COMPONENTS)[0].prefetch_bytes == sum(SIZES["talker"])


def test_of_a_streamed_component_only_what_is_kept_comes():
    think = phase(50, kept=1, streamed=3, thinker=Placement.STREAMED)
    see, _ = with_prefetch([SEE, think], COMPONENTS)
    assert names(blocks_ahead(see, think, COMPONENTS)) == ["thinker.0", "thinker.4"]


def test_blocks_smaller_than_planned_stay_inside_what_was_planned():
    """Plans price the scales of 4-bit weights in the compute dtype; some kernels keep them in less."""
    see, think = with_prefetch([SEE, replace(THINK, weights_bytes=63)], COMPONENTS)
    smaller = {name: [Block(b.name, b.n_bytes - 1) for b in blocks] for name, blocks in COMPONENTS.items()}
    assert sum(block.n_bytes for block in blocks_ahead(see, think, smaller)) <= see.prefetch_bytes


placements = st.dictionaries(st.sampled_from(list(SIZES)), st.sampled_from(Placement), min_size=1)


@given(st.lists(st.tuples(placements, st.integers(0, 4), st.integers(0, 100)), min_size=1, max_size=5))
def test_the_highest_peak_stays_what_it_was_and_so_does_all_else_of_a_phase(drawn: list):
    phases = [phase(peak_bytes, kept, **placed) for placed, kept, peak_bytes in drawn]
    filled = with_prefetch(phases, COMPONENTS)
    assert [replace(p, prefetch_bytes=0) for p in filled] == phases
    assert max(p.peak_bytes for p in filled) == max(p.peak_bytes for p in phases)


@given(placements, st.integers(0, 4))
def test_every_block_of_a_phase_stays_or_passes_and_only_layers_pass(placed: dict, kept: int):
    staying, passing = divide(phase(0, min(kept, 4), **placed), COMPONENTS)
    named = [block.name for block in staying] + [block.name for blocks in passing for block in blocks]
    assert sorted(named) == sorted(block.name for name in placed for block in COMPONENTS[name])
    rests = {COMPONENTS[name][-1] for name in placed}
    assert rests <= set(staying)
