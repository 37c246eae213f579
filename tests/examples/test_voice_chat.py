from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from loudspeaker import Played
from media_files import sine
from voice_chat import VoiceChat, main

from lowvram import Finished, LowVRAMError, OmniRuntime


class Asked:
    """What a runtime was asked, and how its answers ended."""

    def __init__(self, omni: OmniRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: list[list[dict[str, Any]]] = []
        self.finished: list[Finished] = []
        self._generate = omni.generate
        monkeypatch.setattr(omni, "generate", self.generate)

    def generate(self, messages: list[dict[str, Any]], **options: Any) -> Iterator[Any]:
        self.messages.append(messages)
        return self._watched(self._generate(messages, **options))

    def _watched(self, events: Iterator[Any]) -> Iterator[Any]:
        for event in events:
            if isinstance(event, Finished):
                self.finished.append(event)
            yield event


@pytest.fixture
def asked(omni: OmniRuntime, monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(omni, monkeypatch)


def chat_with(omni: OmniRuntime, sound_device: Any, max_tokens: int = 3) -> VoiceChat:
    places = iter(lambda: Played(sound_device.loudspeaker.open), None)
    return VoiceChat(omni, places, max_tokens)


def test_an_answer_is_written_and_heard_to_its_end(omni, asked: Asked, sound_device, question: Path, capsys):
    chat_with(omni, sound_device).answer(question)
    (finished,) = asked.finished
    assert capsys.readouterr().out == finished.text + "\n" and finished.text
    assert len(sound_device.loudspeaker.sound) == round(finished.audio_s * finished.sample_rate_hz) > 0


def test_the_next_turn_is_asked_with_what_was_said_before(omni, asked: Asked, sound_device, question: Path):
    chat = chat_with(omni, sound_device)
    chat.answer(question)
    chat.answer(sine(16_000, 0.3))
    first, reply, second = asked.messages[1]
    assert (first["content"], second["role"]) == ([{"type": "audio", "audio": question}], "user")
    assert reply == {"role": "assistant", "content": asked.finished[0].text}


def test_an_interruption_ends_the_answer_and_its_sound(omni, asked: Asked, sound_device, question: Path):
    chat = chat_with(omni, sound_device, max_tokens=2000)
    sound_device.loudspeaker.before_block = chat.interrupt
    chat.answer(question)
    assert len(sound_device.loudspeaker.blocks) == 1
    assert asked.finished[0].finish_reason == "cancelled" or asked.finished[0].speech_finish_reason == "cancelled"


def test_an_interrupted_answer_is_remembered_as_far_as_it_was_written(omni, asked, sound_device, question: Path):
    chat = chat_with(omni, sound_device, max_tokens=2000)
    sound_device.loudspeaker.before_block = chat.interrupt
    chat.answer(question)
    chat.answer(question)
    assert asked.messages[1][1] == {"role": "assistant", "content": asked.finished[0].text}


def test_a_turn_that_failed_is_forgotten(omni, asked: Asked, sound_device, question: Path, tmp_path: Path):
    chat = chat_with(omni, sound_device)
    with pytest.raises(LowVRAMError):
        chat.answer(tmp_path / "nowhere.wav")
    chat.answer(question)
    assert len(asked.messages[1]) == 1


def test_sound_files_are_turns_and_without_a_sound_device_answers_are_files(
    demo: Path, no_sound_device, question: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([str(question), str(question), "--model", str(demo), "--max-tokens", "2"]) == 0
    assert soundfile.info("reply-1.wav").frames > 0 and soundfile.info("reply-2.wav").frames > 0


def test_a_sound_that_cannot_be_read_is_told_and_the_next_is_answered(
    demo: Path, sound_device, question: Path, tmp_path: Path, capsys
):
    broken = tmp_path / "broken.wav"
    broken.write_text("I am no sound")
    assert main([str(broken), str(question), "--model", str(demo), "--max-tokens", "2"]) == 5
    told = capsys.readouterr()
    assert "broken.wav" in told.err and told.out.strip() and sound_device.loudspeaker.blocks


def test_without_microphone_and_sound_files_there_is_a_way_out_before_a_model_is_opened(no_sound_device, capsys):
    assert main(["--model", "nowhere"]) == 1
    assert "pip install 'lowvram[play]'" in capsys.readouterr().err
