from __future__ import annotations

import itertools
import sys
from types import ModuleType

import numpy as np
import pytest
from sound_card import BLOCK, SoundCard

from lowvram.errors import BackendError
from lowvram.events import AudioChunk, Finished, TextDelta
from lowvram.playback import SpeechPlayed, open_loudspeaker

RATE_HZ = 24_000
FINISHED = Finished("", (), (), 1, "stop", "stop", 0.0, RATE_HZ)


@pytest.fixture
def card() -> SoundCard:
    return SoundCard()


@pytest.fixture
def speech(card: SoundCard) -> SpeechPlayed:
    return SpeechPlayed(card.start, card.tick)


def chunk(samples: np.ndarray) -> AudioChunk:
    return AudioChunk(samples.astype(np.float32), RATE_HZ, 0.0)


def ramp(begin: int, count: int) -> np.ndarray:
    return np.arange(begin, begin + count, dtype=np.float32) + 1


def test_playing_begins_with_the_first_sound_and_not_with_words(card: SoundCard, speech: SpeechPlayed):
    speech.show(TextDelta("a"))
    speech.show(chunk(ramp(0, 0)))
    assert not card.active and not speech.was_played
    speech.show(chunk(ramp(0, 700)))
    assert card.active and speech.was_played


def test_every_sample_is_played_once_and_in_order_whatever_the_sizes(card: SoundCard, speech: SpeechPlayed):
    begin = 0
    for count in (700, 1, 2000, 480, 33):
        speech.show(chunk(ramp(begin, count)))
        begin += count
    speech.show(FINISHED)
    assert np.array_equal(card.sound[:begin], ramp(0, begin)) and not card.sound[begin:].any()


def test_making_never_waits_for_playing(card: SoundCard, speech: SpeechPlayed):
    for _ in range(600):
        speech.show(chunk(np.ones(RATE_HZ)))
    assert card.heard == []


def test_sound_beyond_what_a_talker_can_say_waits_for_playing(card: SoundCard, speech: SpeechPlayed):
    speech.show(chunk(np.ones(700 * RATE_HZ)))
    assert len(card.sound) == 40 * RATE_HZ


def test_where_sound_comes_late_there_is_silence_and_then_the_rest(card: SoundCard, speech: SpeechPlayed):
    speech.show(chunk(ramp(0, BLOCK)))
    for _ in range(3):
        card.tick()
    speech.show(chunk(ramp(BLOCK, BLOCK)))
    speech.show(FINISHED)
    assert [block.any() for block in card.heard] == [True, False, False, True]
    assert np.array_equal(card.heard[-1], ramp(BLOCK, BLOCK))


def test_the_last_event_is_kept_until_all_was_heard_and_the_buffer_may_end(card: SoundCard, speech: SpeechPlayed):
    speech.show(chunk(ramp(0, 10 * BLOCK)))
    speech.show(FINISHED)
    assert len(card.heard) == 10
    speech.close()
    assert card.calls == ["stop", "close"]


def test_hushed_speech_is_silent_from_the_next_block_on_and_takes_no_more(card: SoundCard, speech: SpeechPlayed):
    speech.show(chunk(ramp(0, 10 * BLOCK)))
    card.tick()
    speech.hush()
    card.tick()
    speech.show(chunk(ramp(0, 10 * BLOCK)))
    speech.show(FINISHED)
    speech.close()
    assert [block.any() for block in card.heard] == [True, False]
    assert card.calls == ["abort", "close"]


def test_hushing_while_the_rest_is_heard_ends_the_wait(card: SoundCard):
    def tick_then_hush(seconds: float) -> None:
        card.tick(seconds)
        speech.hush()

    speech = SpeechPlayed(card.start, tick_then_hush)
    speech.show(chunk(ramp(0, 1000 * BLOCK)))
    speech.show(FINISHED)
    assert len(card.heard) == 1


def test_an_answer_that_broke_off_is_not_heard_to_its_end(card: SoundCard, speech: SpeechPlayed):
    speech.show(chunk(ramp(0, 10 * BLOCK)))
    speech.close()
    assert card.calls == ["abort", "close"]


def test_a_loudspeaker_that_goes_is_a_failure_for_afterwards(card: SoundCard, speech: SpeechPlayed):
    card.breaks_after_blocks = 2
    speech.show(chunk(np.ones(RATE_HZ)))
    speech.show(FINISHED)
    assert "stopped with 0.96 s of speech left" in str(speech.failure) and card.waits == 3


def test_a_loudspeaker_that_only_seems_to_play_is_given_up_after_5_s_whatever_is_left(card: SoundCard):
    waits: list[float] = []
    speech = SpeechPlayed(card.start, waits.append)
    speech.show(chunk(np.ones(600 * RATE_HZ)))
    speech.show(FINISHED)
    assert isinstance(speech.failure, BackendError)
    assert sum(waits) == pytest.approx(5.0, abs=0.05)


def test_a_loudspeaker_that_plays_at_a_quarter_of_its_rate_is_heard_out(card: SoundCard):
    waits = itertools.count()
    speech = SpeechPlayed(card.start, lambda seconds: None if next(waits) % 4 else card.tick())
    speech.show(chunk(ramp(0, 400 * BLOCK)))
    speech.show(FINISHED)
    assert speech.failure is None and np.array_equal(card.sound, ramp(0, 400 * BLOCK))


def test_without_a_sound_there_is_nothing_to_close(card: SoundCard, speech: SpeechPlayed):
    speech.show(FINISHED)
    speech.close()
    assert card.calls == []


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(BackendError, match=r"sounddevice is not installed \(pip install 'lowvram\[play\]'\)"):
        open_loudspeaker()


def test_a_machine_without_a_sound_device_is_told_so(monkeypatch: pytest.MonkeyPatch):
    package = ModuleType("sounddevice")
    package.PortAudioError = type("PortAudioError", (Exception,), {})  # type: ignore[attr-defined]

    def check_output_settings(**_: object) -> None:
        raise package.PortAudioError("Error querying device -1")

    package.check_output_settings = check_output_settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", package)
    with pytest.raises(BackendError, match=r"no output at 24,000 Hz: Error querying device -1 \(connect or choose"):
        open_loudspeaker()
