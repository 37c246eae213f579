"""What `kernels.py` kept -> a picture: each way's speed as a multiple of a 16-bit linear's, by rows, a panel per shape.

    python benchmarks/kernels_picture.py kernels.json -o kernels.png

A point is the median over rounds, its bar the quartiles. Needs matplotlib: pip install "lowvram[plots]".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import blank_figure

from lowvram.errors import LowVRAMError, OptionError

COLOURS = ("#3f6fa3", "#e3ab4b", "#4aa287", "#8d5a97", "#b3401f")
STYLES = ("-", "--", ":", "-.")
INK, SOFT = "#1d2327", "#59636b"
PANEL_IN, LEAST_PANELS, HEIGHT_IN, DPI = 3.4, 2, 4.6, 160
SPEEDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)

Cell = Mapping[str, Any]


def draw(result: Mapping[str, Any], output: Path) -> None:
    """Draw a result of kernels.py into a PNG. Raises BackendError without matplotlib, OptionError if it cannot be."""
    cells: list[Cell] = result["cells"]
    shapes = _distinct(cells, "shape")
    width = max(LEAST_PANELS, len(shapes))
    figure = blank_figure(PANEL_IN * width, HEIGHT_IN, DPI)
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for shape, axes in zip(shapes, panels, strict=True):
        _draw_panel(axes, shape, cells)
    panels[0].set_ylabel("speed as a multiple of the 16-bit linear", color=INK, fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    figure.suptitle(_title(result), fontsize=9, color=INK, x=0.01, ha="left", parse_math=False)
    try:
        figure.savefig(output, format="png")
    except OSError as error:
        raise OptionError(f"{output} cannot be written: {error.strerror}", hint="name another file") from error


def _draw_panel(axes: Any, shape: str, cells: Sequence[Cell]) -> None:
    here = [cell for cell in cells if cell["shape"] == shape]
    reference, *others = _distinct(cells, "way")
    for threads, style in zip(_distinct(cells, "threads"), STYLES, strict=False):
        for way, colour in zip(others, COLOURS, strict=False):
            line = [cell for cell in here if (cell["way"], cell["threads"]) == (way, threads)]
            _draw_line(axes, line, color=colour, linestyle=style, label=f"{way}, {threads} thread{'s' * (threads > 1)}")
    axes.axhline(1, color=SOFT, linewidth=0.9)
    axes.text(0.99, 1, f"{reference} ", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=7)
    _finish(axes, shape, _distinct(here, "rows"))


def _draw_line(axes: Any, line: Sequence[Cell], **style: Any) -> None:
    middles = [cell["speedup"] for cell in line]
    lows, highs = zip(*(cell["speedup_quartiles"] for cell in line), strict=True)
    bars = [
        [middle - low for middle, low in zip(middles, lows, strict=True)],
        [high - middle for middle, high in zip(middles, highs, strict=True)],
    ]
    axes.errorbar([cell["rows"] for cell in line], middles, bars, marker="o", markersize=3, linewidth=1.2, **style)


def _finish(axes: Any, shape: str, rows: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(rows, [str(n) for n in rows], fontsize=8, color=SOFT)
    low, high = axes.get_ylim()
    speeds = [speed for speed in SPEEDS if low <= speed <= high]
    axes.set_yticks(speeds, [f"{speed:g}" for speed in speeds], fontsize=8, color=SOFT)
    axes.minorticks_off()
    axes.grid(axis="y", color=SOFT, alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(shape.replace("x", " inputs, ") + " outputs", fontsize=9, color=INK)
    axes.set_xlabel("rows", fontsize=9, color=INK)


def _title(result: Mapping[str, Any]) -> str:
    card = result["card"]
    conditions = card["conditions"]
    reads = ", ".join(f"{read['gb_per_s']:.1f} GB/s by {read['threads']}" for read in result["reads"])
    return (
        f"{card['device']}, {card['machine']} · {conditions['dtype']}, groups of {conditions['group_size']} · "
        f"load average {conditions['load_average_before']}\nplain read of memory, by threads: {reads}"
    )


def _distinct(cells: Sequence[Cell], field: str) -> list[Any]:
    return list(dict.fromkeys(cell[field] for cell in cells))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a kept result; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw a result of kernels.py as a PNG.")
    parser.add_argument("result", type=Path, help="what kernels.py -o wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the PNG")
    chosen = parser.parse_args(arguments)
    try:
        draw(json.loads(chosen.result.read_text(encoding="utf-8")), chosen.output)
    except LowVRAMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
