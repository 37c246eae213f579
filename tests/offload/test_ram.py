"""The host's side of a plan: what it holds, and which weights wait there for the bus."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniDiTConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavDiTModel
from turns import CHAT, MINUTE, QUARTER

from lowvram.errors import InfeasibleBudgetError
from lowvram.offload import ram, transfer
from lowvram.offload.budget import GIB, MIB, Budget
from lowvram.offload.footprint import Footprint
from lowvram.offload.plan import HostTier, Placement, Plan, Turn, evenly_spaced, plan_memory
from lowvram.offload.ram import host_bytes
from lowvram.options import Limits
from lowvram.token2wav.conditioning import KEPT_BYTES, Speaker, prepare
from lowvram.token2wav.ode import solver_stages, time_grid


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


def test_the_host_holds_the_process_known_voices_and_the_prompts_rows_twice(seven_b: Footprint):
    rows_bytes = MINUTE.prompt_tokens * 3584 * 2
    assert planned(seven_b, 8, None, MINUTE).host_bytes == (1536 + 128 + 20) * MIB + 2 * rows_bytes
    silent = replace(MINUTE, codes=0)
    assert planned(seven_b, 8, None, silent, device="cpu").host_bytes == (700 + 128 + 20) * MIB + rows_bytes


def test_a_checkpoint_without_speech_knows_no_voices(seven_b: Footprint):
    silent, mute = replace(QUARTER, codes=0), replace(seven_b, talker=None, sound=None)
    assert host_bytes(seven_b, silent, has_cuda=True) - host_bytes(mute, silent, has_cuda=True) == KEPT_BYTES


@pytest.mark.parametrize("steps", [10, 1000])
def test_a_new_voice_is_counted_on_the_host_at_what_it_leaves_there(seven_b: Footprint, steps: int):
    new = replace(CHAT, is_conditioned=False, ode_evaluations=steps - 1)
    more_bytes = host_bytes(seven_b, new, has_cuda=True) - host_bytes(seven_b, CHAT, has_cuda=True)
    with torch.device("meta"):
        dit = Qwen2_5OmniToken2WavDiTModel(Qwen2_5OmniDiTConfig()).eval()
    speaker = Speaker(torch.empty(1, 192), torch.empty(1, 300, 80))
    made = prepare(dit, speaker, solver_stages("euler", time_grid(steps)), guidance=0.5)
    assert made.n_bytes <= more_bytes < 1.001 * made.n_bytes


def test_a_thousand_steps_are_refused_where_the_host_has_no_room_for_them(seven_b: Footprint):
    new = replace(CHAT, is_conditioned=False, ode_evaluations=999)
    enough_gib = planned(seven_b, 8, None, new).host_bytes / GIB
    with pytest.raises(InfeasibleBudgetError, match="the host needs"):
        planned(seven_b, 8, enough_gib - 0.01, new)
    assert planned(seven_b, 8, enough_gib, new).host_tiers == {}


def test_what_is_planned_for_known_voices_is_what_the_speech_decoder_keeps_of_them():
    assert ram.KEPT_CONDITIONINGS_BYTES == KEPT_BYTES


def test_what_is_planned_for_staging_is_two_buffers_of_the_transfers():
    assert ram.STAGING_BYTES == 2 * transfer.STAGING_BYTES


def test_layers_that_are_streamed_are_pinned_before_anything_else(seven_b: Footprint):
    plan = planned(seven_b, 5, 4)
    think = next(phase for phase in plan.phases if "thinker" in phase.stages)
    stay = evenly_spaced(28, think.kept_layers["thinker"])
    streamed = {f"thinker.{layer}" for layer in range(28) if layer not in stay}
    assert streamed <= {name for name, tier in plan.host_tiers.items() if tier is HostTier.PINNED}


def test_layers_walked_more_often_come_first(seven_b: Footprint):
    """With room for a few: the talker's, which cross the bus at every code, not the thinker's."""
    plan = planned(seven_b, 3, 2.42)
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


@pytest.mark.parametrize("gib", [None, 64])
def test_a_cpu_whose_ram_is_short_is_told_how_much_of_it_would_do(seven_b: Footprint, gib: float | None):
    """What the host keeps for itself included: the figure can be given as a RAM budget."""
    with pytest.raises(InfeasibleBudgetError, match=r"the RAM budget is 2\.00 GiB") as refused:
        planned(seven_b, gib, 2, CHAT, device="cpu")
    assert refused.value.phase == "host"
    needed_bytes, budget = refused.value.needed_bytes, partial(Budget, None if gib is None else int(gib * GIB))
    plan_memory(seven_b, budget(needed_bytes), Limits(), CHAT, device="cpu")
    with pytest.raises(InfeasibleBudgetError):
        plan_memory(seven_b, budget(needed_bytes - 1), Limits(), CHAT, device="cpu")


def test_a_cpu_whose_vram_is_short_is_told_that(seven_b: Footprint):
    with pytest.raises(InfeasibleBudgetError, match=r'phase "\w+" needs .*, but the budget is 1\.00 GiB'):
        planned(seven_b, 1, 64, CHAT, device="cpu")
