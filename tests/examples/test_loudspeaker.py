from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
from loudspeaker import BLOCK_SAMPLES, RATE_HZ, Played, Saved, heard, places_for_speech

from lowvram import AudioChunk, LowVRAMError


def chunk(begin: int, count: int) -> AudioChunk:
    samples = np.arange(begin, begin + count, dtype=np.float32) / 2**15
    return AudioChunk(samples, RATE_HZ, begin / RATE_HZ)


def test_every_sample_is_played_once_and_in_order_whatever_the_sizes(sound_device):
    with heard(Played(sound_device.loudspeaker.open)) as speech:
        for begin, count in ((0, 3000), (3000, 1), (3001, 0), (3001, BLOCK_SAMPLES)):
            speech.take(chunk(begin, count))
    assert np.array_equal(sound_device.loudspeaker.sound, chunk(0, 3001 + BLOCK_SAMPLES).samples)
    assert sound_device.loudspeaker.calls == ["open 24000 Hz", "close"]


def test_taking_never_waits_for_playing(sound_device):
    plays = threading.Event()
    sound_device.loudspeaker.before_block = plays.wait
    with heard(Played(sound_device.loudspeaker.open)) as speech:
        for _ in range(100):
            speech.take(chunk(0, RATE_HZ))
        assert not sound_device.loudspeaker.blocks
        plays.set()
    assert len(sound_device.loudspeaker.sound) == 100 * RATE_HZ


def test_hushed_speech_ends_with_the_block_that_is_playing(sound_device):
    speech = Played(sound_device.loudspeaker.open)
    sound_device.loudspeaker.before_block = speech.hush
    with heard(speech):
        speech.take(chunk(0, 100 * BLOCK_SAMPLES))
        speech.take(chunk(0, BLOCK_SAMPLES))
    assert len(sound_device.loudspeaker.blocks) == 1


def test_an_error_ends_the_speech_that_it_meets(sound_device):
    has_happened = threading.Event()
    sound_device.loudspeaker.before_block = has_happened.wait
    speech = Played(sound_device.loudspeaker.open)
    with pytest.raises(KeyboardInterrupt), heard(speech):
        speech.take(chunk(0, 100 * BLOCK_SAMPLES))
        raise KeyboardInterrupt
    has_happened.set()
    speech.wait()
    assert len(sound_device.loudspeaker.blocks) <= 1


def test_an_answer_without_sound_opens_neither_loudspeaker_nor_file(sound_device, tmp_path: Path):
    for speech in (Played(sound_device.loudspeaker.open), Saved(tmp_path / "reply.wav")):
        with heard(speech):
            pass
    assert not sound_device.loudspeaker.calls and not list(tmp_path.iterdir())


def test_without_a_package_each_answer_is_a_new_file(no_sound_device, tmp_path: Path):
    (tmp_path / "reply-1.wav").touch()
    places = places_for_speech(tmp_path)
    for begin in (0, 500):
        with heard(next(places)) as speech:
            speech.take(chunk(begin, 200))
            speech.take(chunk(begin + 200, 300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reply-1.wav", "reply-2.wav", "reply-3.wav"]
    samples, rate_hz = soundfile.read(tmp_path / "reply-3.wav", dtype="float32")
    assert rate_hz == RATE_HZ and np.array_equal(samples, chunk(500, 500).samples)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path):
    with (
        pytest.raises(LowVRAMError, match=r"reply-1\.wav cannot be written"),
        heard(Saved(tmp_path / "no/reply-1.wav")) as speech,
    ):
        speech.take(chunk(0, 10))


def test_without_a_device_speech_is_saved(sound_device, tmp_path: Path):
    sound_device.has_output = False
    assert isinstance(next(places_for_speech(tmp_path)), Saved)


def test_with_a_device_speech_is_played(sound_device, tmp_path: Path):
    with heard(next(places_for_speech(tmp_path))) as speech:
        speech.take(chunk(0, 10))
    assert len(sound_device.loudspeaker.sound) == 10
