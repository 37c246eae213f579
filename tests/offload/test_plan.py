"""Plans: what shares the device, inside which budget, at which price."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from turns import CHAT, MINUTE, QUARTER, clip

from lowvram.errors import InfeasibleBudgetError, OptionError
from lowvram.offload.budget import GIB, MIB, Budget
from lowvram.offload.footprint import BLOCK_ALIGNMENT_BYTES, Footprint
from lowvram.offload.plan import (
    COMPONENTS,
    STREAM_SLOTS,
    Placement,
    Plan,
    Turn,
    evenly_spaced,
    plan_memory,
    smallest_budget_bytes,
)
from lowvram.offload.prices import Prices
from lowvram.options import Limits

LIMITS = Limits()
RESERVE_BYTES = 512 * MIB

turns = st.builds(
    lambda prompt_tokens, text_tokens, codes, grids, windows, kv: Turn(
        prompt_tokens,
        text_tokens,
        codes,
        tuple(grids),
        windows,
        kv=kv,
    ),
    st.integers(1, 60_000),
    st.integers(1, 4096),
    st.sampled_from([0, 1, 4096, 15_000]),
    st.lists(st.tuples(st.integers(1, 100), st.sampled_from([2, 16, 48]), st.sampled_from([2, 32, 64])), max_size=3),
    st.integers(0, 300),
    st.sampled_from(["16bit", "int8"]),
)
budgets = st.integers(2 * GIB, 26 * GIB)
# A session fixture never changes between examples.
properties = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def planned(footprint: Footprint, gib: float | None, turn: Turn = MINUTE, **options: Any) -> Plan:
    return plan_memory(footprint, Budget(None if gib is None else int(gib * GIB)), LIMITS, turn, **options)


def walked(plan: Plan, footprint: Footprint, turns: int = 2) -> Iterator[tuple[int, int]]:
    """Carry a plan out with weights as mere sizes: (bytes on the device, bytes moved there) at each block's arrival.

    Blocks that no phase keeps leave before new ones come, resident ones stay from turn to turn, and a streamed
    component's slots are there from the beginning of its phase, each as large as its largest streamed layer.
    """
    held: dict[str, int] = {}
    for _ in range(turns):
        for phase in plan.phases:
            kept, streamed = {}, {}
            for component, place in phase.placements.items():
                blocks = footprint.components[component]
                stay = range(len(blocks))
                if place is Placement.STREAMED:
                    stay = {*evenly_spaced(len(blocks) - 1, phase.kept_layers[component]), len(blocks) - 1}
                kept |= {block.name: block.n_bytes for i, block in enumerate(blocks) if i in stay}
                streamed[component] = [block.n_bytes for i, block in enumerate(blocks) if i not in stay]
            held = {name: n_bytes for name, n_bytes in held.items() if name in kept}
            others = phase.kv_bytes + phase.activation_bytes + plan.reserve_bytes
            others += sum(min(STREAM_SLOTS, len(layers)) * max(layers, default=0) for layers in streamed.values())
            for name, n_bytes in kept.items():
                if name not in held:
                    held[name] = n_bytes
                    yield others + sum(held.values()), n_bytes
        residents = {c for p in plan.phases[-1:] for c, place in p.placements.items() if place is Placement.RESIDENT}
        held = {name: n_bytes for name, n_bytes in held.items() if name.partition(".")[0] in residents}


def is_streamed(plan: Plan) -> bool:
    return any(Placement.STREAMED in phase.placements.values() for phase in plan.phases)


def phase_of(plan: Plan, stage: str) -> Any:
    return next(phase for phase in plan.phases if stage in phase.stages)


# What fits in which card


def test_a_minute_of_video_answered_in_speech_fits_8_gib(seven_b: Footprint):
    plan = planned(seven_b, 8)
    assert plan.peak_bytes <= 8 * GIB
    assert not is_streamed(plan)


@pytest.mark.parametrize(
    ("turn", "gib"),
    [
        (clip(15), 4.93),  # at most 5.3 was asked for
        (clip(30), 5.56),  # 5.9
        (clip(60), 6.83),  # 7.2
        (clip(60, kv="int8"), 5.57),  # 5.9
        (clip(600, grid=(16, 24), kv="int8"), 6.26),  # ten minutes: 57,600 + 15,000 tokens; 12
    ],
)
def test_a_clip_is_thought_about_without_streaming_in_a_small_card(seven_b: Footprint, turn: Turn, gib: float):
    """The budget is without the reserve: what a context and a workspace take depends on the card."""
    plan = planned(seven_b, gib + RESERVE_BYTES / GIB, turn)
    assert phase_of(plan, "thinker").placements["thinker"] is Placement.PHASE


@pytest.mark.parametrize(
    ("turn", "gib"),
    [
        (clip(15), 2.48),  # at most 3.0 was asked for
        (clip(60), 4.39),
        (clip(600, grid=(16, 24), kv="int8"), 3.82),  # 12
    ],
)
def test_the_smallest_card_for_a_clip_answered_in_speech(seven_b: Footprint, turn: Turn, gib: float):
    assert gib - 0.01 <= smallest_budget_bytes(seven_b, LIMITS, turn) / GIB <= gib


@pytest.mark.parametrize(
    ("gib", "phases"),
    [
        (6, ["hear+see", "think", "talk", "sound"]),
        (8, ["hear+see", "think", "talk+sound"]),
        (12, ["hear+see", "think", "talk+sound"]),
        (15, ["hear+see", "think+talk+sound"]),
        (16, ["hear+see+think+talk+sound"]),
    ],
)
def test_a_larger_card_cuts_the_pipe_less_often(seven_b: Footprint, gib: int, phases: list[str]):
    assert [phase.name for phase in planned(seven_b, gib).phases] == phases


# What a plan holds


def test_without_a_budget_everything_is_resident_in_one_phase(seven_b: Footprint):
    (phase,) = planned(seven_b, None).phases
    assert set(phase.placements) == set(seven_b.components) - {"dit_conditioning"}
    assert set(phase.placements.values()) == {Placement.RESIDENT}


def test_a_cpu_needs_no_reserve(seven_b: Footprint):
    assert planned(seven_b, None, device="cpu").reserve_bytes == 0
    assert planned(seven_b, None, device="cuda:1").reserve_bytes == RESERVE_BYTES


def test_the_reserve_is_context_and_workspace_and_slack(seven_b: Footprint):
    plan = planned(seven_b, 8)
    kinds = (plan.context_bytes, plan.workspace_bytes, plan.slack_bytes)
    assert kinds == (350 * MIB, 64 * MIB, 98 * MIB)
    assert plan.peak_bytes == max(phase.peak_bytes for phase in plan.phases) + sum(kinds)


@pytest.mark.parametrize(
    ("turn", "stages"),
    [
        (CHAT, ("thinker", "talker", "token2wav")),
        (replace(CHAT, codes=0), ("thinker",)),
        (replace(CHAT, codes=0, audio_windows=1), ("audio_tower", "thinker")),
        (replace(CHAT, codes=0, grids=((1, 16, 16),)), ("visual", "thinker")),
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


def test_int8_caches_are_priced_and_named(seven_b: Footprint):
    plan = planned(seven_b, 8, replace(MINUTE, kv="int8"))
    assert plan.kv == "int8"
    assert phase_of(plan, "thinker").kv_bytes == (47_640 + 1024) * 28 * 2 * 4 * (128 + 4)


def test_the_smallest_budget_is_written_on_the_plan(seven_b: Footprint):
    assert planned(seven_b, 8).smallest_budget_bytes == smallest_budget_bytes(seven_b, LIMITS, MINUTE)


def test_speech_is_refused_where_the_checkpoint_has_none(seven_b: Footprint):
    silent = replace(seven_b, talker=None, sound=None)
    with pytest.raises(OptionError, match="no talker"):
        planned(silent, None, CHAT)
    assert planned(silent, None, replace(CHAT, codes=0)).codes == 0


# A voice, and the sound it makes


def test_a_new_voice_is_conditioned_in_a_phase_of_its_own_and_changes_nothing_else(seven_b: Footprint):
    for gib in (5, 8, 16):
        first, *others = planned(seven_b, gib, replace(MINUTE, is_conditioned=False)).phases
        assert (first.name, first.stages) == ("condition", ("conditioning",))
        assert first.placements["dit_conditioning"] is not Placement.RESIDENT
        assert tuple(others) == planned(seven_b, gib, MINUTE).phases


def test_what_conditions_a_voice_is_on_the_device_for_that_alone(seven_b: Footprint):
    plan = planned(seven_b, None, replace(CHAT, is_conditioned=False))
    assert list(plan.placements["dit_conditioning"]) == ["condition"]


def test_a_new_voice_needs_no_larger_card(seven_b: Footprint):
    known, new = (
        smallest_budget_bytes(seven_b, LIMITS, replace(CHAT, is_conditioned=known)) for known in (True, False)
    )
    assert known == new


def sounding(footprint: Footprint, gib: float, **options: Any) -> Any:
    """The last phase of a chat within a budget beside the reserve, when sound alone is left to make."""
    turn, over = replace(CHAT, **options), frozenset({"thinker", "talker"})
    return planned(footprint, gib + RESERVE_BYTES / GIB, turn, over=over, begun=["token2wav"]).phases[-1]


def test_the_dit_streams_what_does_not_fit(seven_b: Footprint):
    assert sounding(seven_b, 1.25).placements["dit"] is not Placement.STREAMED
    kept = [sounding(seven_b, gib).kept_layers["dit"] for gib in (0.7, 0.9, 1.1)]
    assert kept == sorted(kept) and len(set(kept)) == 3


def test_a_streamed_dit_moves_once_a_chunk_in_offload_and_once_an_evaluation_otherwise(seven_b: Footprint):
    """4096 codes are 85 chunks of 48, what is left of them, and the end, which in offload takes 9 walks."""
    for mode, walks in (("exact", 9 * (85 + 2)), ("offload", 85 + 1 + 9)):
        phase = sounding(seven_b, 0.9, speech_mode=mode)
        streamed_bytes = phase.streamed_layers["dit"] * seven_b.components["dit"][0].n_bytes
        assert phase.traffic_bytes == seven_b.component_bytes("dit") + (walks - 1) * streamed_bytes


def test_half_precision_halves_the_layers_of_the_dit_alone(seven_b: Footprint):
    single, half = (sounding(seven_b, 4, speech_dtype=dtype) for dtype in ("float32", "bfloat16"))
    halved = seven_b.speaking_in("bfloat16")
    for whole_block, half_block in zip(seven_b.components["dit"][:-1], halved.components["dit"], strict=False):
        assert half_block.n_bytes == pytest.approx(whole_block.n_bytes / 2, abs=BLOCK_ALIGNMENT_BYTES)
    assert single.weights_bytes - half.weights_bytes == seven_b.device_bytes("dit") - halved.device_bytes("dit")


def test_offload_computes_with_one_evaluation_at_a_time_beside_the_rows_and_queues_of_the_others(seven_b: Footprint):
    planned_bytes = [sounding(seven_b, 4, speech_mode=mode).activation_bytes for mode in ("exact", "offload")]
    assert planned_bytes[0] < planned_bytes[1] < 1.1 * planned_bytes[0]


# Streaming


def test_below_what_fits_whole_as_many_layers_as_fit_stay(seven_b: Footprint):
    """A little more than a layer's bytes more, a layer more: there is no cliff."""
    kept = [phase_of(planned(seven_b, 5 + i / 8), "thinker").kept_layers["thinker"] for i in range(10)]
    assert all(0 <= after - before <= 2 for before, after in pairwise(kept))
    assert kept[-1] - kept[0] >= 9


