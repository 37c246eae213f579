"""What `lowvram quantize` shows: events of a run -> progress with the time that is left, and a table of the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from .events import Progress
from .listeners import Listener
from .offload.budget import format_bytes
from .quantize import LAYERS, Deviations, LayerReport, PartReport, QuantizeReport

STOPPED = "stopped; the same command goes on after the last finished layer"


def follow_run(
    events: Iterator[Progress | Deviations | LayerReport | PartReport | QuantizeReport],
    progress: Listener,
    clock: Callable[[], float] = time.monotonic,
) -> QuantizeReport:
    """Show a run as it goes; returns its report. A Ctrl-C is told what it leaves behind, and passed on."""
    told = _Layers(clock)
    try:
        for event in events:
            match event:
                case Progress():
                    told.note(event)
                    if event.stage != LAYERS:
                        progress.show(event)
                case Deviations(sentences=sentences):
                    for sentence in sentences:
                        progress.say(f"unlike the published recipe, {sentence}")
                case PartReport():
                    progress.say(_part_line(event))
                case LayerReport():
                    progress.say(told.line(event))
                case QuantizeReport():
                    return event
    except KeyboardInterrupt:
        progress.say(STOPPED)
        raise
    raise AssertionError("a run ends with its report")


class _Layers:
    """How long layers take, and so how long those that are left will."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s: float | None = None
        self._computed = self._done = self._total = 0

    def note(self, event: Progress) -> None:
        if event.stage == LAYERS:
            self._done, self._total = event.done, event.total or 0
            self._computed += self._began_s is not None
        elif event.stage.startswith("layer") and self._began_s is None:
            self._began_s = self._clock()

    def line(self, layer: LayerReport) -> str:
        errors = f"error {layer.quantized:.2e}, rounded to nearest {layer.rounded:.2e}"
        return f"layer {layer.layer + 1} of {self._total}: {errors}; {self._time_left()}"

    def _time_left(self) -> str:
        if self._began_s is None:
            return "done before"
        if self._done == self._total:
            return "what is left is to compare next words"
        left_s = (self._clock() - self._began_s) / self._computed * (self._total - self._done)
        return f"about {left_s / 60:.0f} min left" if left_s >= 90 else f"about {left_s:.0f} s left"


def _part_line(part: PartReport) -> str:
    sizes = f"{format_bytes(part.bytes_before)} -> {format_bytes(part.bytes_after)}"
    count = f"{part.linears} linear{'s' * (part.linears > 1)}"
    return f"{part.part}: {count} in {part.bits} bits, {sizes}, error {part.weight_error:.2e}"


def report_text(report: QuantizeReport) -> str:
    """The report as a table for people."""
    options = report.options
    wanted = options.samples * options.sample_tokens
    short = f" of the {wanted:,} asked for" if report.calibration_tokens < wanted else ""
    head = report.head_alone
    lines = [
        f"{report.model}: {options.bits} bits, groups of {options.group_size}, {format_bytes(report.weights_bytes)}",
        *(f"unlike the published recipe, {sentence}" for sentence in report.deviations),
        f"calibrated on {report.calibration_tokens:,} tokens{short}, measured on {report.held_out_tokens:,} others",
        "",
        "relative error of what a layer adds (mean square)",
        f"{'layer':>7}  {'round to nearest':>16}  {'as written':>12}",
        *(f"{layer.layer + 1:>7}  {layer.rounded:>16.2e}  {layer.quantized:>12.2e}" for layer in report.layers),
        "",
        "next word, compared with 16 bit",
        f"{'KL':>7}  {report.rounded.kl_divergence:>16.2e}  {report.quantized.kl_divergence:>12.2e}",
        f"{'same':>7}  {report.rounded.top1:>16.2%}  {report.quantized.top1:>12.2%}",
        *([f"of that by the output head alone: KL {head.kl_divergence:.2e}, same {head.top1:.2%}"] if head else []),
        *_parts_table(report.parts),
    ]
    return "\n".join(lines)


def _parts_table(parts: Sequence[PartReport]) -> list[str]:
    if not parts:
        return []
    rows = (
        f"{part.part:>10}  {part.bits:>4}  {part.linears:>7}  {format_bytes(part.bytes_before):>10}"
        f"  {format_bytes(part.bytes_after):>10}  {part.weight_error:>9.2e}"
        for part in parts
    )
    head = f"{'part':>10}  {'bits':>4}  {'linears':>7}  {'16 bit':>10}  {'written':>10}  {'error':>9}"
    return ["", "relative square error of weights that were rounded to nearest", head, *rows]
