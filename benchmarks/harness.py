"""The card of a measurement: which machine, which versions, which commit, under which conditions.

A figure without these is an anecdote. Every benchmark prints its card above its table and keeps both together.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "av")


def make_card(device: str, **conditions: Any) -> dict[str, Any]:
    """Everything one must know to repeat a measurement on `device` (its title) or to doubt it."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical CPUs",
        "device": device,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": _commit(),
        "conditions": conditions,
    }


def card_lines(card: Mapping[str, Any]) -> list[str]:
    """A card for people, one `key: value` a line."""
    flat = {**card, **{key: ", ".join(f"{k} {v}" for k, v in card[key].items()) for key in ("versions", "conditions")}}
    return [f"{key}: {value}" for key, value in flat.items()]


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Keep a result, its card included, as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _commit() -> str:
    """The checkout's commit, marked where files differ from it; "unknown" outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "unknown"
