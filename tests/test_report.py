from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lowvram.chart import (
    Scale,
    Step,
    area_path,
    axis_ticks,
    chart,
    describe,
    scale_bytes,
    share_width,
    split_by_phase,
)
from lowvram.errors import OptionError
from lowvram.offload.budget import GIB, MIB
from lowvram.offload.placement import Phase, Placement, Plan
from lowvram.offload.profile import KINDS, TRACED, MemoryProfile, Moment
from lowvram.profile_file import ProfileFile, read_profile, write_profile
from lowvram.report import page, where_weights_are

HEAR = Phase("hear+see", ("audio_tower", "visual"), {"visual": Placement.PHASE}, GIB, 0, MIB, GIB)
THINK = Phase(
    "think",
    ("thinker",),
    {"thinker": Placement.STREAMED, "lm_head": Placement.RESIDENT},
    2 * GIB,
    GIB,
    MIB,
    GIB,
    kept_layers={"thinker": 12},
    streamed_layers={"thinker": 16},
)
PLAN = Plan("cuda", 4 * GIB, (HEAR, THINK), 900, 64, 0, 512, 64, 1, slack_bytes=GIB // 2)
TIMELINE = (
    Moment("load", "hear+see", GIB, 0, 0),
    Moment("see", "hear+see", GIB, 0, MIB),
    Moment("load", "think", 2 * GIB, 0, 0),
    Moment("prefill", "think", 2 * GIB, GIB, MIB),
    Moment("text", "think", 2 * GIB, GIB, 0),
)
PEAKS = {"hear+see": GIB + MIB, "think": 3 * GIB}
CARD = {"device": "a card", "conditions": {"model": "demo", "clip": "clip.mp4"}}


@pytest.fixture
def traced() -> ProfileFile:
    """A traced answer of two phases."""
    return ProfileFile(PLAN, MemoryProfile.of(PLAN).add(TRACED, PEAKS, TIMELINE), CARD)


@pytest.fixture
def planned() -> ProfileFile:
    """A plan that nothing was counted for."""
    return ProfileFile(PLAN, MemoryProfile.of(PLAN), CARD)


def named(recorded: ProfileFile, clip: str) -> ProfileFile:
    return replace(recorded, card={"conditions": {"clip": clip}})


def test_a_kept_profile_comes_back_as_it_was(traced: ProfileFile, tmp_path: Path):
    write_profile(tmp_path / "new" / "profile.json", traced)
    assert read_profile(tmp_path / "new" / "profile.json") == traced


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "another"}', "[" * 100_000, '"\\ud800"'])
def test_a_foreign_file_is_refused_by_its_name(text: str, tmp_path: Path):
    foreign = tmp_path / "foreign.json"
    foreign.write_text(text, encoding="utf-8")
    with pytest.raises(OptionError, match=r"foreign\.json"):
        read_profile(foreign)


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path: Path):
    (tmp_path / "sound.wav").write_bytes(b"RIFF\xff\xfe\x80")
    for name in ("missing.json", "sound.wav"):
        with pytest.raises(OptionError, match=re.escape(name)):
            read_profile(tmp_path / name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plan", {}),
        ("peak_bytes", {"guessed": {"think": 1}}),
        ("peak_bytes", {TRACED: {"think": -1}}),
        ("peak_bytes", {TRACED: {"think": True}}),
        ("timeline", [{"label": "see"}]),
        ("timeline", [{"label": "see", "phase": "", "weights_bytes": 1.5, "kv_bytes": 0, "activation_bytes": 0}]),
        ("card", {"device": ["a", "list"]}),
        ("card", None),
    ],
)
def test_a_damaged_profile_is_refused(traced: ProfileFile, field: str, value: Any):
    with pytest.raises(OptionError, match=r"damaged|not a plan"):
        ProfileFile.from_json(json.loads(json.dumps(traced.to_json())) | {field: value})


def test_every_moment_is_shown_in_its_phase():
    shares = [(phase.name, [moment.label for moment in moments]) for phase, moments in split_by_phase(PLAN, TIMELINE)]
    assert shares == [("hear+see", ["load", "see"]), ("think", ["load", "prefill", "text"])]


def test_phases_of_a_plan_that_came_in_between_count_to_the_one_before():
    moments = [Moment("text", phase, 1, 0, 0) for phase in ("early", "hear+see", "see", "see", "think", "talk")]
    shares = split_by_phase(PLAN, moments)
    assert [(phase.name, len(moments)) for phase, moments in shares] == [("hear+see", 4), ("think", 2)]


