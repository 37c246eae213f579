"""Expectations: a roofline that can be checked with a pencil, and never falls when a card gets better."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from turns import MINUTE, QUARTER

from lowvram.offload.budget import GIB, Budget
from lowvram.offload.cards import CARDS, Card, find_card
from lowvram.offload.expect import CODES_PER_SECOND, Expectations, expect
from lowvram.offload.footprint import Footprint
from lowvram.offload.plan import Plan, Turn, plan_memory
from lowvram.options import Limits

CARD = find_card("rtx-4070")


def planned(footprint: Footprint, gib: float, turn: Turn = QUARTER, ram_gib: float | None = None) -> Plan:
    budget = Budget(int(gib * GIB), None if ram_gib is None else int(ram_gib * GIB))
    return plan_memory(footprint, budget, Limits(), turn)


def expected(footprint: Footprint, gib: float, turn: Turn = QUARTER, card: Card = CARD, **ram: float) -> Expectations:
    return expect(planned(footprint, gib, turn, **ram), footprint, turn, card)


def test_a_text_step_reads_all_weights_and_half_an_answers_cache(seven_b: Footprint):
    weights_bytes = seven_b.component_bytes("thinker") + seven_b.component_bytes("lm_head")
    kv_bytes = (QUARTER.prompt_tokens + 512) * 56 * 1024
    assert expected(seven_b, 12).text_tokens_per_s == pytest.approx(0.6 * 504e9 / (weights_bytes + kv_bytes))


def test_the_fastest_card_still_waits_for_launches(seven_b: Footprint):
    endless = replace(CARD, pin_gbit_per_s=1e6, multiprocessors=10**6)
    assert expected(seven_b, 12, card=endless).text_tokens_per_s == pytest.approx(1 / (28 * 0.25e-3))


def test_a_streamed_layer_costs_its_way_over_the_bus_at_every_token(seven_b: Footprint):
    plan = planned(seven_b, 4)
    think = next(phase for phase in plan.phases if "thinker" in phase.stages)
    streamed_bytes = think.streamed_layers["thinker"] * seven_b.components["thinker"][0].n_bytes
    assert expect(plan, seven_b, QUARTER, CARD).text_tokens_per_s == pytest.approx(5e9 / streamed_bytes)


def test_ram_to_pin_layers_in_makes_a_streamed_thinker_faster(seven_b: Footprint):
    by_file, pinned = expected(seven_b, 4), expected(seven_b, 4, ram_gib=16)
    assert pinned.text_tokens_per_s > 2 * by_file.text_tokens_per_s


def test_only_what_does_not_stay_is_loaded(seven_b: Footprint):
    assert expected(seven_b, 24).load_s == 0
    assert expected(seven_b, 8).load_s == pytest.approx(planned(seven_b, 8).traffic_bytes / 5e9)


def test_a_longer_prompt_takes_longer_to_the_first_word_but_hardly_slows_the_next(seven_b: Footprint):
    short, long = (expected(seven_b, 24, turn) for turn in (QUARTER, MINUTE))
    assert long.ttft_s > 4 * short.ttft_s
    assert long.text_tokens_per_s > short.text_tokens_per_s / 2


def test_sound_waits_for_the_whole_answer_where_the_pipe_is_cut(seven_b: Footprint):
    cut, whole = expected(seven_b, 8), expected(seven_b, 24)
    assert cut.first_sound_s is not None and whole.first_sound_s is not None
    written_s = (QUARTER.text_tokens - 144) / cut.text_tokens_per_s
    loaded_s = planned(seven_b, 8).phases[-1].traffic_bytes / 5e9
    waited_s = whole.first_sound_s - whole.ttft_s + written_s + loaded_s
    assert cut.first_sound_s - cut.ttft_s == pytest.approx(waited_s)


def test_speech_keeps_up_where_a_second_of_it_takes_less(seven_b: Footprint):
    said = expected(seven_b, 12)
    assert said.codec_tokens_per_s is not None and said.real_time_factor is not None
    assert said.real_time_factor > CODES_PER_SECOND / said.codec_tokens_per_s


def test_a_silent_answer_has_no_figures_of_speech(seven_b: Footprint):
    silent = expected(seven_b, 8, replace(QUARTER, codes=0))
    assert (silent.first_sound_s, silent.codec_tokens_per_s, silent.real_time_factor) == (None, None, None)
    assert "sound" not in str(silent)


def test_int8_caches_are_read_faster(seven_b: Footprint):
    exact, int8 = (expected(seven_b, 24, replace(MINUTE, kv=kv)) for kv in ("16bit", "int8"))
    assert int8.text_tokens_per_s > exact.text_tokens_per_s


def test_figures_say_what_kind_they_are(seven_b: Footprint):
    figures = expected(seven_b, 8)
    assert json.loads(json.dumps(figures.to_json()))["kind"] == "expected"
    assert str(figures).startswith("expected on rtx-4070, computed from its specification and not measured")


@pytest.mark.parametrize("name", CARDS)
def test_every_card_that_can_hold_a_short_clip_has_expectations(seven_b: Footprint, name: str):
    card = find_card(name)
    said = expected(seven_b, card.usable_bytes / GIB, card=card)
    assert 0 < said.ttft_s < said.first_sound_s


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gib=st.sampled_from([3, 4, 6, 8, 12, 24]),
    name=st.sampled_from(["bus_bits", "pin_gbit_per_s", "multiprocessors", "boost_ghz", "pcie_lanes"]),
    factor=st.integers(1, 8),
    turn=st.sampled_from([QUARTER, replace(QUARTER, codes=0), replace(QUARTER, kv="int8")]),
)
def test_a_better_card_is_never_expected_to_do_worse(seven_b: Footprint, gib: int, name: str, factor: int, turn: Turn):
    better = replace(CARD, **{name: getattr(CARD, name) * factor})
    before, after = (expected(seven_b, gib, turn, card, ram_gib=16) for card in (CARD, better))
    for less in ("ttft_s", "first_sound_s", "real_time_factor", "load_s"):
        assert (getattr(after, less) or 0) <= (getattr(before, less) or 0)
    for more in ("text_tokens_per_s", "codec_tokens_per_s"):
        assert (getattr(after, more) or 0) >= (getattr(before, more) or 0)
