"""The card of a measurement: which machine, which versions, which commit, under which conditions.

A figure without these is an anecdote. Every benchmark prints its card above its table and keeps both together.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowvram import profile_file


def make_card(device: str, **conditions: Any) -> dict[str, Any]:
    """Everything one must know to repeat a measurement on `device` (its title) or to doubt it."""
    return with_commit(profile_file.make_card(device, **conditions))


def with_commit(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card that says which checkout was measured, too."""
    return {**card, "commit": _commit()}


def card_lines(card: Mapping[str, Any]) -> list[str]:
    """A card for people, one `key: value` a line."""
    return [f"{name}: {words}" for name, words in profile_file.card_lines(card)]


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
