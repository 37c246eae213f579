"""A profile of one answer <-> the file that keeps it: the plan, the peaks, what was held step by step, and the card.

The card says what was profiled on what: a figure without it is an anecdote. No torch.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .errors import OptionError
from .offload.plan import Plan
from .offload.profile import (
    DEVICE_ALLOCATOR,
    KINDS,
    PLANNED,
    SIMULATED_ALLOCATOR,
    TRACED,
    TRACKED_LIVE_TENSORS,
    MemoryProfile,
    Moment,
)

FORMAT = "lowvram profile 1"
"""Changes when an older program could no longer read the file."""

HINT = "pass what lowvram profile -o wrote"

PACKAGES = ("torch", "transformers", "av")

MEANINGS = {
    PLANNED: "Computed from the sizes of weights, caches and activations before anything ran.",
    TRACED: "Counted while the real code ran on tensors without data: nothing was computed, no card was needed.",
    SIMULATED_ALLOCATOR: "Simulated: what torch's allocator would have reserved of the card for the traced tensors, by"
    " its rules. It rounds up and keeps segments for later; at the budget it gives back those that are free.",
    DEVICE_ALLOCATOR: "Measured: the peak that torch's allocator on the card reports for tensors.",
    TRACKED_LIVE_TENSORS: "Measured: tensors alive while the answer was computed on a CPU. Tracked live tensors hold"
    " the host's share, too (buffers that weights are read through, pictures, the prompt's rows); the plan counts the"
    " device's alone.",
}
"""How each kind of figure came about."""


@dataclass(frozen=True)
class ProfileFile:
    """What a file of a profile holds. `card` maps names to words, numbers or one more such mapping."""

    plan: Plan
    profile: MemoryProfile
    card: Mapping[str, Any]

    @property
    def counted(self) -> str:
        """The kind that the timeline belongs to, which was counted last; without one, planned."""
        return next((kind for kind in reversed(tuple(self.profile.columns)) if kind != PLANNED), PLANNED)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; sizes are bytes."""
        return {
            "format": FORMAT,
            "card": self.card,
            "plan": self.plan.to_json(),
            "peak_bytes": self.profile.to_json(),
            "timeline": [asdict(moment) for moment in self.profile.timeline],
        }

    @classmethod
    def from_json(cls, fields: Any) -> ProfileFile:
        """What `to_json` wrote. Raises OptionError for anything else."""
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise OptionError(f"this is not a {FORMAT}", hint=HINT)
        try:
            plan = Plan.from_json(fields["plan"])
            columns = {str(kind): _peaks(kind, peaks) for kind, peaks in fields["peak_bytes"].items()}
            timeline = tuple(_moment(moment) for moment in fields["timeline"])
            card = {name: _words(words) for name, words in fields["card"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OptionError(f"this {FORMAT} is damaged: {error!r}", hint=HINT) from error
        return cls(plan, MemoryProfile(columns, timeline), card)


def read_profile(path: Path) -> ProfileFile:
    """The profile in a file. Raises OptionError, naming the file, where it cannot be read or holds something else."""
    try:
        return ProfileFile.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}", hint=HINT) from error
    except OptionError as error:
        raise OptionError(f"{path}: {error.args[0]}", hint=HINT) from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is not a {FORMAT}: {error}", hint=HINT) from error


def write_file(path: Path, text: str) -> None:
    """Write a profile or a page of it, with the folders above it. Raises OptionError where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror}", hint="name another file") from error


def write_profile(path: Path, recorded: ProfileFile) -> None:
    """Keep a profile as indented JSON. Raises OptionError."""
    write_file(path, json.dumps(recorded.to_json(), indent=2) + "\n")


def make_card(device: str, **conditions: Any) -> dict[str, Any]:
    """Everything one must know to repeat a profile on `device` (its title) or to doubt it."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical CPUs",
        "device": device,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "conditions": conditions,
    }


def card_lines(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A card's names and what each says, for people: ("versions", "python 3.12.1, torch 2.12.0")."""
    return [(str(name), _in_a_line(words)) for name, words in card.items()]


def _in_a_line(words: Any) -> str:
    if isinstance(words, Mapping):
        return ", ".join(f"{str(name).replace('_', ' ')} {word}" for name, word in words.items())
    return str(words)


def _peaks(kind: str, peaks: Mapping[str, Any]) -> dict[str, int]:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}")
    return {str(phase): _n_bytes(n_bytes) for phase, n_bytes in peaks.items()}


def _moment(fields: Mapping[str, Any]) -> Moment:
    sizes = (_n_bytes(fields[name]) for name in ("weights_bytes", "kv_bytes", "activation_bytes"))
    return Moment(str(fields["label"]), str(fields["phase"]), *sizes)


def _n_bytes(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a number of bytes")
    return value


def _words(words: Any) -> Any:
    if isinstance(words, Mapping):
        return dict(words)
    if words is None or isinstance(words, str | int | float):
        return words
    raise ValueError(f"{words!r} is not of a card")
