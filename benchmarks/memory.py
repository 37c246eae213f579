"""Peak memory of a turn, phase by phase: what the plan promises beside what the code holds.

    python benchmarks/memory.py [CLIP] [--model demo] [--vram 8GiB] [--json] [-o results/memory.json]
    python benchmarks/memory.py --trace 7b-awq [--seconds 15 60] [--budgets 6GiB 8GiB] [--kv int8] [--no-speech]

The first form answers once about a clip and measures: on CUDA the device's allocator is asked; on a CPU live tensors
are tracked, which is slow and counts the host's share, too. The second needs neither weights nor a GPU: for clips of
each length and each budget the real code runs on tensors without data, at the published model's full size. That takes
about half a minute a row; `-o` is written after each, and `--resume` goes on where that file ends. What torch's
allocator would reserve for those tensors is simulated, and how often it would have to give back what is free to stay
within the budget. With `--weights` (a folder or hub id) and a CUDA card it measures the same turns, too, on made-up
clips, while other processes trace (`--jobs`); a budget beyond what is free there is not measured, and a turn that fails
makes the exit code 1. Planned, traced, simulated and measured never share a column, and no column includes the plan's
reserve.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import product, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import av
import numpy as np
import torch
from harness import card_lines, make_card, with_commit, write_result
from side_by_side import side_by_side
from transformers.utils import logging

from lowvram import LowVRAMError, OmniRuntime, SamplingParams, SpeechParams
from lowvram.checkpoint import Headers
from lowvram.device import Device, open_device
from lowvram.errors import InfeasibleBudgetError, OptionError
from lowvram.model import OmniModel
from lowvram.offload.budget import Budget, format_bytes
from lowvram.offload.footprint import Footprint, read_footprint
from lowvram.offload.meter import AllocatorMeter, LiveBytes, Meter
from lowvram.offload.plan import Plan, plan_memory
from lowvram.offload.plan import Turn as Workload
from lowvram.offload.profile import DEVICE_ALLOCATOR, DEVICE_RESERVED, KINDS, PLANNED, SIMULATED_ALLOCATOR, TRACED
from lowvram.options import TALKER_SAMPLING, KVPrecision, Limits
from lowvram.planning import find_headers
from lowvram.profile_command import Asked, measure_answer, open_counter
from lowvram.profile_file import MEANINGS, ProfileFile
from lowvram.trace import allocator_of, trace_turn, traceable_model
from lowvram.workload import StandIn, count_turn

CLIP = Path(__file__).parent.parent / "examples" / "clip.mp4"

MODELS = {
    "7b-awq": "Qwen/Qwen2.5-Omni-7B-AWQ",
    "7b": "Qwen/Qwen2.5-Omni-7B",
    "3b": "Qwen/Qwen2.5-Omni-3B",
    "demo": "demo",
}
"""What can be traced, by a short name."""

FRAME = (672, 896)
"""Height and width in pixels at which a frame has the most tokens that a frame of a video may have: 768."""

SOUND_HZ = 16_000

SECONDS = (15.0, 30.0, 60.0, 120.0, 600.0)
BUDGETS = ("6GiB", "8GiB", "10GiB", "12GiB", "16GiB")

SAME = ("commit", "device", "versions", "conditions")
"""What a card must say for two runs to share a table."""

PUBLISHED_GIB = {
    "7b-awq": {15: 11.77, 30: 17.84, 60: 30.31},
    "7b": {15: 31.11, 30: 41.85, 60: 60.19},
    "3b": {15: 18.38, 30: 22.43, 60: 28.22},
}
"""Peaks by seconds of video, as published for the reference in "GB"; that GiB are meant shows reference_memory.py."""

COMPARED_WITH = {"7b-awq": ("7b-awq", "7b"), "7b": ("7b",), "3b": ("3b",)}
"""Whose figures stand beside a model's own: of the 4-bit one, those in 16 bits, too."""


def measure(clip: Path, *, model: str, vram: str | None, device: str, max_tokens: int, max_codes: int) -> ProfileFile:
    """Answer once about `clip` in text and speech (greedy text, seed 0)."""
    messages = [{"role": "user", "content": [{"type": "video", "video": str(clip)}]}]
    sampling = SamplingParams(max_tokens=max_tokens, seed=0)
    speech = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=max_codes))
    opened = open_device(device)
    meter = open_counter(opened)
    with OmniRuntime.open(model, vram=vram, device=opened, meter=meter) as omni:
        return measure_answer(omni, meter, Asked(messages, sampling, speech), model=model)