def test_layers_that_stay_leave_no_room_for_another(seven_b: Footprint):
    plan = planned(seven_b, 6)
    think = phase_of(plan, "thinker")
    layer_bytes = seven_b.components["thinker"][0].n_bytes
    assert think.kept_layers["thinker"] + think.streamed_layers["thinker"] == 28
    assert 6 * GIB - plan.reserve_bytes - think.peak_bytes < layer_bytes


def test_a_streamed_component_holds_its_slots_its_kept_layers_and_the_rest(seven_b: Footprint):
    think = phase_of(planned(seven_b, 6), "thinker")
    layer_bytes, rest_bytes = (seven_b.components["thinker"][i].device_bytes for i in (0, -1))
    thinker_bytes = (2 + think.kept_layers["thinker"]) * layer_bytes + rest_bytes
    assert think.weights_bytes == thinker_bytes + seven_b.device_bytes("lm_head")


def test_streamed_layers_cross_the_bus_at_every_pass_and_the_others_once(seven_b: Footprint):
    plan = planned(seven_b, 6)
    think = phase_of(plan, "thinker")
    passes = -(-47_640 // plan.prefill_chunk_tokens) + 1024
    streamed_bytes = think.streamed_layers["thinker"] * seven_b.components["thinker"][0].n_bytes
    once_bytes = seven_b.component_bytes("thinker") - streamed_bytes + seven_b.component_bytes("lm_head")
    assert think.traffic_bytes == passes * streamed_bytes + once_bytes


def test_a_smaller_prefill_chunk_is_taken_where_that_avoids_streaming(seven_b: Footprint):
    turn = replace(MINUTE, codes=0)
    roomy = next(gib for gib in (x / 100 for x in range(500, 900)) if not is_streamed(planned(seven_b, gib, turn)))
    assert planned(seven_b, roomy, turn).prefill_chunk_tokens < LIMITS.prefill_chunk_tokens
    assert planned(seven_b, 12, turn).prefill_chunk_tokens == LIMITS.prefill_chunk_tokens


def test_a_smaller_prefill_chunk_is_taken_rather_than_a_cut(seven_b: Footprint):
    """A few more passes over the prompt are heard less than sound that waits for the whole text."""
    turn = replace(CHAT, prompt_tokens=3000)
    whole = planned(seven_b, None, turn)
    (phase,) = planned(seven_b, (whole.peak_bytes - 40 * MIB) / GIB, turn).phases
    assert phase.stages == ("thinker", "talker", "token2wav")


def test_a_chosen_chunk_is_never_exceeded(seven_b: Footprint):
    plan = plan_memory(seven_b, Budget.of("12GiB"), Limits(prefill_chunk_tokens=200), MINUTE)
    assert plan.prefill_chunk_tokens == 200


def test_encoders_take_smaller_chunks_where_memory_is_short(seven_b: Footprint):
    """Small pictures, many at once: the vision tower's activations bind, and shrink."""
    many = clip(60, grid=(16, 32), codes=0, text_tokens=1, audio_windows=0)
    wide = Limits(vision_chunk_patches=32_768)
    smallest = smallest_budget_bytes(seven_b, wide, many)
    assert plan_memory(seven_b, Budget(smallest), wide, many).vision_chunk_patches < 32_768
    assert plan_memory(seven_b, Budget(24 * GIB), wide, many).vision_chunk_patches == 32_768


def test_a_picture_larger_than_a_vision_chunk_is_still_seen_whole(seven_b: Footprint):
    chunk = LIMITS.vision_chunk_patches
    for patches in (chunk, 4 * chunk):
        (phase,) = planned(seven_b, 24, replace(CHAT, codes=0, grids=((1, 64, patches // 64),))).phases
        seen_bytes = seven_b.visual.activation_bytes(patches, chunk, 2)
        assert phase.activation_bytes == seen_bytes + seven_b.thinker.state_bytes(2)


def test_a_photograph_of_twelve_megapixels_is_seen_in_less_than_its_encoder_takes_whole(seven_b: Footprint):
    """16,384 tokens; were all of it computed at once, 2.8 GiB of activations would bind."""
    photograph = replace(CHAT, prompt_tokens=16_400, codes=0, grids=((1, 256, 256),))
    assert smallest_budget_bytes(seven_b, LIMITS, photograph) < 3 * GIB


# Residents


def test_a_second_answer_within_an_ample_budget_moves_no_weights(seven_b: Footprint):
    assert planned(seven_b, 24).traffic_bytes == 0


def test_speech_that_starts_earlier_is_worth_moving_a_gigabyte(seven_b: Footprint):
    """Keeping BigVGAN and the encoders instead would save 0.05 s of copying and cost up to 82 s of waiting."""
    assert [phase.name for phase in planned(seven_b, 12, CHAT).phases] == ["think+talk+sound"]
    assert planned(seven_b, 8, QUARTER).phases[-1].name == "talk+sound"


def test_an_encoder_read_once_gives_way_to_a_thinker_that_stays(seven_b: Footprint):
    """One picture crosses the vision tower once either way; through slots it leaves the thinker where it is."""
    look = replace(CHAT, codes=0, grids=((1, 32, 32),))
    plan = planned(seven_b, 5.5, look)
    assert plan.placements["visual"] == {"see+think": Placement.STREAMED}
    assert plan.traffic_bytes == seven_b.component_bytes("visual")


# Properties


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
    if is_streamed(plan):
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
    assert plan_memory(seven_b, Budget(smallest), LIMITS, turn).peak_bytes <= smallest
    with pytest.raises(InfeasibleBudgetError):
        plan_memory(seven_b, Budget(smallest - MIB), LIMITS, turn)


# A turn in progress


ENCODED = frozenset({"audio_tower", "visual"})
ANSWERING = ("thinker", "talker", "token2wav")


def test_stages_that_are_over_are_left_out_and_the_others_are_cut_as_their_room_allows(seven_b: Footprint):
    names = [[phase.name for phase in planned(seven_b, gib, over=ENCODED).phases] for gib in (6, 12, 24)]
    assert names == [["think", "talk", "sound"], ["think", "talk+sound"], ["think+talk+sound"]]


def test_so_are_stages_that_have_begun_together(seven_b: Footprint):
    names = [
        [phase.name for phase in planned(seven_b, gib, over=ENCODED, begun=ANSWERING).phases] for gib in (6, 12, 24)
    ]
    assert names == [["think", "talk", "sound"], ["think", "talk+sound"], ["think+talk+sound"]]


def test_a_stage_between_two_that_have_begun_may_be_over(seven_b: Footprint):
    """Speech may end before the text does, while sound is still to be made of it."""
    plan = planned(seven_b, 24, over=ENCODED | {"talker"}, begun=("thinker", "token2wav"))
    assert [phase.stages for phase in plan.phases] == [("thinker", "token2wav")]


def test_when_all_stages_are_over_there_is_a_plan_for_the_last(seven_b: Footprint):
    assert [phase.name for phase in planned(seven_b, 24, over=frozenset(MINUTE.stages)).phases] == ["sound"]


def test_a_cache_that_waits_is_the_hosts_and_a_small_state_the_devices(seven_b: Footprint):
    """In the last phase both decoders may wait: while sound gets done what it is at, before the text is written on."""
    assert seven_b.talker is not None and seven_b.sound is not None
    fresh, cut = (planned(seven_b, 6, over=ENCODED, begun=begun) for begun in ((), ANSWERING))
    assert [phase.kv_bytes for phase in cut.phases] == [phase.kv_bytes for phase in fresh.phases]
    assert cut.host_bytes - fresh.host_bytes == sum(phase.kv_bytes for phase in fresh.phases)
    decoders_bytes = seven_b.thinker.state_bytes(2) + seven_b.talker.state_bytes(2)
    assert cut.phases[2].activation_bytes - fresh.phases[2].activation_bytes == decoders_bytes


def test_on_a_cpu_a_cache_that_waits_takes_its_room_all_the_same(seven_b: Footprint):
    fresh, cut = (planned(seven_b, 9, over=ENCODED, begun=begun, device="cpu") for begun in ((), ANSWERING))
    both_bytes = phase_of(fresh, "thinker").kv_bytes + phase_of(fresh, "talker").kv_bytes
    assert len(cut.phases) > 1
    assert {phase.kv_bytes for phase in cut.phases} == {both_bytes}
    assert cut.host_bytes == fresh.host_bytes


def test_caches_that_wait_on_the_host_leave_less_of_its_budget_to_weights(seven_b: Footprint):
    def kept_bytes(*begun: str) -> int:
        budget = Budget(6 * GIB, 8 * GIB)
        plan = plan_memory(seven_b, budget, LIMITS, MINUTE, over=ENCODED, begun=begun)
        assert plan.host_bytes <= 8 * GIB
        sizes = {block.name: block.n_bytes for blocks in seven_b.components.values() for block in blocks}
        return sum(sizes[name] for name in plan.host_tiers)

    assert kept_bytes() - kept_bytes(*ANSWERING) > 2 * GIB


@properties
@given(turn=turns, data=st.data())
def test_what_is_left_of_a_turn_goes_on_in_what_the_turn_could_have_begun_in_and_what_it_remembers(
    seven_b: Footprint, turn: Turn, data: st.DataObject
):
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(turn.stages) - 1)] * 2)))
    over, begun = frozenset(turn.stages[:first]), turn.stages[first : last + 1]
    with pytest.raises(InfeasibleBudgetError) as refused:
        plan_memory(seven_b, Budget(1), LIMITS, turn, over=over, begun=begun)
    needed_bytes = refused.value.needed_bytes
    remembered_bytes = Prices(seven_b, LIMITS, turn).state_bytes(begun)
    assert needed_bytes <= smallest_budget_bytes(seven_b, LIMITS, turn) + remembered_bytes
    plan = plan_memory(seven_b, Budget(needed_bytes), LIMITS, turn, over=over, begun=begun)
    assert tuple(stage for phase in plan.phases for stage in phase.stages) == turn.stages[first:]
    assert max(held for held, _ in walked(plan, seven_b)) <= plan.peak_bytes <= needed_bytes
    with pytest.raises(InfeasibleBudgetError):
        plan_memory(seven_b, Budget(needed_bytes - 1), LIMITS, turn, over=over, begun=begun)


@pytest.mark.parametrize(("seconds", "gib"), [(15, 2.50), (60, 4.41)])
def test_speech_that_has_begun_with_the_text_needs_a_hundredth_more_than_the_smallest_card(
    seven_b: Footprint, seconds: int, gib: float
):
    """In one phase it needed 3.97 and 7.51."""
    plan = planned(seven_b, gib, clip(seconds), over=ENCODED, begun=ANSWERING)
    assert plan.smallest_budget_bytes is not None
    assert gib - 0.01 <= plan.smallest_budget_bytes / GIB <= gib


# What comes ahead of its phase


def test_on_a_card_the_next_phase_comes_while_one_computes_and_no_peak_rises(seven_b: Footprint):
    """The encoders of a clip need less room than the thinker that follows."""
    ahead, alone = planned(seven_b, 8), planned(seven_b, 8, device="cpu")
    assert ahead.phases[0].prefetch_bytes > GIB
    assert ahead.peak_bytes - RESERVE_BYTES <= 8 * GIB - RESERVE_BYTES
    assert max(p.peak_bytes for p in ahead.phases) == max(p.peak_bytes - p.prefetch_bytes for p in ahead.phases)
    assert not any(phase.prefetch_bytes for phase in alone.phases)
