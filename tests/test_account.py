"""What is told of an answer: in order, once, at the times of a scripted clock, and its sum."""

from __future__ import annotations

import numpy as np
import pytest

from lowvram.account import Account
from lowvram.events import AudioChunk, Finished, Progress, TextDelta

SECOND = 24_000


class Clock:
    """Stands still until it is told the time."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def account(clock: Clock) -> Account:
    account = Account(100.0, clock)
    account.mark("talk")
    return account


def sound_of(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SECOND), np.float32)


def sum_of(account: Account, *, speaks: bool = True) -> Finished:
    return account.finished(prompt_tokens=7, recalled_tokens=3, speaks=speaks, memory={"kind": "none"})


def test_what_was_taken_is_told_once_and_in_order(account: Account) -> None:
    account.show("one")
    account.show("two")
    assert list(account.take()) == [TextDelta("one"), TextDelta("two")]
    assert list(account.take()) == []


def test_what_comes_while_others_are_taken_is_told_too(account: Account) -> None:
    account.show("one")
    taken = account.take()
    assert next(taken) == TextDelta("one")
    account.show("two")
    assert list(taken) == [TextDelta("two")]


def test_no_text_is_no_event_and_no_first_word(account: Account) -> None:
    account.show("")
    assert list(account.take()) == []
    assert "ttft" not in sum_of(account).timings


def test_the_first_word_counts_and_no_later_one(account: Account, clock: Clock) -> None:
    for clock.now_s in (101.5, 104.0):
        account.show("word")
    assert sum_of(account).timings["ttft"] == 1.5


def test_the_first_sound_counts_and_speech_lasts_until_the_last(account: Account, clock: Clock) -> None:
    for clock.now_s in (101.5, 104.0):
        account.sound(sound_of(0.5))
    timings = sum_of(account).timings
    assert (timings["audio_ttfp"], timings["speech"]) == (1.5, 4.0)


def test_pieces_of_sound_say_when_they_begin_and_the_last_is_empty(account: Account) -> None:
    account.sound(sound_of(0.5))
    account.sound(sound_of(0.25))
    account.end_sound()
    chunks = [event for event in account.take() if isinstance(event, AudioChunk)]
    assert [(chunk.start_s, len(chunk.samples), chunk.is_last) for chunk in chunks] == [
        (0.0, SECOND // 2, False),
        (0.5, SECOND // 4, False),
        (0.75, 0, True),
    ]


def test_codes_that_nobody_hears_yet_are_told_of_each_second(account: Account) -> None:
    for code in range(100):
        account.say(code, is_heard=False)
    assert list(account.take()) == [Progress("talk", 50, None, "codes"), Progress("talk", 100, None, "codes")]


def test_codes_that_sound_at_once_speak_for_themselves(account: Account) -> None:
    for code in range(100):
        account.say(code, is_heard=True)
    assert list(account.take()) == []


def test_times_spent_on_one_thing_add_up(account: Account, clock: Clock) -> None:
    for seconds in (2.0, 3.0):
        with account.timed("load"):
            clock.now_s += seconds
        clock.now_s += 10
    assert sum_of(account).timings["load"] == 5.0


def test_time_spent_in_vain_counts(account: Account, clock: Clock) -> None:
    with pytest.raises(KeyError), account.timed("load"):
        clock.now_s += 2
        raise KeyError
    assert sum_of(account).timings["load"] == 2.0


def test_a_text_token_may_go_before_sound_while_over_a_second_is_still_to_be_heard(
    account: Account, clock: Clock
) -> None:
    assert not account.can_spare_time
    account.sound(sound_of(2.0))
    assert account.can_spare_time
    clock.now_s += 1.0
    assert not account.can_spare_time


def test_silence_between_first_and_last_sound_is_underrun(account: Account, clock: Clock) -> None:
    account.sound(sound_of(1.0))
    clock.now_s += 1.75
    account.sound(sound_of(1.0))
    assert sum_of(account).audio_underrun_s == 0.75


def test_the_real_time_factor_is_of_the_time_since_the_talker_began(account: Account, clock: Clock) -> None:
    clock.now_s += 5
    account.mark("talk")
    clock.now_s += 3
    account.sound(sound_of(2.0))
    assert sum_of(account).audio_rtf == 1.5


def test_an_answer_without_sound_has_no_real_time_factor(account: Account) -> None:
    account.end_sound()
    assert sum_of(account).audio_rtf is None


@pytest.mark.parametrize(("ends", "spoken"), [(True, "length"), (False, "cancelled")])
def test_speech_is_cancelled_until_all_of_it_has_sounded(account: Account, ends: bool, spoken: str) -> None:
    account.codes_end = "length"
    account.sound(sound_of(1.0))
    if ends:
        account.end_sound()
    assert sum_of(account).speech_finish_reason == spoken


def test_who_was_not_to_speak_has_no_ending_of_speech(account: Account) -> None:
    assert sum_of(account, speaks=False).speech_finish_reason is None


def test_the_sum_holds_everything_that_was_told(account: Account, clock: Clock) -> None:
    account.show("Hel")
    account.show("lo")
    account.text_ids += [5, 6]
    account.text_ends = "stop"
    account.say(9, is_heard=True)
    account.sound(sound_of(0.5))
    clock.now_s += 4
    finished = sum_of(account)
    assert (finished.text, finished.text_ids, finished.finish_reason) == ("Hello", (5, 6), "stop")
    assert (finished.codec_ids, finished.audio_s) == ((9,), 0.5)
    assert (finished.prompt_tokens, finished.recalled_tokens, finished.memory) == (7, 3, {"kind": "none"})
    assert finished.timings["total"] == 4
