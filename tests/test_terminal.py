from __future__ import annotations

import io
import logging
import sys

import pytest

from lowvram.events import Progress, TextDelta
from lowvram.terminal import Bar, progress_shown


def test_a_bar_says_a_line_without_being_torn(monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = Bar()
    bar.show(Progress("download", 1, 2, "bytes"))
    bar.say("warning: a [line] longer than 80 characters" + "." * 80)
    bar.close()
    assert "warning: a [line] longer than 80 characters" + "." * 80 + "\n" in terminal.getvalue()


def test_a_bar_tells_progress_to_a_terminal_until_there_are_words(monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = Bar()
    bar.show(Progress("prefill", 1024, 2048, "tokens"))
    bar.show(TextDelta("word"))
    shown = terminal.getvalue()
    bar.show(Progress("load", 1, 2, "bytes"))
    bar.close()
    assert "prefill" in shown and "1024 of 2048 tokens" in shown
    assert terminal.getvalue() == shown


@pytest.mark.parametrize(("term", "told"), [("dumb", "prefill: 1 of 2 tokens\n"), ("xterm", "\x1b[")])
def test_a_terminal_that_takes_nothing_back_gets_lines(term: str, told: str, monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", term)
    with progress_shown() as progress:
        progress.show(Progress("prefill", 1, 2, "tokens"))
        for word in ("one", " two"):
            progress.show(TextDelta(word))
    assert (told in terminal.getvalue(), "\n\n" in terminal.getvalue()) == (True, False)


def test_the_packages_warnings_are_lines_beside_the_progress_while_it_is_shown(capsys: pytest.CaptureFixture[str]):
    log = logging.getLogger("lowvram.anywhere")
    with progress_shown():
        log.warning("the prompt is %s", "long")
    log.warning("nobody listens")
    with progress_shown(quiet=True):
        log.warning("hush")
    with progress_shown(verbose=True):
        log.info("the kernel is %s", "fast")
    with progress_shown():
        log.info("the kernel is %s", "slow")
    told = capsys.readouterr().err
    assert told.count("the kernel is fast\n") == 1 and "slow" not in told
    assert told.count("warning: the prompt is long\n") == 1
    assert not logging.getLogger("lowvram").handlers
