"""Benchmarks are found as `python benchmarks/quality.py` finds what it imports."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
