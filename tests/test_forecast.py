from __future__ import annotations

import pytest

from lowvram.errors import InfeasibleBudgetError
from lowvram.forecast import forecast, refusal_record
from lowvram.offload.budget import GIB, MIB, Budget
from lowvram.offload.cards import find_card
from lowvram.offload.plan import Plan
from lowvram.options import Limits, SpeechParams
from lowvram.planning import find_headers, plan_without_loading
from lowvram.workload import StandIn, count_turn

HEADERS = find_headers("Qwen/Qwen2.5-Omni-7B-AWQ")
WORK = count_turn(HEADERS, stand_ins=[StandIn("video", 15)], speech=SpeechParams())
CARD = find_card("rtx-3080-10gb")


def test_without_a_card_a_forecast_is_the_plan_and_expects_nothing():
    found = forecast(HEADERS, WORK, Budget(8 * GIB), Limits())
    assert found.plan == plan_without_loading(HEADERS, WORK.turn, Budget(8 * GIB), Limits())
    assert found.expectations is None and "expected" not in str(found)


def test_a_card_lends_the_budget_that_is_not_named():
    free, named = (forecast(HEADERS, WORK, budget, Limits(), card=CARD).plan for budget in (Budget(), Budget(8 * GIB)))
    assert (free.budget_bytes, named.budget_bytes) == (CARD.usable_bytes, 8 * GIB)


def test_expectations_are_of_the_dtype_that_is_planned_for():
    half, full = (
        forecast(HEADERS, WORK, Budget(24 * GIB, 64 * GIB), Limits(), card=CARD, dtype=dtype).expectations
        for dtype in ("auto", "float32")
    )
    assert full.text_tokens_per_s < half.text_tokens_per_s


def test_a_record_reads_back_as_the_plan():
    found = forecast(HEADERS, WORK, Budget(), Limits(), card=CARD)
    record = found.to_json()
    assert Plan.from_json(record) == found.plan
    assert record["fits"] and record["expectations"]["kind"] == "expected"


def test_the_smallest_budget_that_people_are_told_works_and_less_does_not():
    told = str(forecast(HEADERS, WORK, Budget(), Limits()))
    smallest_mib = int(told.rsplit("smallest budget for this turn: ")[1].split()[0])
    forecast(HEADERS, WORK, Budget(smallest_mib * MIB), Limits())
    with pytest.raises(InfeasibleBudgetError):
        forecast(HEADERS, WORK, Budget((smallest_mib - 1) * MIB), Limits())


@pytest.mark.parametrize(("budget", "short_of"), [(Budget(GIB, 32 * GIB), "vram"), (Budget(16 * GIB, GIB // 2), "ram")])
def test_a_refusal_tells_what_is_short_and_the_least_of_it(budget: Budget, short_of: str):
    with pytest.raises(InfeasibleBudgetError) as refused:
        forecast(HEADERS, WORK, budget, Limits())
    record = refusal_record(refused.value)
    assert (record["fits"], record["short_of"]) == (False, short_of)
    assert record["smallest_budget_bytes"] > record["budget_bytes"]
    assert " at the least" in record["reason"] and record["reason"] in str(refused.value)
    assert record["hints"][0].startswith("the smallest ") and "; ".join(record["hints"]) == refused.value.hint
