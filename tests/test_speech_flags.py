from __future__ import annotations

import pytest

from lowvram.errors import OptionError
from lowvram.options import SpeechParams
from lowvram.speech_flags import Sound, Voice


def test_nothing_typed_is_speech_as_it_is_by_default():
    assert Sound().params(Voice()) == SpeechParams() == Sound().params()


def test_without_speech_there_is_none_but_what_is_wrong_is_refused_all_the_same():
    assert Sound(no_speech=True).params() is None
    with pytest.raises(OptionError, match="steps is 1"):
        Sound(no_speech=True, steps=1).params()


@pytest.mark.parametrize(("seconds", "codes"), [(1.0, 50), (0.02, 1), (2.39, 120), (82.0, 4100)])
def test_seconds_of_speech_are_50_codes_each(seconds: float, codes: int):
    assert Sound(max_seconds=seconds).params().sampling.max_tokens == codes


@pytest.mark.parametrize("seconds", [0.0, 0.01, -1.0, float("inf"), float("nan")])
def test_speech_that_is_no_code_long_is_refused(seconds: float):
    with pytest.raises(OptionError, match=r"max_seconds is .* s, but speech lasts at least 0\.02 s"):
        Sound(max_seconds=seconds).params()


@pytest.mark.parametrize(
    ("voice", "named", "mode"),
    [
        (Voice(), None, "exact"),
        (Voice(output="reply.wav"), None, "exact"),
        (Voice(play=True), None, "balanced"),
        (Voice(play=True, output="reply.wav"), None, "exact"),
        (Voice(play=True), "exact", "exact"),
        (Voice(), "low-latency", "low-latency"),
    ],
)
def test_a_mode_is_exact_unless_named_or_only_played(voice: Voice, named: str | None, mode: str):
    assert Sound(speech_mode=named).params(voice).mode == mode
