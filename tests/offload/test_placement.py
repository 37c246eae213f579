"""Plans as data: there and back as JSON, and as a table for people."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from test_plan import budgets, properties
from test_plan import turns as any_turns
from turns import MINUTE

from lowvram.errors import InfeasibleBudgetError, OptionError
from lowvram.offload.budget import GIB, MIB, Budget
from lowvram.offload.footprint import Footprint
from lowvram.offload.placement import TABLE_COLUMNS, HostTier, Phase, Placement, Plan, evenly_spaced
from lowvram.offload.plan import Turn, plan_memory
from lowvram.options import Limits


def planned(footprint: Footprint, gib: float, ram_gib: int = 16) -> Plan:
    return plan_memory(footprint, Budget(int(gib * GIB), ram_gib * GIB), Limits(), MINUTE)


@given(st.integers(1, 64).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))))
def test_as_many_layers_stay_as_were_asked_for_and_all_equally_far_apart(case: tuple[int, int]):
    layers, kept = case
    chosen = sorted(evenly_spaced(layers, kept))
    assert len(chosen) == kept and all(0 <= layer < layers for layer in chosen)
    gaps = [after - before for before, after in zip(chosen, [*chosen[1:], layers], strict=True)]
    assert max(gaps) - min(gaps) <= 1


# JSON


@properties
@given(any_turns, budgets, st.one_of(st.none(), st.integers(6 * GIB, 64 * GIB)))
def test_a_plan_survives_json(seven_b: Footprint, turn: Turn, vram_bytes: int, ram_bytes: int | None):
    try:
        plan = plan_memory(seven_b, Budget(vram_bytes, ram_bytes), Limits(), turn)
    except InfeasibleBudgetError:
        reject()
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_json_also_has_the_sums_and_each_components_whereabouts(seven_b: Footprint):
    plan = planned(seven_b, 6)
    fields = json.loads(json.dumps(plan.to_json()))
    assert fields["peak_bytes"] == plan.peak_bytes
    assert fields["traffic_bytes"] == sum(phase["traffic_bytes"] for phase in fields["phases"])
    assert fields["reserve_bytes"] == 512 * MIB
    assert fields["smallest_budget_bytes"] == plan.smallest_budget_bytes
    assert fields["placements"]["thinker"] == {"think": "streamed"}


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"phases": 7},
        {"phases": []},
        {"phases": [{"name": "see"}]},
        {"phases": [{"placements": 1}]},
        {"host_tiers": 3},
        {"prompt_tokens": "many"},
        {"prompt_tokens": None},
        {"budget_bytes": 1.5},
        {"budget_bytes": -1},
        {"codes": True},
        {"device": 7},
        {"kv": "4bit"},
    ],
    ids=str,
)
def test_json_that_is_no_plan_is_refused(seven_b: Footprint, damage: dict[str, Any]):
    fields = planned(seven_b, 8).to_json() | damage if damage else {}
    with pytest.raises(OptionError, match="not a plan"):
        Plan.from_json(fields)


def test_a_placement_that_nobody_knows_is_refused(seven_b: Footprint):
    fields = planned(seven_b, 8).to_json()
    fields["phases"][0]["placements"]["visual"] = "somewhere"
    with pytest.raises(OptionError, match="somewhere"):
        Plan.from_json(fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", None), ("weights_bytes", "2 GiB"), ("kv_bytes", -1), ("kept_layers", {"thinker": "all"})],
)
def test_a_phase_of_numbers_and_words_that_are_none_is_refused(seven_b: Footprint, field: str, value: Any):
    fields = planned(seven_b, 8).to_json()
    fields["phases"][0][field] = value
    with pytest.raises(OptionError, match="not a plan"):
        Plan.from_json(fields)


def test_a_tier_that_nobody_knows_is_refused(seven_b: Footprint):
    fields = planned(seven_b, 8).to_json()
    with pytest.raises(OptionError, match="cloud"):
        Plan.from_json(fields | {"host_tiers": {"thinker.0": "cloud"}})


# The table


THINKING = Phase(
    "think",
    ("thinker",),
    {"thinker": Placement.STREAMED, "lm_head": Placement.PHASE, "bigvgan": Placement.RESIDENT},
    weights_bytes=3 * GIB,
    kv_bytes=5 * GIB // 2,
    activation_bytes=GIB // 8,
    traffic_bytes=10 * GIB,
    kept_layers={"thinker": 12},
    streamed_layers={"thinker": 16},
)
WRITTEN = Plan(
    "cuda", 8 * GIB, (THINKING,), 47_640, 1024, 0, 512, 4096, 8,
    context_bytes=350 * MIB, workspace_bytes=64 * MIB, slack_bytes=98 * MIB,
    ram_bytes=16 * GIB, host_bytes=4 * GIB, host_tiers={"thinker.1": HostTier.PINNED, "lm_head": HostTier.PAGEABLE},
)  # fmt: skip


def test_a_plan_prints_as_a_table_for_people():
    assert str(WRITTEN).splitlines() == [
        "phase  weights       KV   activ.     peak  GiB; where weights are",
        "think     3.00     2.50     0.12     5.62  thinker streamed, 12 of 28 layers stay",
        " " * 43 + "for the phase lm_head",
        " " * 43 + "resident bigvgan",
        "peak 6.12 GiB of 8.00 GiB on cuda, of it 350 MiB context, 64 workspace, 98 slack",
        "weights moved per turn: 10.00 GiB; prefill in chunks of 512 tokens; KV cache in the compute dtype",
        "host 4.00 GiB of 16.00 GiB, blocks of weights there: 1 pinned and 1 pageable",
    ]


def test_a_plan_within_no_limits_says_so():
    peak, _, host = str(replace(WRITTEN, budget_bytes=None, ram_bytes=None, host_tiers={})).splitlines()[-3:]
    assert peak.startswith("peak 6.12 GiB no limit on cuda")
    assert host == "host 4.00 GiB no limit"


def test_no_line_of_the_table_is_wider_than_a_terminal():
    everywhere = dict.fromkeys(("audio_tower", "visual", "talker", "dit"), Placement.RESIDENT)
    phase = replace(THINKING, name="hear+see+think+talk+sound", placements={**THINKING.placements, **everywhere})
    lines = str(replace(WRITTEN, phases=(phase,))).splitlines()
    assert max(map(len, lines)) <= TABLE_COLUMNS
    assert lines[3].strip() == "resident bigvgan, audio_tower, visual, talker, dit"


def test_where_nothing_ever_leaves_the_table_says_it_in_two_words(seven_b: Footprint):
    assert str(planned(seven_b, 24)).splitlines()[1].endswith("  all resident")
