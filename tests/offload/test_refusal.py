"""Refusals: what binds, what would do, and what giving something up saves."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from turns import CHAT, MINUTE, QUARTER, clip

from lowvram.errors import InfeasibleBudgetError
from lowvram.offload.budget import GIB, MIB, Budget, parse_bytes
from lowvram.offload.footprint import Footprint
from lowvram.offload.plan import Turn, plan_memory, smallest_budget_bytes
from lowvram.options import Limits

LIMITS = Limits()


def refused(footprint: Footprint, gib: float, turn: Turn = MINUTE) -> InfeasibleBudgetError:
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan_memory(footprint, Budget(int(gib * GIB)), LIMITS, turn)
    return caught.value


def savings(error: InfeasibleBudgetError) -> dict[str, int]:
    """MiB by what is given up, in the order of the hint."""
    _, *parts = error.hint.split("; ")
    return {what: int(n) for what, n in (re.fullmatch(r"(.+) saves (\d+) MiB", part).groups() for part in parts)}


def test_a_refusal_names_the_phase_and_both_sizes(seven_b: Footprint):
    error = refused(seven_b, 4)
    assert error.phase == "think"
    assert error.available_bytes == 4 * GIB
    assert error.needed_bytes == smallest_budget_bytes(seven_b, LIMITS, MINUTE)


def test_a_refusal_shows_what_the_phase_is_made_of(seven_b: Footprint):
    rows = re.search(
        r"weights (\d+) MiB, KV cache (\d+) MiB, activations (\d+) MiB, reserve (\d+)", str(refused(seven_b, 4))
    )
    assert rows is not None
    weights, kv, activations, reserve = map(int, rows.groups())
    assert (kv, reserve) == (2662, 512)
    total = refused(seven_b, 4).needed_bytes / MIB
    assert total <= weights + kv + activations + reserve <= total + 4  # each is rounded up


def test_the_smallest_budget_in_a_refusal_works_as_written(seven_b: Footprint):
    written = parse_bytes(refused(seven_b, 4).hint.partition(" is ")[2].partition(";")[0])
    assert plan_memory(seven_b, Budget(written), LIMITS, MINUTE).peak_bytes <= written


def test_a_refusal_tells_a_small_budget_as_it_was_given(seven_b: Footprint):
    assert "but the budget is 1000 B" in str(refused(seven_b, 1000 / GIB))


@pytest.mark.parametrize(
    ("what", "lesser"),
    [
        ("--kv int8", replace(MINUTE, kv="int8")),
        ("--max-pixels 301056", clip(60, grid=(48, 32))),
        ("half the --fps", replace(MINUTE, prompt_tokens=47_640 - 30 * 768, grids=((30, 48, 64),))),
        ("--max-tokens 512", replace(MINUTE, text_tokens=512)),
    ],
)
def test_what_giving_something_up_saves_is_what_the_lesser_turn_needs_less(seven_b: Footprint, what: str, lesser: Turn):
    before, after = (smallest_budget_bytes(seven_b, LIMITS, turn) for turn in (MINUTE, lesser))
    assert savings(refused(seven_b, 4))[what] == pytest.approx((before - after) / MIB, abs=1)


def test_a_pixel_bound_in_a_refusal_halves_the_largest_frame(seven_b: Footprint):
    beside_a_thumbnail = replace(MINUTE, grids=((1, 4, 4), *MINUTE.grids))
    assert "--max-pixels 301056" in savings(refused(seven_b, 4, beside_a_thumbnail))
    assert 2 * 301_056 == 48 * 64 * 14 * 14


def test_silence_is_proposed_only_where_it_saves(seven_b: Footprint):
    assert "--no-speech" in savings(refused(seven_b, 1, replace(CHAT, codes=40_000)))
    assert "--no-speech" not in savings(refused(seven_b, 4, MINUTE))


def test_half_precision_is_proposed_where_sound_binds(seven_b: Footprint):
    brief = replace(CHAT, prompt_tokens=1, text_tokens=1, codes=50, speech_chunk_codes=3000)
    assert "--speech-dtype float16" in savings(refused(seven_b, 1, brief))
    assert "--speech-dtype float16" not in savings(refused(seven_b, 1, replace(brief, speech_dtype="float16")))


def test_what_saves_most_is_proposed_first(seven_b: Footprint):
    found = [*savings(refused(seven_b, 4)).items()]
    assert found[0][0] == "--kv int8"
    assert found == sorted(found, key=lambda saving: -saving[1])


def test_at_most_four_things_are_proposed_and_all_of_them_save(seven_b: Footprint):
    for turn in (MINUTE, QUARTER, CHAT):
        found = savings(refused(seven_b, 1, turn))
        assert len(found) <= 4 and all(n > 0 for n in found.values())


def test_pictures_are_proposed_to_shrink_only_where_there_are_any(seven_b: Footprint):
    assert "pixels" not in refused(seven_b, 4, replace(MINUTE, grids=())).hint


def test_a_turn_in_progress_is_told_the_least_it_needs_and_nothing_to_give_up(seven_b: Footprint):
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan_memory(seven_b, Budget(GIB), LIMITS, MINUTE, begun=("talker", "token2wav"))
    assert caught.value.hint.startswith("the smallest budget for this turn is")
    assert "saves" not in caught.value.hint
