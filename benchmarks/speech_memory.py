"""What decoding speech holds beside its weights, over the length of the speech: ours, and the reference's ways.

    python benchmarks/speech_memory.py [--codes 150 500 1500] [--ours] [--tiny] [--json] [-o results/speech-memory.json]

token2wav alone, as in `latency.py`: live tensors at their peak, weights left out, one row a way and one column a
length. Ours solve in full; the reference's ways take one step, since what they hold does not grow with the steps. Their
attention is dense, so 30 s take them an hour of a CPU: `--ours` leaves them out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import card_lines, make_card, write_result
from latency import PARAMS, all_ways, load, some_codes
from synthetic import SIZE_7B
from transformers.utils import logging

from lowvram.demo import DemoSize
from lowvram.demo.config import TINY
from lowvram.offload.meter import LiveBytes
from lowvram.options import MODES
from lowvram.token2wav.windows import CODES_PER_SECOND

LENGTHS_CODES = (150, 500, 1500)
"""3, 10 and 30 s of speech."""

ONE_STEP = 2
"""The points of the coarsest time grid."""


def peak_bytes(decode: Iterable[Any]) -> int:
    """Run through a decode; returns the most bytes of live tensors that it made. What it yields is let go."""
    with LiveBytes() as ledger:
        for _ in decode:
            pass
    return ledger.peak_bytes


def measure(
    model: Any, size: DemoSize, lengths_codes: Sequence[int], modes: Sequence[str], *, only_ours: bool
) -> dict[str, list[int]]:
    """Each way's peaks, one for each length."""
    peaks: dict[str, list[int]] = {}
    for codes in lengths_codes:
        for way, decode in all_ways(model, some_codes(size, codes), modes, [PARAMS.solver], ONE_STEP).items():
            if not only_ours or way.startswith(tuple(modes)):
                peaks.setdefault(way, []).append(peak_bytes(decode()))
    return peaks


def table(peaks: Mapping[str, Sequence[int]], lengths_codes: Sequence[int]) -> str:
    """For people: MB (1e6 bytes) by way and seconds of speech."""
    titles = "".join(f"{codes / CODES_PER_SECOND:>9.1f} s" for codes in lengths_codes)
    rows = (f"{way:<26}" + "".join(f"{peak / 1e6:>8.1f} MB" for peak in row) for way, row in peaks.items())
    return "\n".join([f"{'way':<26}{titles}", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the result if asked; returns the exit code."""
    parser = argparse.ArgumentParser(description="Peak memory of every way to decode speech, by the speech's length.")
    parser.add_argument("--codes", type=int, nargs="+", default=LENGTHS_CODES, help="lengths, 50 codes a second")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--ours", action="store_true", help="leave the reference's ways out")
    parser.add_argument("--tiny", action="store_true", help="a toy's sizes in place of the published ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file, too")
    chosen = parser.parse_args(arguments)
    logging.set_verbosity_error()
    size = TINY if chosen.tiny else SIZE_7B
    peaks = measure(load(size), size, chosen.codes, chosen.modes, only_ours=chosen.ours)
    card = make_card(
        "CPU",
        size="a toy's" if chosen.tiny else "as published (7B)",
        weights="random",
        steps=PARAMS.steps,
        guidance=PARAMS.guidance,
        chunk_s=PARAMS.chunk_s,
        counted=LiveBytes.kind,
    )
    result = {"card": card, "lengths_codes": list(chosen.codes), "peak_bytes": peaks}
    if chosen.output:
        write_result(chosen.output, result)
    print(json.dumps(result) if chosen.json else "\n".join([*card_lines(card), "", table(peaks, chosen.codes)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
