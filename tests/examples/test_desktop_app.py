"""The window itself, where there is a display; what needs none is in `test_model_thread.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loudspeaker import Played, Saved
from model_thread import ModelThread

from lowvram import SamplingParams, SpeechParams

SAMPLING = SamplingParams(max_tokens=300, temperature=2.0, seed=1)
SPEECH = SpeechParams(sampling=replace(SpeechParams().sampling, max_tokens=12, seed=1), steps=2)
PATIENCE_S = 60


class Person:
    """Somebody before a window: clicks, waits and reads."""

    def __init__(self, root: Any, window: Any) -> None:
        self.root, self.window = root, window

    def wait_until(self, happened: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < deadline_s, self.text
            self.root.update()
            time.sleep(0.005)

    def wait_until_can_ask(self) -> None:
        self.wait_until(lambda: self.can(self.window.ask_button))

    def ask_until_words_come(self) -> None:
        self.window.ask_button.invoke()
        self.wait_until(lambda: "GiB)" in self.text and not self.text.strip().endswith("GiB)"))

    def can(self, widget: Any) -> bool:
        return not widget.instate(["disabled"])

    @property
    def text(self) -> str:
        return str(self.window.answer.get("1.0", "end"))

    @property
    def status(self) -> str:
        return str(self.window.status.get())


@pytest.fixture
def person(demo: Path, sound_device) -> Iterator[Person]:
    tkinter = pytest.importorskip("tkinter", reason="this Python has no tkinter")
    from desktop_app import Window

    try:
        root = tkinter.Tk()
    except tkinter.TclError as error:
        pytest.skip(f"needs a display: {error}")
    places = iter(lambda: Played(sound_device.loudspeaker.open), None)
    with ModelThread(str(demo), sampling=SAMPLING, speech=SPEECH) as model:
        window = Window(root, model, places)
        person = Person(root, window)
        person.wait_until_can_ask()
        yield person
        window.close()


def test_an_answer_is_shown_after_its_planned_peak_and_heard(person: Person, sound_device):
    person.window.ask_button.invoke()
    assert not person.can(person.window.ask_button) and person.can(person.window.stop_button)
    person.wait_until_can_ask()
    question, plan, *words = person.text.splitlines()
    assert question == "> What happens here?" and plan.startswith("(planned peak: ") and "".join(words)
    assert sound_device.loudspeaker.blocks and not person.can(person.window.stop_button)


def test_stop_ends_the_answer(person: Person):
    person.ask_until_words_come()
    person.window.stop_button.invoke()
    person.wait_until_can_ask()
    assert person.status.startswith("cancelled")


def test_a_file_that_cannot_be_read_is_told_with_its_type(person: Person, tmp_path: Path):
    person.window.take_file(tmp_path / "nowhere.png")
    person.window.ask_button.invoke()
    person.wait_until_can_ask()
    assert "MediaError: " in person.text and "nowhere.png" in person.text


def test_words_go_on_where_speech_cannot_be_written(person: Person, tmp_path: Path):
    person.window._places = iter([Saved(tmp_path / "nowhere" / "reply.wav")])
    person.window.ask_button.invoke()
    person.wait_until_can_ask()
    assert person.status.startswith("length") and person.status.endswith("to nowhere")
    assert person.text.count("cannot be written") == 1


def test_an_answer_waits_while_a_game_has_the_card(person: Person):
    person.ask_until_words_come()
    person.window.game_box.invoke()
    assert person.status == "the card is free for others" and not person.can(person.window.ask_button)
    person.window.game_box.invoke()
    person.wait_until_can_ask()
    assert person.status.startswith("length")


def test_an_answer_that_waits_for_the_card_can_be_stopped(person: Person):
    person.ask_until_words_come()
    person.window.game_box.invoke()
    person.window.stop_button.invoke()
    person.wait_until(lambda: person.status.startswith("cancelled"))


def test_a_budget_that_cannot_be_is_told_and_the_old_one_stays(person: Person):
    person.window.budget.set("a lot")
    person.window.choose_budget()
    assert "OptionError: 'a lot' is not a size" in person.text and person.window.budget.get() == "auto"
    person.window.budget.set("512MiB")
    person.window.choose_budget()
    assert person.status == "budget 0.50 GiB"


def test_the_window_can_be_closed_in_mid_answer(person: Person):
    person.ask_until_words_come()
