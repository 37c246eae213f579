"""Several processes at work: none is waited for in vain, and none is left behind."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from side_by_side import side_by_side

from lowvram.errors import OptionError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

KILLED = """
import multiprocessing, os, time
from side_by_side import side_by_side
with side_by_side(time.sleep, [0, 0], jobs=2) as results:
    next(results)
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order(jobs: int):
    with side_by_side(math.sqrt, [9, 4, 1], jobs) as results:
        assert list(results) == [3, 2, 1]


def test_a_process_that_dies_is_not_waited_for():
    died = pytest.raises(OptionError, match="one of 2 processes side by side has died")
    with died, side_by_side(os._exit, [1, 1], jobs=2) as results:
        next(results)


def test_results_that_nobody_takes_are_not_waited_for():
    began_s = time.monotonic()
    with side_by_side(time.sleep, [0, 600], jobs=2) as results:
        next(results)
    assert time.monotonic() - began_s < 500


def test_processes_end_with_one_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=BENCHMARKS, stdout=subprocess.PIPE) as killed:
        assert killed.stdout
        pids = [int(pid) for pid in killed.stdout.readline().split()]
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert pids and not psutil.wait_procs(processes, timeout=60)[1]
