"""Progress and warnings for a person in front of a terminal, or for a log where there is none: all of it on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .events import Event, Progress, TextDelta
from .listeners import Listener, ProgressLines, progress_amount


@contextmanager
def progress_shown(quiet: bool = False, verbose: bool = False) -> Iterator[Listener]:
    """Somewhere to show progress, with the package's own warnings beside it, if `verbose` also what it chose and why;
    nothing if it is to be quiet."""
    progress = Listener() if quiet else Bar() if _can_draw() else ProgressLines(sys.stderr)
    log, handler = logging.getLogger(__package__), _Log(progress)
    level = log.level
    log.addHandler(handler)
    if verbose:
        log.setLevel(logging.INFO)
    try:
        yield progress
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        progress.close()


def _can_draw() -> bool:
    """Whether stderr is a terminal that can take back what it shows; in an editor, one often cannot (TERM=dumb)."""
    if not sys.stderr.isatty():
        return False
    from rich.console import Console

    return Console(stderr=True).is_interactive


class Bar(Listener):
    """Progress for a person: a bar that tells what is being done, gone as soon as there are words to read."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Display

        self._display = Display(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._display.add_task("", total=None, amount="")
        self._over = False

    def show(self, event: Event) -> None:
        match event:
            case TextDelta() if not self._over:
                self.close()
                self._over = True
            case Progress(stage=stage, done=done, total=total) if not self._over:
                self._display.start()
                amount = progress_amount(event)
                self._display.update(self._task, description=stage, completed=done, total=total, amount=amount)

    def say(self, line: str) -> None:
        self._display.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._display.stop()


class _Log(logging.Handler):
    """What the package warns of, and what else its log is asked for, a line each."""

    def __init__(self, progress: Listener) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        label = "warning: " if record.levelno >= logging.WARNING else ""
        self._progress.say(f"{label}{record.getMessage()}")
