"""Profiles keep what was planned apart from what was counted."""

from __future__ import annotations

import json

import pytest

from lowvram.offload.budget import MIB
from lowvram.offload.profile import DEVICE_ALLOCATOR, PLANNED, TRACED, MemoryProfile, Moment


@pytest.fixture
def profile() -> MemoryProfile:
    planned = MemoryProfile({PLANNED: {"see": 300 * MIB, "think": 500 * MIB}})
    return planned.add(DEVICE_ALLOCATOR, {"think": 480 * MIB})


def test_each_kind_has_a_column_under_its_name(profile: MemoryProfile):
    assert str(profile).splitlines() == [
        "phase    planned  device allocator",
        "see    300.0 MiB                 -",
        "think  500.0 MiB         480.0 MiB",
    ]


def test_a_kind_met_again_keeps_the_higher_peak_of_each_phase(profile: MemoryProfile):
    again = profile.add(DEVICE_ALLOCATOR, {"see": 250 * MIB, "think": 470 * MIB})
    assert again.columns[DEVICE_ALLOCATOR] == {"see": 250 * MIB, "think": 480 * MIB}


def test_adding_leaves_the_profile_as_it_was(profile: MemoryProfile):
    profile.add(TRACED, {"see": 1})
    assert TRACED not in profile.columns


def test_an_unnamed_way_of_counting_is_a_mistake_of_ours(profile: MemoryProfile):
    with pytest.raises(AssertionError):
        profile.add("about", {"see": 1})


def test_json_names_every_kind(profile: MemoryProfile):
    assert json.loads(json.dumps(profile.to_json())) == {
        "planned": {"see": 300 * MIB, "think": 500 * MIB},
        "device allocator": {"think": 480 * MIB},
    }


def test_a_profile_has_the_timeline_of_what_was_counted_last(profile: MemoryProfile):
    moments = (Moment("prefill", "think", weights_bytes=100, kv_bytes=20, activation_bytes=3),)
    traced = profile.add(TRACED, {"see": 1}, moments)
    assert profile.timeline == ()
    assert traced.add(DEVICE_ALLOCATOR, {"see": 2}).timeline == moments
    assert moments[0].total_bytes == 123
