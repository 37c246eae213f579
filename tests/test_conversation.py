from __future__ import annotations

import io
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from lowvram.conversation import Chat, read_arguments, text_to_speak, typed_lines
from lowvram.errors import MediaError, OptionError
from lowvram.options import Limits


def named(source: str) -> dict[str, str]:
    if "missing" in source:
        raise MediaError(f"{source} does not exist")
    return {"type": "image", "image": source}


def said(text: str, *media: str) -> dict[str, object]:
    return {"role": "user", "content": [*map(named, media), {"type": "text", "text": text}]}


def test_each_line_is_a_turn_and_replies_are_kept():
    chat = Chat(named)
    chat.keep(chat.take("hello\n"), "hi")
    assert chat.take("and then?") == [said("hello"), {"role": "assistant", "content": "hi"}, said("and then?")]


def test_a_system_prompt_comes_first():
    assert Chat(named, system="be brief").take("hello")[0] == {"role": "system", "content": "be brief"}


def test_media_go_with_the_next_words_and_only_with_them():
    chat = Chat(named, ["first.png"])
    assert chat.take("/add my second.png") is None
    asked = chat.take("what are they?")
    assert asked == [said("what are they?", "first.png", "my second.png")]
    chat.keep(asked, "pictures")
    assert chat.take("sure?")[-1] == said("sure?")


def test_a_turn_that_is_not_kept_is_forgotten():
    chat = Chat(named, ["first.png"])
    chat.take("what is it?")
    assert chat.take("hello") == [said("hello")]


def test_a_medium_that_cannot_be_read_changes_nothing():
    chat = Chat(named)
    with pytest.raises(MediaError):
        chat.take("/add missing.png")
    assert chat.take("hello") == [said("hello")]


@pytest.mark.parametrize("line", ["/add", "/add  ", "/help", "/quit now"])
def test_a_command_that_there_is_not_is_refused_with_those_there_are(line: str):
    with pytest.raises(OptionError, match=r"none of the 2 commands \(/add FILE, /quit\)"):
        Chat(named).take(line)


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("'my clip.mp4'", "my clip.mp4"),
        ('"my clip.mp4"', "my clip.mp4"),
        ("~/clip.mp4", "/home/me/clip.mp4"),
        ("it's.mp4", "it's.mp4"),
        ("http://a/~b.mp4", "http://a/~b.mp4"),
    ],
)
def test_a_path_is_taken_as_a_shell_would_have_passed_it_on(typed: str, path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    chat = Chat(named)
    chat.take(f"/add {typed}")
    assert chat.take("what is it?") == [said("what is it?", path)]


def test_an_empty_line_asks_nothing():
    assert Chat(named).take("  \n") is None


def test_lines_are_read_until_quit_or_the_end(monkeypatch: pytest.MonkeyPatch):
    for typed, lines in (("a\n\nb\n/quit\nc\n", ["a\n", "\n", "b\n"]), ("a", ["a"]), ("", [])):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert list(typed_lines("")) == lines
    monkeypatch.setattr(sys, "stdin", None)
    assert list(typed_lines("first")) == ["first"]


def test_a_person_is_prompted_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    terminal = io.StringIO("a\n")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    assert list(typed_lines("")) == ["a\n"]
    assert capsys.readouterr() == ("", "> > ")


def test_arguments_are_media_in_order_and_then_the_words(tmp_path: Path):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    with ExitStack() as stack:
        system, user = read_arguments([str(tmp_path / "a.png")], "what?", "be brief", Limits(), stack)
    assert (system["content"], [part["type"] for part in user["content"]]) == ("be brief", ["image", "text"])


def test_a_text_to_speak_is_its_words_or_all_of_stdin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert (text_to_speak("three"), text_to_speak("-")) == ("three", "one\ntwo")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(OptionError, match="no stdin"):
        text_to_speak("-")


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_neither_media_nor_words_is_nothing_to_answer(prompt: str):
    with ExitStack() as stack, pytest.raises(OptionError, match="nothing to answer"):
        read_arguments([], prompt, None, Limits(), stack)
