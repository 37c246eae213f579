"""The host's side of a plan: what it holds, and which weights wait there for the bus."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from turns import CHAT, MINUTE, QUARTER

from lowvram.errors import InfeasibleBudgetError
from lowvram.offload.budget import GIB, MIB, Budget
from lowvram.offload.footprint import Footprint
from lowvram.offload.plan import HostTier, Placement, Plan, Turn, evenly_spaced, plan_memory
from lowvram.options import Limits


def planned(
    footprint: Footprint, gib: float | None, ram_gib: float | None, turn: Turn = QUARTER, device: str = "cuda"
) -> Plan:
    sizes = (None if size is None else int(size * GIB) for size in (gib, ram_gib))
    return plan_memory(footprint, Budget(*sizes), Limits(), turn, device=device)


def bytes_in(plan: Plan, footprint: Footprint, tier: HostTier) -> int:
    sizes = {block.name: block.n_bytes for blocks in footprint.components.values() for block in blocks}
    return sum(sizes[name] for name, chosen in plan.host_tiers.items() if chosen is tier)


def test_without_a_ram_budget_weights_wait_in_their_files(seven_b: Footprint):
    assert planned(seven_b, 5, None).host_tiers == {}


def test_the_host_holds_the_process_and_the_prompts_rows_twice(seven_b: Footprint):
    rows_bytes = MINUTE.prompt_tokens * 3584 * 2
    assert planned(seven_b, 8, None, MINUTE).host_bytes == 1536 * MIB + 128 * MIB + 2 * rows_bytes
    silent = replace(MINUTE, codes=0)
    assert planned(seven_b, 8, None, silent, device="cpu").host_bytes == 700 * MIB + 128 * MIB + rows_bytes


def test_layers_that_are_streamed_are_pinned_before_anything_else(seven_b: Footprint):
    plan = planned(seven_b, 5, 4)
    think = next(phase for phase in plan.phases if "thinker" in phase.stages)
    stay = evenly_spaced(28, think.kept_layers["thinker"])
    streamed = {f"thinker.{layer}" for layer in range(28) if layer not in stay}
    assert streamed <= {name for name, tier in plan.host_tiers.items() if tier is HostTier.PINNED}


def test_layers_walked_more_often_come_first(seven_b: Footprint):
    """With room for a few: the talker's, which cross the bus at every code, not the thinker's."""
    plan = planned(seven_b, 3, 2.4)
    places = {c: p for phase in plan.phases for c, p in phase.placements.items()}
    assert places["thinker"] is places["talker"] is Placement.STREAMED
    large = {name for name in plan.host_tiers if not name.endswith(".rest")}
    assert {name.partition(".")[0] for name in large} == {"talker"}


def test_a_streamed_layer_comes_before_a_larger_block_of_a_phase(seven_b: Footprint):
    """Its copies have computing to hide behind; both cross the bus once."""
    plan = planned(seven_b, 10, planned(seven_b, 10, None).host_bytes / GIB + 0.25)
    streamed = {c for phase in plan.phases for c, p in phase.placements.items() if p is Placement.STREAMED}
    assert streamed == {"audio_tower"} == {name.partition(".")[0] for name in plan.host_tiers}


def test_no_more_than_two_fifths_of_the_ram_are_pinned_and_the_rest_is_pageable(seven_b: Footprint):
    plan = planned(seven_b, 5, 6)
    pinned_bytes, pageable_bytes = (bytes_in(plan, seven_b, tier) for tier in (HostTier.PINNED, HostTier.PAGEABLE))
    assert 0.4 * 6 * GIB - 120 * MIB < pinned_bytes <= 0.4 * 6 * GIB
    assert pageable_bytes > 0


def test_what_stays_on_the_device_for_good_needs_no_copy(seven_b: Footprint):
    plan = planned(seven_b, 8, 16)
    residents = {c for phase in plan.phases for c, p in phase.placements.items() if p is Placement.RESIDENT}
    assert residents and not residents & {name.partition(".")[0] for name in plan.host_tiers}
    assert planned(seven_b, 24, 16).host_tiers == {}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gib=st.floats(3, 16), ram_gib=st.floats(2.2, 24))
def test_the_host_never_holds_more_than_its_budget(seven_b: Footprint, gib: float, ram_gib: float):
    plan = planned(seven_b, gib, ram_gib)
    held_bytes = sum(bytes_in(plan, seven_b, tier) for tier in HostTier)
    assert plan.host_bytes == planned(seven_b, gib, None).host_bytes + held_bytes
    assert plan.host_bytes <= int(ram_gib * GIB) == plan.ram_bytes


def test_a_host_with_too_little_ram_is_refused_before_the_device_is_asked(seven_b: Footprint):
    with pytest.raises(InfeasibleBudgetError, match=r"the RAM budget is 1\.00 GiB") as refused:
        planned(seven_b, 1, 1, MINUTE)
    assert refused.value.phase == "host"
    assert planned(seven_b, 8, refused.value.needed_bytes / GIB, MINUTE).host_tiers == {}


def test_a_cpu_shares_its_ram_between_weights_and_the_rest(seven_b: Footprint):
    alone = planned(seven_b, None, None, CHAT, device="cpu")
    plan = planned(seven_b, None, 8, CHAT, device="cpu")
    assert plan.budget_bytes == 8 * GIB - alone.host_bytes
    assert plan.peak_bytes + plan.host_bytes <= 8 * GIB
    assert plan.host_tiers == {}


def test_on_a_cpu_the_smaller_of_both_budgets_counts(seven_b: Footprint):
    assert planned(seven_b, 6, 64, CHAT, device="cpu").budget_bytes == 6 * GIB
