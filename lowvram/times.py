"""Places in a clip as people read them off a player, to seconds: "90", "90.5", "1:30", "1:02:30"."""

from __future__ import annotations

import re

from .errors import OptionError

_ON_A_CLOCK = re.compile(r"(?:(?P<hours>\d{1,9}):)?(?P<minutes>\d{1,9}):(?P<seconds>[0-5]?\d(?:\.\d*)?)", re.ASCII)


def parse_time(name: str, time: str) -> float:
    """Seconds of `time`: a number of them, or minutes or hours and minutes before them.

    Raises OptionError, which begins with `name`, for anything else, and for 60 minutes after hours.
    """
    clock = _ON_A_CLOCK.fullmatch(time)
    if clock and not (clock["hours"] and int(clock["minutes"]) > 59):
        return 3600 * int(clock["hours"] or 0) + 60 * int(clock["minutes"]) + float(clock["seconds"])
    try:
        return float(time)
    except ValueError:
        raise OptionError(f"{name} is {time!r}, but must be a time", hint="seconds, 1:30 or 1:02:30") from None
