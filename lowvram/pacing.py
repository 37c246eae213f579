"""Who goes next where text, codes and sound share a device: the listener before the reader, while there is one to lose.

Text must be ahead of the codes (code i reads reply row i + 1), so each code pulls the text it needs. Beyond that a text
token costs time that the next sound is waited for in. The rule: text alone until the talker can start; then codes and
sound, until the listener has `AHEAD_S` still to hear; then text, as far as that lasts. It changes when things are made,
never what they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

AHEAD_S = 1.0
"""A listener with this much still to hear does not notice a text token: it is the sound of one chunk, and a token takes
a tenth of a second where decoding is slow."""


class Playback:
    """A listener who begins with the first sound and plays whatever there is, as fast as time passes.

    Times are seconds of one clock, whichever.
    """

    def __init__(self) -> None:
        self._ends_s: float | None = None
        self.underrun_s = 0.0
        """Seconds of silence after the first sound, before the last."""

    def hear(self, seconds: float, now_s: float) -> None:
        """`seconds` of sound arrive at `now_s`."""
        if self._ends_s is None:
            self._ends_s = now_s
        self.underrun_s += max(0.0, now_s - self._ends_s)
        self._ends_s = max(self._ends_s, now_s) + seconds

    def buffered_s(self, now_s: float) -> float:
        """Seconds of sound still to be heard; 0 before the first."""
        return 0.0 if self._ends_s is None else max(0.0, self._ends_s - now_s)

    def can_spare(self, now_s: float) -> bool:
        """Whether a text token may go before the next sound."""
        return self.buffered_s(now_s) > AHEAD_S


class Lookahead(Iterator[T]):
    """Items of a source, some of them made before they are asked for."""

    def __init__(self, source: Iterable[T]) -> None:
        self._source = iter(source)
        self._made: deque[T] = deque()

    def __next__(self) -> T:
        return self._made.popleft() if self._made else next(self._source)

    def make_one(self) -> bool:
        """Make the next item and keep it; False when there is none."""
        for item in self._source:
            self._made.append(item)
            return True
        return False