def write_clip(path: Path, seconds: float) -> None:
    """A video of gray at 2 frames a second with a silent sound: what is in it changes no memory."""
    frame = av.VideoFrame.from_ndarray(np.full((*FRAME, 3), 128, np.uint8), format="rgb24")
    second = av.AudioFrame.from_ndarray(np.zeros((1, SOUND_HZ), np.float32), format="fltp", layout="mono")
    second.sample_rate = SOUND_HZ
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=2)
        video.height, video.width, video.pix_fmt = *FRAME, "yuv420p"
        sound = container.add_stream("aac", rate=SOUND_HZ, layout="mono")
        for stream, picture, ticks in ((video, frame, round(2 * seconds)), (sound, second, math.ceil(seconds))):
            for tick in range(ticks):
                picture.pts = tick * (SOUND_HZ if stream is sound else 1)
                picture.time_base = Fraction(1, SOUND_HZ if stream is sound else 2)
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))


@dataclass(frozen=True)
class Cell:
    """What one row is about: a clip's length, a budget, and how the caches store a number."""

    seconds: float
    budget: str
    kv: KVPrecision

    def is_in(self, row: Mapping[str, Any]) -> bool:
        return asdict(self) == {name: row[name] for name in asdict(self)}


@dataclass(frozen=True)
class Tracer:
    """Plans and traces clips of one model at full size, in 16 bit; `largest` lists so many storages per peak, and
    `timeline` what was held step by step."""

    name: str
    speech: SpeechParams | None
    sampling: SamplingParams
    largest: int = 0
    timeline: bool = False

    def row(self, cell: Cell) -> dict[str, Any]:
        """The peaks by phase of a clip in a budget, or why no plan fits."""
        headers, _, footprint = _skeleton(self.name)
        limits, clip = Limits(kv=cell.kv), StandIn("video", cell.seconds, FRAME)
        options: dict[str, Any] = {"limits": limits, "sampling": self.sampling, "speech": self.speech}
        turn = count_turn(headers, [], [clip], **options).turn
        published = PUBLISHED_GIB.get(self.name, {}).get(int(cell.seconds))
        about = asdict(cell) | {"prompt_tokens": turn.prompt_tokens, "published_gib": published}
        try:
            plan = plan_memory(footprint, Budget.of(cell.budget), limits, turn)
        except InfeasibleBudgetError as error:
            return about | {"refused": str(error)}
        return about | self._peaks(plan, turn)

    def _peaks(self, plan: Plan, turn: Workload) -> dict[str, Any]:
        allocator = allocator_of(plan)
        ledger = LiveBytes("meta", explain=self.largest > 0, allocator=allocator)
        profile = trace_turn(_skeleton(self.name)[1], plan, turn, self.speech, ledger=ledger)
        row: dict[str, Any] = {"reserve_bytes": plan.reserve_bytes, "peak_bytes": profile.to_json()}
        row["allocator"] = {"retries": allocator.retries, "short_bytes": allocator.short_bytes}
        if self.timeline:
            row["timeline"] = [asdict(moment) for moment in profile.timeline]
        if self.largest:
            row["largest"] = {phase: list(self._held(ledger, phase)) for phase in ledger.peaks}
        return row

    def _held(self, ledger: LiveBytes, phase: str) -> Iterator[str]:
        counts = Counter(ledger.largest(phase))
        for held in sorted(counts, key=lambda held: held.n_bytes * counts[held], reverse=True)[: self.largest]:
            yield (
                f"{counts[held]} x {format_bytes(held.n_bytes)} {held.operator} {list(held.shape)} {held.dtype},"
                f" {held.line}"
            )


@cache
def _skeleton(name: str) -> tuple[Headers, OmniModel, Footprint]:
    headers = find_headers(MODELS[name])
    return headers, traceable_model(headers), read_footprint(headers.tensors, headers.config, width_bytes=2)


