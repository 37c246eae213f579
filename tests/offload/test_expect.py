"""Expectations: a roofline that can be checked with a pencil, and never falls when a card gets better."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from turns import CHAT, MINUTE, QUARTER

from lowvram.offload.budget import GIB, Budget
from lowvram.offload.cards import CARDS, Card, find_card
from lowvram.offload.expect import Expectations, expect
from lowvram.offload.footprint import Footprint
from lowvram.offload.plan import Plan, Turn, plan_memory
from lowvram.options import Limits, SpeechMode

CARD = find_card("rtx-4070")


def planned(footprint: Footprint, gib: float, turn: Turn = QUARTER, ram_gib: float | None = None) -> Plan:
    budget = Budget(int(gib * GIB), None if ram_gib is None else int(ram_gib * GIB))
    return plan_memory(footprint, budget, Limits(), turn)


def expected(footprint: Footprint, gib: float, turn: Turn = QUARTER, card: Card = CARD, **ram: float) -> Expectations:
    return expect(planned(footprint, gib, turn, **ram), footprint, turn, card)


def computing_s(flops: float, tflops: float) -> float:
    return flops / (0.4 * tflops * 1e12)


def test_a_text_step_reads_all_weights_and_half_an_answers_cache(seven_b: Footprint):
    weights_bytes = seven_b.component_bytes("thinker") + seven_b.component_bytes("lm_head")
    kv_bytes = (QUARTER.prompt_tokens + 512) * 56 * 1024
    assert expected(seven_b, 12).text_tokens_per_s == pytest.approx(0.6 * 504e9 / (weights_bytes + kv_bytes))


@pytest.mark.parametrize(("width_bytes", "rate"), [(2, "float16_tflops"), (4, "float32_tflops")])
def test_a_prompt_is_read_as_fast_as_the_card_multiplies(seven_b: Footprint, width_bytes: int, rate: str):
    """28 layers, 3584 wide: 28 heads of 128, 4 of keys and values, an MLP of 18,944; and half a square of scores."""
    tokens, weights = 20_000, 3584 * (2 * 28 * 128 + 2 * 4 * 128 + 3 * 18_944)
    flops = 28 * (2 * tokens * weights + 4 * 28 * 128 * tokens**2 / 2)
    said = expected(replace(seven_b, width_bytes=width_bytes), 24, Turn(tokens, 1))
    read_s = said.ttft_s - 1 / said.text_tokens_per_s
    assert read_s == pytest.approx(computing_s(flops, getattr(CARD, rate)))


def seeing_and_hearing_s(footprint: Footprint, turn: Turn, card: Card = CARD) -> float:
    """What the media of a turn add to the time to its first word, where all weights are in place."""
    blind_and_deaf = replace(turn, grids=(), audio_windows=0)
    return expected(footprint, 24, turn, card).ttft_s - expected(footprint, 24, blind_and_deaf, card).ttft_s


def test_media_take_two_operations_for_each_weight_and_position(seven_b: Footprint):
    patches, positions = 15 * 48 * 64, 8 * 100  # 15 pairs of frames; 8 windows of sound
    visual, audio = (seven_b.component_bytes(component) / 2 for component in ("visual", "audio_tower"))
    flops = 2 * (patches * visual + positions * audio)
    assert seeing_and_hearing_s(seven_b, QUARTER) == pytest.approx(computing_s(flops, CARD.float16_tflops))


def test_a_card_that_multiplies_in_no_time_still_reads_encoders_for_each_chunk_of_media(seven_b: Footprint):
    endless, turn = replace(CARD, multiprocessors=10**12), replace(QUARTER, audio_windows=17)
    read_bytes = 15 * seven_b.component_bytes("visual")  # pair of frames by pair
    read_bytes += 3 * seven_b.component_bytes("audio_tower")  # by 8 windows
    assert seeing_and_hearing_s(seven_b, turn, endless) == pytest.approx(read_bytes / (0.6 * 504e9))


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
    bus_bytes_per_s = 16 * 1.969e9
    assert pinned.text_tokens_per_s / by_file.text_tokens_per_s == pytest.approx(0.8 * bus_bytes_per_s / 5e9)


def test_only_what_does_not_stay_is_loaded(seven_b: Footprint):
    assert expected(seven_b, 24).load_s == 0
    assert expected(seven_b, 8).load_s == pytest.approx(planned(seven_b, 8).traffic_bytes / 5e9)
    *_, rest = seven_b.components["audio_tower"]  # at 12 GiB its layers pass through
    assert expected(seven_b, 12).load_s == pytest.approx(rest.n_bytes / 5e9)


def test_a_bus_that_is_slower_than_the_drive_is_what_loading_takes(seven_b: Footprint):
    one_lane = replace(CARD, pcie_lanes=1)
    bytes_per_s = 0.8 * 1.969e9
    assert expected(seven_b, 8, card=one_lane).load_s == pytest.approx(planned(seven_b, 8).traffic_bytes / bytes_per_s)


def test_the_first_word_waits_for_the_weights_up_to_its_own_phase(seven_b: Footprint):
    see, think, _ = planned(seven_b, 8).phases
    loading_s = (see.traffic_bytes + think.traffic_bytes) / 5e9
    assert expected(seven_b, 8).ttft_s - expected(seven_b, 24).ttft_s == pytest.approx(loading_s)


def test_a_longer_prompt_takes_longer_to_the_first_word_but_hardly_slows_the_next(seven_b: Footprint):
    short, long = (expected(seven_b, 24, turn) for turn in (QUARTER, MINUTE))
    assert long.ttft_s > 4 * short.ttft_s
    assert long.text_tokens_per_s > short.text_tokens_per_s / 2


@pytest.mark.parametrize(("gib", "after_the_text", "codes"), [(8, ["talk+sound"], 144), (4, ["talk", "sound"], 4096)])
def test_sound_waits_for_all_text_and_all_codes_before_a_cut(
    seven_b: Footprint, gib: int, after_the_text: list[str], codes: int
):
    cut, whole = expected(seven_b, gib), expected(seven_b, 24)
    phases = [phase for phase in planned(seven_b, gib).phases if phase.name in after_the_text]
    assert len(phases) == len(after_the_text)
    assert cut.first_sound_s is not None and whole.first_sound_s is not None and cut.codec_tokens_per_s is not None
    written_s = 1024 / cut.text_tokens_per_s - 144 / whole.text_tokens_per_s
    spoken_s = (codes - 144) / cut.codec_tokens_per_s
    loaded_s = sum(phase.traffic_bytes for phase in phases) / 5e9
    waited_s = whole.first_sound_s - whole.ttft_s + written_s + spoken_s + loaded_s
    assert cut.first_sound_s - cut.ttft_s == pytest.approx(waited_s)


CHUNK_FRAMES = 96
EVALUATIONS = 9
DIT_LAYERS = 22
DIT_FLOPS = EVALUATIONS * 2 * CHUNK_FRAMES * DIT_LAYERS * 2 * (4 * 1024**2 + 2 * 1024 * 2048)
"""Of a chunk, at every evaluation with and without what guides it: two operations per weight and frame."""


LAUNCHING_S = EVALUATIONS * DIT_LAYERS * 0.25e-3
"""For a chunk: more than its arithmetic takes in 16 bits."""


def vocoding_s(footprint: Footprint, frames: int) -> float:
    assert footprint.sound is not None
    return computing_s(frames * footprint.sound.vocoder_flops_per_frame, CARD.float32_tflops)


@pytest.mark.parametrize(
    ("card", "options", "solving_s"),
    [
        (CARD, {}, computing_s(DIT_FLOPS, CARD.float32_tflops)),
        (CARD, {"speech_ahead_codes": 24}, computing_s(1.5 * DIT_FLOPS, CARD.float32_tflops)),
        (CARD, {"speech_dtype": "float16"}, LAUNCHING_S),
        (replace(CARD, bus_bits=8), {}, EVALUATIONS * 759_677_440 / (0.6 * 21e9)),
    ],
    ids=["multiplying", "multiplying ahead", "launching", "reading"],
)
def test_a_second_of_speech_takes_its_codes_a_dit_at_every_evaluation_and_a_vocoder(
    seven_b: Footprint, card: Card, options: dict[str, Any], solving_s: float
):
    said = expected(seven_b, 24, replace(QUARTER, **options), card)
    assert said.codec_tokens_per_s is not None
    a_second_s = 50 / said.codec_tokens_per_s + 50 / 48 * (solving_s + vocoding_s(seven_b, CHUNK_FRAMES))
    assert said.real_time_factor == pytest.approx(a_second_s)


def test_the_first_sound_takes_a_prompt_read_by_the_talker_144_words_and_codes_and_three_chunks(seven_b: Footprint):
    """The talker has 24 layers, 896 wide: 12 heads of 128, 4 of keys and values, an MLP of 18,944."""
    said = expected(seven_b, 24, replace(QUARTER, speech_dtype="float16"))
    assert said.first_sound_s is not None and said.codec_tokens_per_s is not None
    tokens, weights = QUARTER.prompt_tokens, 896 * (2 * 12 * 128 + 2 * 4 * 128 + 3 * 18_944)
    flops = 24 * (2 * tokens * weights + 4 * 12 * 128 * tokens**2 / 2)
    waited_s = computing_s(flops, CARD.float16_tflops) + 144 / said.text_tokens_per_s + 144 / said.codec_tokens_per_s
    sounding_s = 3 * LAUNCHING_S + vocoding_s(seven_b, 3 * CHUNK_FRAMES)
    assert said.first_sound_s - said.ttft_s == pytest.approx(waited_s + sounding_s)


@pytest.mark.parametrize(("mode", "times"), [("exact", EVALUATIONS), ("offload", 1)])
def test_layers_of_a_streamed_dit_come_once_in_offload_and_else_at_every_evaluation(
    seven_b: Footprint, mode: SpeechMode, times: int
):
    """In chunks of a minute, which leave it so little room; on a card that computes in no time."""
    turn = replace(CHAT, prompt_tokens=1, text_tokens=1, codes=3000, speech_chunk_codes=3000, speech_mode=mode)
    plan, endless = planned(seven_b, 3, turn), replace(CARD, multiprocessors=10**12, pin_gbit_per_s=1e9)
    streamed_bytes = plan.phases[-1].streamed_layers["dit"] * seven_b.components["dit"][0].n_bytes
    said = expect(plan, seven_b, turn, endless)
    assert said.codec_tokens_per_s is not None and said.real_time_factor is not None
    solving_s = 3000 * (said.real_time_factor / 50 - 1 / said.codec_tokens_per_s)
    assert solving_s == pytest.approx(times * streamed_bytes / 5e9)


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
