from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.errors import OptionError
from lowvram.times import parse_time


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 90.0),
        ("90.5", 90.5),
        ("1e2", 100.0),
        ("1:30", 90.0),
        ("01:30.25", 90.25),
        ("90:00", 5400.0),
        ("1:02:30", 3750.0),
        ("0:00:00.5", 0.5),
    ],
)
def test_a_time_is_read_as_players_show_it(time: str, seconds: float):
    assert parse_time("start", time) == seconds


@pytest.mark.parametrize(
    "time", ["", "a", "1:60", "1:60:00", "1:2:3:4", "1:", ":30", "1:-30", "-1:30", "1h30", "1:nan", "١:٣٠"]
)
def test_what_is_no_time_is_refused_by_its_name(time: str):
    with pytest.raises(OptionError, match=r"^start is '.*', but must be a time \(seconds, 1:30 or 1:02:30\)$"):
        parse_time("start", time)


@given(st.integers(0, 10**6))
def test_hours_and_minutes_add_up_to_their_seconds(seconds: int):
    hours, rest = divmod(seconds, 3600)
    clock = f"{hours}:{rest // 60:02}:{rest % 60:02}"
    assert parse_time("end", clock) == parse_time("end", str(seconds)) == seconds
