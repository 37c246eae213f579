from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lowvram.answering import raise_failure, sounds_for, words_to
from lowvram.errors import LowVRAMError, OptionError
from lowvram.flags import Voice
from lowvram.listeners import Speech, SpeechFile


def test_speech_without_a_place_goes_to_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("reply.wav").touch()
    (sound,) = sounds_for(Voice())
    assert isinstance(sound, SpeechFile) and sound.written_to is None
    assert [file.name for file in tmp_path.iterdir()] == ["reply.wav"]  # until there is sound


def test_a_place_that_cannot_be_written_is_refused_before_there_is_any_sound():
    with pytest.raises(OptionError, match="the folder nowhere"):
        sounds_for(Voice(output="nowhere/reply.wav"))


def test_words_make_way_for_raw_sound_only():
    assert (words_to("-"), words_to("said.wav"), words_to(None)) == (sys.stderr, sys.stdout, sys.stdout)


def test_sound_that_failed_is_told_in_the_end():
    lost = Speech()
    raise_failure([Speech(), lost])
    lost.failure = LowVRAMError("no space left")
    with pytest.raises(LowVRAMError, match="no space left"):
        raise_failure([Speech(), lost])
