"""Plans: what shares the device, inside which budget, at which price."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowvram.errors import InfeasibleBudgetError, OptionError
from lowvram.offload.budget import GIB, MIB, Budget, parse_bytes
from lowvram.offload.footprint import Footprint
from lowvram.offload.plan import COMPONENTS, RESERVE_BYTES, Placement, Plan, Turn, plan_memory, smallest_budget_bytes
from lowvram.options import Limits

LIMITS = Limits()
MINUTE = Turn(prompt_tokens=47_640, text_tokens=1024, codes=4096, visual_patches=3072, visuals=60, audio_windows=30)
"""60 s of video at the cap of 768 tokens per second, with its sound, answered in speech."""
QUARTER = replace(MINUTE, prompt_tokens=11_910, visuals=15, audio_windows=8)
CHAT = Turn(prompt_tokens=400, text_tokens=1024, codes=4096)

turns = st.builds(
    lambda prompt_tokens, text_tokens, codes, visuals, patches, windows: Turn(
        prompt_tokens, text_tokens, codes, patches if visuals else 0, visuals, windows
    ),
    st.integers(1, 60_000),
    st.integers(1, 4096),
    st.sampled_from([0, 1, 4096, 15_000]),
    st.integers(0, 300),
    st.integers(4, 65_536),
    st.integers(0, 300),
)
budgets = st.integers(2 * GIB, 26 * GIB)
# A session fixture never changes between examples.
properties = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def planned(footprint: Footprint, gib: float | None, turn: Turn = MINUTE, **options: Any) -> Plan:
    return plan_memory(footprint, Budget(None if gib is None else int(gib * GIB)), LIMITS, turn, **options)


def walked(plan: Plan, footprint: Footprint, turns: int = 2) -> Iterator[tuple[int, int]]:
    """Carry a plan out with weights as mere sizes: (bytes on the device, bytes moved there) at each block's arrival.

    Blocks that no phase keeps leave before new ones come, resident ones stay from turn to turn, and a streamed block
    leaves before the next comes.
    """
    held: dict[str, tuple[str, int]] = {}
    for _ in range(turns):
        for phase in plan.phases:
            kept = {c for p in plan.phases for c, place in p.placements.items() if place is Placement.RESIDENT}
            kept |= {c for c, place in phase.placements.items() if place is Placement.PHASE}
            held = {name: block for name, block in held.items() if block[0] in kept}
            others = phase.kv_bytes + phase.activation_bytes + plan.reserve_bytes
            for component, place in phase.placements.items():
                for block in footprint.components[component]:
                    if block.name in held:
                        continue
                    held[block.name] = (component, block.n_bytes)
                    yield others + sum(n_bytes for _, n_bytes in held.values()), block.n_bytes
                    if place is Placement.STREAMED:
                        del held[block.name]


def test_a_minute_of_video_answered_in_speech_fits_8_gib(seven_b: Footprint):
    plan = planned(seven_b, 8)
    assert plan.peak_bytes <= 8 * GIB
    assert Placement.STREAMED not in {place for phase in plan.phases for place in phase.placements.values()}


@pytest.mark.parametrize(
    ("gib", "phases"),
    [
        (6, ["hear+see", "think", "talk", "sound"]),
        (8, ["hear+see", "think", "talk+sound"]),
        (12, ["hear+see", "think", "talk+sound"]),
        (16, ["hear+see", "think+talk+sound"]),
        (24, ["hear+see+think+talk+sound"]),
    ],
)
def test_a_larger_card_cuts_the_pipe_less_often(seven_b: Footprint, gib: int, phases: list[str]):
    assert [phase.name for phase in planned(seven_b, gib).phases] == phases


def test_without_a_budget_everything_is_resident_in_one_phase(seven_b: Footprint):
    (phase,) = planned(seven_b, None).phases
    assert set(phase.placements) == set(seven_b.components)
    assert set(phase.placements.values()) == {Placement.RESIDENT}


def test_a_cpu_needs_no_reserve(seven_b: Footprint):
    assert planned(seven_b, None, device="cpu").reserve_bytes == 0
    assert planned(seven_b, None, device="cuda:1").reserve_bytes == RESERVE_BYTES


@pytest.mark.parametrize(
    ("turn", "stages"),
    [
        (CHAT, ("thinker", "talker", "token2wav")),
        (replace(CHAT, codes=0), ("thinker",)),
        (replace(CHAT, codes=0, audio_windows=1), ("audio_tower", "thinker")),
        (replace(CHAT, codes=0, visuals=1, visual_patches=256), ("visual", "thinker")),
    ],
)
def test_only_stages_that_the_turn_needs_are_planned(seven_b: Footprint, turn: Turn, stages: tuple[str, ...]):
    plan = planned(seven_b, 24, turn)
    assert tuple(stage for phase in plan.phases for stage in phase.stages) == stages
    assert set(plan.phases[0].placements) == {component for stage in stages for component in COMPONENTS[stage]}


def test_kv_caches_count_in_their_own_phases_only(seven_b: Footprint):
    see, think, talk = planned(seven_b, 8).phases
    assert see.kv_bytes == 0
    assert think.kv_bytes == (47_640 + 1024) * 56 * 1024
    assert talk.kv_bytes == (47_640 + 2 + 4096) * 48 * 1024


def test_a_picture_larger_than_a_vision_chunk_is_still_seen_whole(seven_b: Footprint):
    chunk = LIMITS.vision_chunk_patches
    look = replace(CHAT, codes=0, visuals=1, visual_patches=chunk)
    small, large = (planned(seven_b, 24, replace(look, visual_patches=n)).phases[0] for n in (chunk, 4 * chunk))
    assert large.activation_bytes == 4 * small.activation_bytes


def test_a_smaller_prefill_chunk_is_taken_where_that_avoids_streaming(seven_b: Footprint):
    turn = replace(MINUTE, codes=0)
    roomy = next(gib for gib in (x / 100 for x in range(500, 900)) if not streams(seven_b, gib, turn))
    assert planned(seven_b, roomy, turn).prefill_chunk_tokens < LIMITS.prefill_chunk_tokens
    assert planned(seven_b, 12, turn).prefill_chunk_tokens == LIMITS.prefill_chunk_tokens


def streams(footprint: Footprint, gib: float, turn: Turn) -> bool:
    plan = planned(footprint, gib, turn)
    return plan.traffic_bytes > sum(footprint.component_bytes(component) for component in footprint.components)


def test_a_chosen_chunk_is_never_exceeded(seven_b: Footprint):
    plan = plan_memory(seven_b, Budget.of("12GiB"), Limits(prefill_chunk_tokens=200), MINUTE)
    assert plan.prefill_chunk_tokens == 200


def test_a_streamed_thinker_crosses_the_bus_at_every_pass(seven_b: Footprint):
    plan = planned(seven_b, 6)
    think = next(phase for phase in plan.phases if "thinker" in phase.stages)
    assert think.placements["thinker"] is Placement.STREAMED
    passes = -(-47_640 // plan.prefill_chunk_tokens) + 1024
    assert think.traffic_bytes == passes * seven_b.component_bytes("thinker") + seven_b.component_bytes("lm_head")


def test_a_second_answer_within_an_ample_budget_moves_no_weights(seven_b: Footprint):
    assert planned(seven_b, 24).traffic_bytes == 0


def test_speech_that_starts_earlier_is_worth_moving_a_gigabyte(seven_b: Footprint):
    """Keeping BigVGAN and the encoders instead would save 0.05 s of copying and cost up to 82 s of waiting."""
    assert [phase.name for phase in planned(seven_b, 12, CHAT).phases] == ["think+talk+sound"]
    assert planned(seven_b, 8, QUARTER).phases[-1].name == "talk+sound"


@properties
@given(turn=turns, budget_bytes=budgets)
def test_carrying_out_a_plan_never_passes_its_peak_nor_the_budget(seven_b: Footprint, turn: Turn, budget_bytes: int):
    try:
        plan = plan_memory(seven_b, Budget(budget_bytes), LIMITS, turn)
    except InfeasibleBudgetError:
        return
    peak = max(held for held, _ in walked(plan, seven_b))
    assert peak <= plan.peak_bytes <= budget_bytes


@properties
@given(turn=turns, budget_bytes=budgets)
def test_unstreamed_traffic_is_what_a_second_turn_really_moves(seven_b: Footprint, turn: Turn, budget_bytes: int):
    try:
        plan = plan_memory(seven_b, Budget(budget_bytes), LIMITS, turn)
    except InfeasibleBudgetError:
        return
    if any(Placement.STREAMED in phase.placements.values() for phase in plan.phases):
        return
    first, second = (sum(moved for _, moved in walked(plan, seven_b, turns)) for turns in (1, 2))
    assert plan.traffic_bytes == second - first


@properties
@given(turn=turns, budgets=st.tuples(budgets, budgets).map(sorted))
def test_more_budget_never_repeats_or_waits_more(seven_b: Footprint, turn: Turn, budgets: list[int]):
    try:
        small, large = (plan_memory(seven_b, Budget(budget), LIMITS, turn) for budget in budgets)
    except InfeasibleBudgetError:
        return
    assert burden(large, seven_b) <= burden(small, seven_b)


def burden(plan: Plan, footprint: Footprint) -> tuple[int, int, int, int]:
    """What a plan costs its listener, read from the plan alone, most important first."""
    once = 0
    for phase in plan.phases:
        own = [component for stage in phase.stages for component in COMPONENTS[stage]]
        moving = [c for c in own if phase.placements[c] is not Placement.RESIDENT]
        once += sum(footprint.component_bytes(component) for component in moving)
    ends = [phase.stages[-1] for phase in plan.phases[:-1]]
    waiting = plan.text_tokens * ("thinker" in ends) + plan.codes * ("talker" in ends)
    chunks = -(-plan.prompt_tokens // plan.prefill_chunk_tokens)
    return plan.traffic_bytes - once, waiting, chunks, plan.traffic_bytes


@properties
@given(turn=turns, budget_bytes=budgets)
def test_the_same_question_has_the_same_plan(seven_b: Footprint, turn: Turn, budget_bytes: int):
    shuffled = replace(seven_b, components=dict(reversed(seven_b.components.items())))
    try:
        plan = plan_memory(seven_b, Budget(budget_bytes), LIMITS, turn)
    except InfeasibleBudgetError:
        return
    assert plan == plan_memory(shuffled, Budget(budget_bytes), LIMITS, turn)


@properties
@given(turn=turns)
def test_the_smallest_budget_works_and_a_mebibyte_less_is_refused(seven_b: Footprint, turn: Turn):
    smallest = smallest_budget_bytes(seven_b, LIMITS, turn)
    assert plan_memory(seven_b, Budget(smallest), LIMITS, turn).peak_bytes == smallest
    with pytest.raises(InfeasibleBudgetError):
        plan_memory(seven_b, Budget(smallest - MIB), LIMITS, turn)


@properties
@given(turn=turns, budget_bytes=budgets)
def test_a_plan_survives_json(seven_b: Footprint, turn: Turn, budget_bytes: int):
    plan = plan_memory(seven_b, Budget(max(budget_bytes, 20 * GIB)), LIMITS, turn)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("damage", [{}, {"phases": 7}, {"phases": [{"name": "see"}]}, {"phases": [{"placements": 1}]}])
def test_json_that_is_no_plan_is_refused(seven_b: Footprint, damage: dict[str, Any]):
    fields = planned(seven_b, 8).to_json() | damage if damage else {}
    with pytest.raises(OptionError, match="not a plan"):
        Plan.from_json(fields)


def test_a_placement_that_nobody_knows_is_refused(seven_b: Footprint):
    fields = planned(seven_b, 8).to_json()
    fields["phases"][0]["placements"]["visual"] = "somewhere"
    with pytest.raises(OptionError, match="somewhere"):
        Plan.from_json(fields)


def test_a_refusal_names_the_phase_and_both_sizes(seven_b: Footprint):
    with pytest.raises(InfeasibleBudgetError) as refused:
        planned(seven_b, 4)
    assert refused.value.phase == "think"
    assert refused.value.available_bytes == 4 * GIB
    assert refused.value.needed_bytes == smallest_budget_bytes(seven_b, LIMITS, MINUTE)


def test_the_smallest_budget_in_a_refusal_works_as_written(seven_b: Footprint):
    with pytest.raises(InfeasibleBudgetError) as refused:
        planned(seven_b, 4)
    written = refused.value.hint.partition(" is ")[2].partition(";")[0]
    assert planned(seven_b, parse_bytes(written) / GIB).peak_bytes <= parse_bytes(written)


def test_a_refusal_tells_a_small_budget_as_it_was_given(seven_b: Footprint):
    with pytest.raises(InfeasibleBudgetError, match="but the budget is 1000 B"):
        planned(seven_b, 1000 / GIB)


def test_a_refusal_says_what_a_shorter_prompt_saves(seven_b: Footprint):
    with pytest.raises(InfeasibleBudgetError, match="MiB with a prompt of 23820 tokens"):
        planned(seven_b, 4)


def test_a_refusal_says_what_silence_saves_only_where_it_does(seven_b: Footprint):
    with pytest.raises(InfeasibleBudgetError, match="MiB without speech"):
        planned(seven_b, 1, CHAT)
    with pytest.raises(InfeasibleBudgetError) as refused:
        planned(seven_b, 4, MINUTE)
    assert "without speech" not in refused.value.hint


def test_speech_is_refused_where_the_checkpoint_has_none(seven_b: Footprint):
    silent = replace(seven_b, talker=None, sound=None)
    with pytest.raises(OptionError, match="no talker"):
        planned(silent, None, CHAT)
    assert planned(silent, None, replace(CHAT, codes=0)).codes == 0


def test_a_plan_prints_as_a_table_for_people(seven_b: Footprint):
    lines = str(planned(seven_b, 8)).splitlines()
    assert lines[0].split() == ["phase", "weights", "KV", "cache", "activ.", "peak", "GiB;", "where", "weights", "are"]
    assert lines[2].split()[:5] == ["think", "4.60", "2.60", "0.15", "7.35"]
    assert lines[2].endswith("thinker phase, lm_head phase, bigvgan resident")
    assert lines[-1].startswith("peak 7.85 GiB of 8.00 GiB on cuda, 0.50 in reserve; 10.33 GiB of weights move")
