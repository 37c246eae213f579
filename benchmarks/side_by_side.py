"""Pieces of work -> their results in order, by several processes of which none is waited for in vain."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from lowvram.errors import OptionError

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@contextmanager
def side_by_side(work: Callable[[Piece], Result], pieces: Sequence[Piece], jobs: int) -> Iterator[Iterator[Result]]:
    """The results of `pieces` in their order, `jobs` of them made at a time; those not taken at the end are given up.
    Raises OptionError at the next result once a process has died, which a pool of multiprocessing would wait for."""
    if jobs == 1:
        yield map(work, pieces)
        return
    # Not forked: CUDA does not survive it.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        try:
            yield pool.map(work, pieces)
        except BrokenProcessPool as error:
            raise OptionError(
                f"one of {jobs} processes side by side has died, perhaps for want of memory", hint="ask for fewer"
            ) from error
        finally:
            for process in multiprocessing.active_children():
                process.terminate()


def _end_with_parent() -> None:
    """Have this process of a pool end when its parent does: idle, it would outlive one that was killed."""
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
