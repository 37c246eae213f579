"""Prices: what each way to run a stage costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from turns import CHAT, MINUTE, clip

from lowvram.offload.activations import Decoding
from lowvram.offload.footprint import BlockSize, Footprint
from lowvram.offload.prices import Prices, Turn, holdings_of
from lowvram.options import Limits


def blocks(*sizes: int) -> tuple[BlockSize, ...]:
    return tuple(BlockSize(str(i), size) for i, size in enumerate(sizes))


def test_ways_to_hold_a_component_begin_with_all_of_it_and_stream_more_as_they_hold_less():
    found = [(h.kept_layers, h.held_bytes, h.streamed_bytes) for h in holdings_of(blocks(10, 10, 10, 10, 10, 3))]
    assert found == [(5, 53, 0), (2, 43, 30), (1, 33, 40), (0, 23, 50)]


@pytest.mark.parametrize("sizes", [(3,), (10, 3), (10, 10, 3)])
def test_no_way_streams_where_two_slots_would_hold_it_all(sizes: tuple[int, ...]):
    assert [holding.is_whole for holding in holdings_of(blocks(*sizes))] == [True]


def test_slots_are_as_large_as_the_largest_layer_that_passes_through_them():
    least = holdings_of(blocks(40, 10, 10, 20, 10, 1))[-1]  # the first layer, the largest, stays: slots of 20 will do
    assert (least.kept_layers, least.held_bytes, least.streamed_bytes) == (1, 40 + 1 + 2 * 20, 50)


def test_a_run_of_frames_is_charged_in_whole_temporal_patches():
    turn = clip(10, grid=(16, 32))  # 512 patches
    assert [turn.patches_at_once(chunk) for chunk in (4096, 1300, 512, 100)] == [4096, 1024, 512, 512]


def test_a_chunk_larger_than_the_largest_visual_is_charged_as_that():
    assert clip(3, grid=(16, 32)).patches_at_once(4096) == 3 * 512
    two = Turn(100, 1, grids=((3, 16, 16), (1, 16, 32)))
    assert two.patches_at_once(4096) == 3 * 256


def test_frames_seen_together_are_one_pass():
    assert [clip(10, grid=(16, 32)).vision_runs(chunk) for chunk in (4096, 1300, 512, 100)] == [2, 5, 10, 10]


def test_chunks_halve_down_to_where_little_is_left_to_gain(seven_b: Footprint):
    prices = Prices(seven_b, Limits(), clip(60, grid=(16, 16)))
    assert prices.chunks("thinker") == (1024, 512, 256, 128)
    assert prices.chunks("visual") == (4096, 2048, 1024, 512)
    assert prices.chunks("audio_tower") == (8, 4, 2, 1)


def test_chunks_larger_than_the_work_are_not_told_apart(seven_b: Footprint):
    prices = Prices(seven_b, Limits(), replace(CHAT, prompt_tokens=300))
    assert prices.chunks("thinker") == (1024, 256, 128)


def test_a_vision_chunk_may_be_less_than_a_temporal_patch(seven_b: Footprint):
    assert Prices(seven_b, Limits(), MINUTE).chunks("visual") == (4096, 2048, 1024, 512)


def test_a_chunk_computes_with_no_more_than_there_is_and_what_is_longer_takes_no_more_than_a_chunk(seven_b: Footprint):
    def computing_bytes(stage: str, chunk: int, n: int) -> int:
        return Prices(seven_b, Limits(), Turn(n, 1, audio_windows=n)).activation_bytes(stage, chunk)

    assert computing_bytes("audio_tower", 8, 2) < computing_bytes("audio_tower", 8, 8)
    assert computing_bytes("audio_tower", 8, 8) == computing_bytes("audio_tower", 8, 100)
    assert computing_bytes("thinker", 2048, 1024) < computing_bytes("thinker", 2048, 2048)
    assert computing_bytes("thinker", 2048, 2048) == computing_bytes("thinker", 2048, 9000)


def test_a_silent_turn_only_thinks_and_a_single_code_takes_all_that_speaking_takes():
    assert Turn(100, 1).stages == ("thinker",)
    assert Turn(100, 1, codes=1).stages == ("conditioning", "thinker", "talker", "token2wav")


def test_what_is_read_once_is_held_whole_or_as_little_as_can_be(seven_b: Footprint):
    look = Turn(100, 1, grids=((1, 16, 16),))
    assert len(Prices(seven_b, Limits(), look).ways("visual", 1024)) == 2


def test_what_stages_remember_stays_while_others_compute(seven_b: Footprint):
    prices = Prices(seven_b, Limits(), MINUTE)
    assert seven_b.talker is not None and seven_b.sound is not None
    kept = seven_b.talker.state_bytes(2) + seven_b.sound.state_bytes(Decoding())
    assert prices.state_bytes(("talker", "token2wav")) == kept
    assert prices.state_bytes(("audio_tower", "visual")) == 0


def test_what_has_begun_remembers_on_the_device_until_all_of_it_is_over(seven_b: Footprint):
    prices = Prices(seven_b, Limits(), MINUTE)
    waiting = replace(prices, begun=frozenset({"thinker", "talker"}))
    assert waiting.state_bytes(("thinker",)) == prices.state_bytes(("thinker", "talker"))
    assert waiting.state_bytes(("talker", "token2wav")) == prices.state_bytes(("thinker", "talker", "token2wav"))
    assert waiting.state_bytes(("token2wav",)) == prices.state_bytes(("token2wav",))


def test_caches_of_what_has_begun_wait_on_the_host_if_that_is_another_place(seven_b: Footprint):
    prices = Prices(seven_b, Limits(), MINUTE, begun=frozenset({"thinker", "talker"}))
    for waiting, stages in (("talker", ("thinker",)), ("thinker", ("talker", "token2wav"))):
        assert prices.waiting_kv_bytes(stages) == prices.kv_bytes(waiting)
        assert prices.kept_kv_bytes(stages) == 0
        assert replace(prices, host_is_device=True).kept_kv_bytes(stages) == prices.kv_bytes(waiting)
