"""A kept profile -> the same picture as `lowvram profile --html` draws, as a PNG for a post or a paper.

    lowvram profile examples/clip.mp4 --model demo -o profile.json
    python benchmarks/picture.py profile.json [OTHER.json ...] -o picture.png

Profiles beside each other share a scale. Needs matplotlib: pip install "lowvram[plots]".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import blank_figure

from lowvram.chart import BANDS, HEADROOM, axis_ticks, heading, limit_words, scale_bytes, split_by_phase
from lowvram.errors import LowVRAMError, OptionError
from lowvram.offload.budget import GIB, MIB
from lowvram.offload.profile import Moment
from lowvram.profile_file import ProfileFile, read_profile

COLOURS = {"weights": "#3f6fa3", "KV cache": "#e3ab4b", "activations": "#4aa287"}
INK, SOFT, BUDGET = "#1d2327", "#59636b", "#b3401f"
WIDTH_IN, HEIGHT_IN, DPI = 9.0, 4.6, 160

LEAST_SHARE = 0.2
"""Of the width, for each phase: its words must fit."""


def draw(profiles: Sequence[ProfileFile], output: Path) -> None:
    """Draw profiles side by side into a PNG. Raises BackendError without matplotlib, OptionError if it cannot be."""
    figure = blank_figure(WIDTH_IN * len(profiles), HEIGHT_IN, DPI)
    most_bytes = max(map(scale_bytes, profiles))
    for recorded, axes in zip(profiles, figure.subplots(1, len(profiles), squeeze=False)[0], strict=True):
        _draw_one(recorded, axes, most_bytes)
    try:
        figure.savefig(output, format="png")
    except OSError as error:
        raise OptionError(f"{output} cannot be written: {error.strerror}", hint="name another -o") from error


def shares(recorded: ProfileFile) -> list[float]:
    """Of the width, by phase: as its steps are, but never less than `LEAST_SHARE` (or an equal part)."""
    counts = [len(moments) for _, moments in split_by_phase(recorded.plan, recorded.profile.timeline)]
    least = min(LEAST_SHARE, 1 / len(counts))
    return [least + (1 - least * len(counts)) * count / sum(counts) for count in counts]


def _draw_one(recorded: ProfileFile, axes: Any, most_bytes: int) -> None:
    left = 0.0
    for (phase, moments), share in zip(
        split_by_phase(recorded.plan, recorded.profile.timeline), shares(recorded), strict=True
    ):
        _draw_moments(axes, moments, left, left + share)
        peak = phase.peak_bytes
        axes.plot([left, left, left + share, left + share], [0, peak, peak, 0], color=INK, linewidth=0.9)
        name, *figures = heading(recorded, phase)
        axes.text(
            left + 0.005, 1.13, name, transform=axes.transAxes, weight="bold", fontsize=9, color=INK, parse_math=False
        )
        axes.text(left + 0.005, 1.11, "\n".join(figures), transform=axes.transAxes, va="top", fontsize=8, color=SOFT)
        axes.text(
            left + 0.005, -0.055, _steps_words(recorded, moments), transform=axes.transAxes, fontsize=8, color=SOFT
        )
        left += share
    _draw_limits(recorded, axes)
    _finish(recorded, axes, most_bytes)


def _draw_moments(axes: Any, moments: Sequence[Moment], left: float, right: float) -> None:
    edges = [left + (right - left) * index / len(moments) for index in range(len(moments) + 1)]
    ground = [0] * len(moments)
    for name, field in BANDS:
        tops = [low + getattr(moment, field) for low, moment in zip(ground, moments, strict=True)]
        axes.stairs(tops, edges, baseline=ground, fill=True, color=COLOURS[name], label=name if left == 0 else None)
        ground = tops


def _draw_limits(recorded: ProfileFile, axes: Any) -> None:
    plan = recorded.plan
    limit_bytes = plan.budget_bytes
    near = limit_bytes is not None and limit_bytes <= scale_bytes(recorded)
    if limit_bytes is not None and near:
        axes.axhline(limit_bytes, color=BUDGET, linewidth=1.5)
        low = limit_bytes - plan.reserve_bytes
        axes.axhspan(low, limit_bytes, facecolor="none", edgecolor=BUDGET, hatch="////", alpha=0.35, linewidth=0)
    words = limit_words(plan) + ("" if near or limit_bytes is None else ", above this picture")
    axes.text(
        1,
        limit_bytes if near else scale_bytes(recorded),
        f"{words} ",
        ha="right",
        va="bottom",
        color=BUDGET,
        fontsize=8,
    )


def _steps_words(recorded: ProfileFile, moments: Sequence[Moment]) -> str:
    return f"{len(moments)} steps" if recorded.profile.timeline else "as planned"


def _finish(recorded: ProfileFile, axes: Any, most_bytes: int) -> None:
    unit, unit_bytes = ("GiB", GIB) if most_bytes >= GIB else ("MiB", MIB)
    ticks = axis_ticks(most_bytes)
    axes.set_yticks(ticks, [f"{tick / unit_bytes:g} {unit}" if tick else "0" for tick in ticks], fontsize=8, color=SOFT)
    axes.set_xticks([])
    axes.set(xlim=(0, 1), ylim=(0, most_bytes * HEADROOM))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3, frameon=False, fontsize=8)
    conditions = recorded.card.get("conditions", {})
    about = " · ".join(str(conditions[name]) for name in ("model", "clip") if conditions.get(name))
    axes.set_title(
        f"{about}\n{recorded.counted}, by step; outline: planned\n",
        fontsize=9,
        color=INK,
        loc="left",
        pad=46,
        parse_math=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the profiles that are named; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw kept profiles as a PNG.")
    parser.add_argument("profiles", nargs="+", type=Path, help="what lowvram profile -o wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the PNG")
    chosen = parser.parse_args(arguments)
    try:
        draw([read_profile(path) for path in chosen.profiles], chosen.output)
    except LowVRAMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
