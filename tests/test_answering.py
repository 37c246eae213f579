from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from lowvram.answering import Places, answer, raise_failure, sounds_for, words_to
from lowvram.errors import BudgetExceededError, LowVRAMError, OptionError
from lowvram.events import AudioChunk, Event, Progress, TextDelta
from lowvram.listeners import JsonReply, Listener, NdjsonReply, Reply, Speech, SpeechFile
from lowvram.options import SpeechParams
from lowvram.speech_flags import Voice


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


def events_until_the_device_is_full() -> Iterator[Event]:
    yield Progress("load", 1, 1)
    yield TextDelta("so ")
    yield TextDelta("far")
    yield AudioChunk(np.zeros(12_000, np.float32), 24_000, 0.0)
    raise BudgetExceededError("the device is full", hint="name less")


@pytest.mark.parametrize("kind", [JsonReply, NdjsonReply])
def test_an_answer_that_breaks_off_is_told_as_far_as_it_came(tmp_path: Path, kind: type[Reply]):
    runtime: Any = SimpleNamespace(device=SimpleNamespace(title="a card"), kernel="k", cancel=lambda: None)
    path, out = tmp_path / "reply.wav", io.StringIO()
    places = Places(Listener(), [SpeechFile(path)], kind(out))
    with pytest.raises(BudgetExceededError):
        answer(runtime, "m", events_until_the_device_is_full(), places, speech=SpeechParams())
    told = cast("dict[str, Any]", json.loads(out.getvalue().splitlines()[-1]))
    assert (told["text"], told["audio"]["path"], told["audio"]["seconds"]) == ("so far", str(path), 0.5)
    assert (told["finish_reason"], told["text_ids"], told["timings"]) == ("error", None, None)
    assert told["error"] == {"message": "the device is full", "hint": "name less", "exit_code": 4}
    assert told.get("event", "finished") == "finished"
