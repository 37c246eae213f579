"""lowvram/__main__.py"""

from __future__ import annotations

import subprocess
import sys

from lowvram import __version__


def test_the_package_runs_as_the_program_does():
    done = subprocess.run([sys.executable, "-m", "lowvram", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"lowvram {__version__}"
