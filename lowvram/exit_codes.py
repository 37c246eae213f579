"""Errors -> how the program ends: one sentence on stderr and an exit code, or the same sentence and no end at all."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from .errors import BudgetExceededError, LowVRAMError

INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell reports for a program that SIGINT or SIGPIPE ended."""


@contextmanager
def exit_codes(verbose: bool = False) -> Iterator[None]:
    """End the program as its errors say: one sentence on stderr, and where it came from if that is asked for. Before
    that of a device that ran out: what each phase held."""
    try:
        yield
    except LowVRAMError as error:
        _print_error(error, verbose)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt as error:
        raise SystemExit(INTERRUPTED) from error
    except BrokenPipeError as error:
        raise SystemExit(BROKEN_PIPE) from error
    finally:
        _drop_unwritten(sys.stdout)
        _drop_unwritten(sys.stderr)


@contextmanager
def told_and_forgotten(verbose: bool = False) -> Iterator[None]:
    """Tell an error and go on: a turn that fails is not the end of a chat."""
    try:
        yield
    except LowVRAMError as error:
        _print_error(error, verbose)


def _print_error(error: LowVRAMError, verbose: bool) -> None:
    with suppress(OSError):  # a log that takes no more: the exit code still says it
        if verbose:
            traceback.print_exc()
        if isinstance(error, BudgetExceededError) and error.profile is not None:
            print(error.profile, file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)


def _drop_unwritten(out: TextIO) -> None:
    """Python flushes a stream once more on its way out, and would complain of what could not be written before."""
    try:
        out.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
