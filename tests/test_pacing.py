from __future__ import annotations

from collections.abc import Iterator

import pytest

from lowvram.pacing import AHEAD_S, Lookahead, Playback


def test_sound_is_buffered_as_it_comes_and_heard_as_time_passes():
    playback = Playback()
    playback.hear(3.0, now_s=10.0)
    assert playback.buffered_s(11.0) == 2.0
    playback.hear(1.0, now_s=11.0)
    assert playback.buffered_s(12.0) == 2.0


def test_sound_that_comes_late_leaves_silence():
    playback = Playback()
    playback.hear(1.0, now_s=10.0)
    playback.hear(1.0, now_s=11.5)
    playback.hear(1.0, now_s=12.0)
    assert playback.underrun_s == pytest.approx(0.5)
    assert playback.buffered_s(12.0) == pytest.approx(1.5)


def test_waiting_for_the_first_sound_and_after_the_last_is_no_underrun():
    playback = Playback()
    playback.hear(1.0, now_s=100.0)
    assert playback.buffered_s(200.0) == playback.underrun_s == 0.0


@pytest.mark.parametrize(("buffered_s", "spared"), [(0.0, False), (AHEAD_S, False), (AHEAD_S + 0.1, True)])
def test_text_goes_before_sound_only_while_the_listener_is_served(buffered_s: float, spared: bool):
    playback = Playback()
    playback.hear(buffered_s, now_s=0.0)
    assert playback.can_spare(0.0) is spared


def test_items_made_ahead_come_in_order_and_once():
    ahead = Lookahead(iter("abcd"))
    assert next(ahead) == "a"
    assert ahead.make_one() and ahead.make_one()
    assert list(ahead) == ["b", "c", "d"]
    assert not ahead.make_one()


class Kitchen:
    """Makes text, codes and sound by a scripted clock: what each costs, in seconds."""

    def __init__(self, *, token_s: float, code_s: float, tokens: int, codes: int) -> None:
        self.now_s, self.log = 0.0, []
        self.playback = Playback()
        self._costs = token_s, code_s
        self._sizes = tokens, codes

    def run(self) -> None:
        text = Lookahead(self._text())
        next(text)
        for code in range(self._sizes[1]):
            next(text, None)
            self.now_s += self._costs[1]
            if code % 48 == 47:
                self.playback.hear(0.96, self.now_s)
            while self.playback.can_spare(self.now_s) and text.make_one():
                pass

    def _text(self) -> Iterator[int]:
        for token in range(self._sizes[0]):
            self.now_s += self._costs[0]
            self.log.append(self.now_s)
            yield token


def test_where_the_speeds_allow_it_there_is_no_silence():
    kitchen = Kitchen(token_s=0.010, code_s=0.009, tokens=400, codes=600)  # 19 ms a code while text is written
    kitchen.run()
    assert kitchen.playback.underrun_s == 0.0


def test_text_is_not_starved_where_sound_is_fast():
    """Lockstep would end the text with code 400, after 4.8 s."""
    kitchen = Kitchen(token_s=0.010, code_s=0.002, tokens=400, codes=600)
    kitchen.run()
    assert kitchen.log[-1] < 4.6
    assert kitchen.playback.underrun_s == 0.0