def measure_on_card(weights: str, cell: Cell, sampling: SamplingParams, speech: SpeechParams | None) -> dict[str, Any]:
    """What torch's CUDA allocator says of the turn that was planned, to be merged into its row: peaks of tensors and of
    what was reserved for them by phase, and how often it had to give back what was free; or why there is no such turn
    on this card, or how it failed.

    The answer may end sooner than planned for; caches are allocated whole.
    """
    device, budget = open_device("cuda"), Budget.of(cell.budget)
    if (budget.vram_bytes or 0) > device.free_bytes:  # the runtime would make do with less than the row says
        return {"not_measured": f"{format_bytes(device.free_bytes)} are free on {device.title}"}
    meter = AllocatorMeter(device.torch)
    retries_before = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    try:
        _answer_about_gray(weights, cell, device, meter, sampling, speech)
    except InfeasibleBudgetError as error:
        return {"not_measured": str(error)}
    except (LowVRAMError, RuntimeError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return {
        "card_peak_bytes": {DEVICE_ALLOCATOR: meter.peaks, DEVICE_RESERVED: meter.reserved_peaks},
        "card_retries": torch.cuda.memory_stats()["num_alloc_retries"] - retries_before,
    }


def _answer_about_gray(
    weights: str, cell: Cell, device: Device, meter: Meter, sampling: SamplingParams, speech: SpeechParams | None
) -> None:
    with (
        TemporaryDirectory() as folder,
        OmniRuntime.open(weights, vram=cell.budget, limits=Limits(kv=cell.kv), device=device, meter=meter) as omni,
    ):
        clip = Path(folder) / "clip.mp4"
        write_clip(clip, cell.seconds)
        messages = [{"role": "user", "content": [{"type": "video", "video": str(clip)}]}]
        for _ in omni.generate(messages, sampling=sampling, speech=speech):
            pass


def row_lines(row: dict[str, Any]) -> Iterator[str]:
    """A row for people: a line per phase."""
    head = f"{row['seconds']:5g} s  {row['budget']:>6}  {row['kv']:>5}"
    if "refused" in row:
        yield f"{head}  refused: {row['refused']}"
        return
    columns = row["peak_bytes"]
    kinds = [kind for kind in KINDS if kind in columns]
    for phase, planned_bytes in columns[PLANNED].items():
        found = (columns[kind].get(phase) for kind in kinds)
        cells = "  ".join(
            (format_bytes(n) if n is not None else "-").rjust(max(10, len(kind)))
            for n, kind in zip(found, kinds, strict=True)
        )
        yield f"{head}  {phase:24}{cells}  {planned_bytes / columns[TRACED][phase]:6.3f}"
        yield from (f"{'':25}{line}" for line in row.get("largest", {}).get(phase, ()))
    for word, how in (("not_measured", "not measured on the card"), ("failed", "failed on the card")):
        if word in row:
            yield f"{head}  {how}: {row[word]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or trace, print, and keep the result if asked; returns the exit code, which is 1 where a turn failed on
    the card."""
    chosen = _parser().parse_args(arguments)
    logging.set_verbosity_error()
    try:
        result, lines = _trace(chosen) if chosen.trace else _measure(chosen)
    except LowVRAMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if chosen.output:
        write_result(chosen.output, result)
    print(json.dumps(result) if chosen.json else "\n".join(lines))
    return int(any("failed" in row for row in result.get("rows", ())))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Peak memory of a turn by phase: planned, traced or measured.")
    parser.add_argument("clip", nargs="?", type=Path, default=CLIP, help="a video (default: %(default)s)")
    parser.add_argument("--model", default="demo", help="hub id, folder or demo (default: %(default)s)")
    parser.add_argument("--vram", help="budget, such as 8GiB (default: what is free)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--max-tokens", type=int, help="of text (default: 32 measured, 1024 traced)")
    parser.add_argument("--max-codes", type=int, help="of speech (default: 100 measured, 4096 traced)")
    parser.add_argument("--trace", choices=MODELS, help="measure nothing: trace this model at its full size")
    parser.add_argument("--seconds", type=float, nargs="+", default=SECONDS, help="of traced clips")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, help="for traced clips")
    parser.add_argument("--kv", nargs="+", choices=get_args(KVPrecision), default=["16bit"], help="of traced caches")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file of -o has, trace the others")
    parser.add_argument("--steps", type=int, default=SpeechParams().steps, help="time points of traced speech's ODE")
    parser.add_argument("--no-speech", action="store_true", help="trace answers in text alone")
    parser.add_argument("--weights", help="measure the traced turns, too, with this checkpoint on a CUDA card")
    parser.add_argument("--minutes", type=float, help="begin no row after so many, and name those left out")
    parser.add_argument("--jobs", type=int, default=1, help="processes that trace side by side (default: %(default)s)")
    parser.add_argument("--largest", type=int, default=0, help="list what was held at each traced peak: so many lines")
    parser.add_argument("--timeline", action="store_true", help="add to the JSON what was held step by step")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file, too")
    return parser


def _measure(chosen: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    recorded = measure(
        chosen.clip,
        model=chosen.model,
        vram=chosen.vram,
        device=chosen.device,
        max_tokens=chosen.max_tokens or 32,
        max_codes=chosen.max_codes or 100,
    )
    recorded = replace(recorded, card=with_commit(recorded.card))
    lines = [*card_lines(recorded.card), "", str(recorded.profile), f"{recorded.counted}: {MEANINGS[recorded.counted]}"]
    return recorded.to_json(), lines


def _trace(chosen: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    sampling = SamplingParams(seed=0, max_tokens=chosen.max_tokens or SamplingParams().max_tokens)
    drawn = replace(TALKER_SAMPLING, max_tokens=chosen.max_codes or TALKER_SAMPLING.max_tokens)
    speech = None if chosen.no_speech else SpeechParams(steps=chosen.steps, sampling=drawn)
    device = open_device("cuda").title if chosen.weights else "none: traced on tensors without data"
    card = make_card(device, model=MODELS[chosen.trace], speech=speech is not None, **_most(chosen))
    tracer = Tracer(chosen.trace, speech, sampling, largest=chosen.largest, timeline=chosen.timeline)
    rows = _kept_rows(chosen.output, card) if chosen.resume else []
    asked = [Cell(*each) for each in product(chosen.seconds, chosen.budgets, chosen.kv)]
    cells = [cell for cell in asked if not any(map(cell.is_in, rows))]
    result: dict[str, Any] = {"card": card, "rows": rows}
    with side_by_side(tracer.row, cells, chosen.jobs) as traced:
        for cell in _in_time(cells, chosen.minutes):
            measured = measure_on_card(chosen.weights, cell, sampling, speech) if chosen.weights else {}
            rows.append(_merged(next(traced), measured))
            if chosen.output:
                write_result(chosen.output, result)
    if late := [cell for cell in cells if not any(map(cell.is_in, rows))]:
        result["left_out_for_time"] = [asdict(cell) for cell in late]
    kinds = (PLANNED, TRACED, SIMULATED_ALLOCATOR, *((DEVICE_ALLOCATOR, DEVICE_RESERVED) if chosen.weights else ()))
    columns = "  ".join(kind.rjust(10) for kind in kinds)
    head = f"{'clip':>7}  {'budget':>6}  {'kv':>5}  {'phase':24}{columns}  planned/traced"
    lines = [line for row in rows for line in row_lines(row)]
    return result, [*card_lines(card), "", head, *lines, *_published_lines(chosen)]


def _in_time(cells: Sequence[Cell], minutes: float | None) -> Iterator[Cell]:
    """Those that are begun before so many minutes are over."""
    until_s = math.inf if minutes is None else time.monotonic() + 60 * minutes
    return takewhile(lambda _: time.monotonic() < until_s, cells)


def _merged(row: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """A row with what a card said of it. Its measured columns come beside the others, if there are any."""
    columns = measured.pop("card_peak_bytes", {})
    return row | measured | ({"peak_bytes": row.get("peak_bytes", {}) | columns} if columns else {})


def _most(chosen: argparse.Namespace) -> dict[str, int]:
    """The longest answer, where it is not the usual one."""
    return {name: most for name in ("max_tokens", "max_codes") if (most := getattr(chosen, name))}


def _kept_rows(path: Path | None, card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a file that is there already. Raises OptionError where they are of other code or another question."""
    if path is None or not path.exists():
        return []
    hint = "name another -o, or leave out --resume to write it anew"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        theirs, rows = {name: kept["card"][name] for name in SAME}, list(kept["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{path} holds no rows to go on with: {error!r}", hint=hint) from error
    if theirs != (ours := {name: card[name] for name in SAME}):
        raise OptionError(f"{path} is of {theirs}, and this run of {ours}", hint=hint)
    return rows


def _published_lines(chosen: argparse.Namespace) -> Iterator[str]:
    for model in COMPARED_WITH.get(chosen.trace, ()):
        published = PUBLISHED_GIB[model]
        figures = ", ".join(f"{gib} GiB at {clip_s} s" for clip_s, gib in published.items() if clip_s in chosen.seconds)
        if figures:
            yield f"Published for the reference, {model}: {figures}."


if __name__ == "__main__":
    sys.exit(main())