def test_weights_that_come_ahead_are_drawn_as_planned():
    ahead = replace(PLAN, phases=(replace(HEAR, prefetch_bytes=7), THINK))
    assert split_by_phase(ahead, ())[0][1][0].total_bytes == ahead.phases[0].peak_bytes


def test_stairs_go_up_one_side_and_down_the_other():
    steps = [Step(TIMELINE[0], 0, 10), Step(TIMELINE[1], 10, 20)]
    assert area_path(steps, [9, 9], [5, 2]) == "M0.0 9.0V5.0H10.0V2.0H20.0V9.0H10.0V9.0H0.0Z"


@example([1] * 6, 200.0)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.floats(1, 200))
def test_widths_fill_the_picture_and_leave_room_for_every_name(steps: list[int], least_px: float):
    widths = share_width(steps, [least_px] * len(steps), 1000.0)
    assert sum(widths) == pytest.approx(1000)
    assert min(widths) >= min(least_px, 1000 / len(steps)) - 1e-6


@given(st.integers(MIB, 2**50))
def test_ticks_are_few_and_even_and_reach_the_top(most_bytes: int):
    ticks = axis_ticks(most_bytes)
    assert ticks[0] == 0 and 3 <= len(ticks) <= 8
    assert max(high - low for low, high in pairwise(ticks)) - ticks[1] <= 1
    assert ticks[-1] <= most_bytes + 1 and most_bytes < ticks[-1] + ticks[1] + 1


def test_the_scale_reaches_the_budget_unless_that_is_far_above(traced: ProfileFile):
    assert scale_bytes(traced) == 4 * GIB
    far = replace(traced, plan=replace(PLAN, budget_bytes=100 * GIB))
    assert scale_bytes(far) == PLAN.peak_bytes
    assert "budget 100.00 GiB, reserve 512.0 MiB, above this picture" in chart(
        far, scale_bytes(far), key="k", width_px=800
    )


def test_budget_and_planned_peak_are_drawn_where_they_belong(traced: ProfileFile):
    drawn = chart(traced, 4 * GIB, key="k", width_px=800)
    y = Scale(4 * GIB * 1.08, 390, 58)
    assert f'class="budget" d="M46 {y(4 * GIB):.1f}H796"' in drawn
    assert f"V{y(THINK.peak_bytes):.1f}H796.0" in drawn


def test_the_picture_is_told_in_words_for_those_who_cannot_see_it(traced: ProfileFile):
    assert "think: traced 3.00 GiB, planned 3.00 GiB" in describe(traced)
    drawn = ElementTree.fromstring(chart(traced, 4 * GIB, key="k", width_px=800))
    assert drawn.get("role") == "img" and [child.tag for child in drawn][:2] == ["title", "desc"]


def test_without_a_timeline_the_plan_is_drawn_and_said_to_be_that(planned: ProfileFile):
    assert "the areas are the plan’s" in page(planned)
    assert "steps of the answer" not in page(planned)


def test_placements_are_told_in_words():
    assert where_weights_are(THINK) == (
        "stays on the device: lm_head; streamed layer by layer: thinker (12 of 28 layers stay)"
    )


def test_each_kind_of_figure_has_a_column_and_a_meaning_of_its_own(traced: ProfileFile):
    told = page(traced)
    assert re.findall(r'<th scope="col">(.*?)</th>', told)[:3] == ["phase", "planned", "traced"]
    assert [kind for kind in KINDS if f"<dt>{kind}</dt>" in told] == ["planned", "traced"]


def test_what_comes_from_outside_is_escaped(traced: ProfileFile):
    evil = '"><script>alert(1)</script>.mp4'
    phases = (replace(HEAR, name=evil), replace(THINK, placements={evil: Placement.PHASE}))
    plan = replace(PLAN, device=evil, phases=phases)
    profile = MemoryProfile.of(plan).add(TRACED, {evil: 1, "think": 2}, (replace(TIMELINE[0], label=evil),))
    told = page(ProfileFile(plan, profile, {evil: evil, "conditions": {evil: evil, "clip": evil}}))
    assert "<script" not in told and "&lt;script&gt;" in told


def test_a_page_needs_neither_script_nor_network(traced: ProfileFile):
    assert not re.search(r"<script|<link|https?:|@import|src=|url\((?!#)", page(traced))


def test_two_profiles_share_a_scale_and_no_id(traced: ProfileFile, planned: ProfileFile):
    tall = replace(planned, plan=replace(PLAN, budget_bytes=8 * GIB))
    told = page(named(traced, "one.mp4"), named(tall, "two.mp4"))
    ids = re.findall(r' id="(.*?)"', told)
    assert len(ids) == len(set(ids))
    assert told.count(">8 GiB</text>") == 4 and "one.mp4" in told and "two.mp4" in told
