"""How soon whole turns write and speak, in every speech mode, beside what the memory's bandwidth allows.

    python benchmarks/turn_times.py [CLIP] [--model demo] [--modes exact balanced] [--json] [-o turn-times.json]

A warm runtime answers about a clip once without speech and once in each mode and solver, from one seed. Times are those
that `Finished` reports. The ceiling of a rate is what the device could do if it did nothing but read, once a step, the
weights that the step reads; the decoder alone, beside the reference's way, is `latency.py`'s to measure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bandwidth import fastest_read, seconds
from harness import card_lines, make_card, write_result

from lowvram import Finished, LowVRAMError, OmniRuntime, SamplingParams, SpeechParams
from lowvram.options import MODES, TALKER_SAMPLING
from lowvram.token2wav.ode import solver_stages, time_grid
from lowvram.token2wav.windows import first_sound_codes

CLIP = Path(__file__).parent.parent / "examples" / "clip.mp4"
SOLVERS = ("euler", "ab2")
SAMPLING = SamplingParams(max_tokens=48, seed=1)
SPEECH = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=240, seed=1), seed=1)
READS = 10


@dataclass(frozen=True)
class Turn:
    """A spoken turn. Seconds count from its beginning; `first_sound_codes` had to be said before the first sound,
    `audio_rtf` is compute by length from the first code on, and `underrun_s` what a listener waited in mid-speech."""

    way: str
    ttft_s: float
    first_sound_s: float
    first_sound_codes: int
    audio_rtf: float
    underrun_s: float
    audio_s: float
    total_s: float


@dataclass(frozen=True)
class Rates:
    """Steps a second, text alone and codes with text and sound in between, and the most that the bandwidth allows."""

    text_tokens_per_s: float
    text_tokens_per_s_ceiling: float
    codes_per_s_text_and_sound_included: float
    codes_per_s_ceiling: float


def measure_turns(
    omni: OmniRuntime, messages: Any, sampling: SamplingParams, ways: Iterable[SpeechParams]
) -> tuple[list[Turn], Rates]:
    """Answer again and again. The model speaks; the codes' rate is that of the first of the `ways`."""
    _answer(omni, messages, sampling, None)  # weights come, kernels are chosen
    written = _answer(omni, messages, sampling, None)
    spoken = [(params, _answer(omni, messages, sampling, params)) for params in ways]
    first = spoken[0][1]
    bandwidth, footprint = bytes_per_s(omni), omni._footprint
    token_bytes = footprint.component_bytes("thinker") + footprint.component_bytes("lm_head")
    rates = Rates(
        (len(written.text_ids) - 1) / (written.timings["text"] - written.timings["ttft"]),
        bandwidth / token_bytes,
        len(first.codec_ids) / (first.timings["codes"] - first.timings["talk"]),
        bandwidth / footprint.component_bytes("talker"),
    )
    return [_turn(params, finished) for params, finished in spoken], rates


def speech_ways(speech: SpeechParams, modes: Iterable[str], solvers: Iterable[str]) -> list[SpeechParams]:
    """Each mode with each solver, the rest as in `speech`."""
    ways: Any = product(modes, solvers)
    return [replace(speech, mode=mode, solver=solver) for mode, solver in ways]


def table(turns: Sequence[Turn], rates: Rates) -> str:
    """For people."""
    lines = [
        f"text {rates.text_tokens_per_s:.2f} tokens/s of {rates.text_tokens_per_s_ceiling:.2f} that reading allows,"
        f" {rates.codes_per_s_text_and_sound_included:.2f} codes/s, text and sound included,"
        f" of {rates.codes_per_s_ceiling:.2f}",
        "",
        f"{'way':<20} {'first word':>10} {'first sound':>22} {'RTF':>7} {'underrun':>9} {'speech':>7} {'in all':>8}",
    ]
    for turn in turns:
        lines.append(
            f"{turn.way:<20} {turn.ttft_s:>8.2f} s {turn.first_sound_s:>8.2f} s, {turn.first_sound_codes:>4} codes"
            f" {turn.audio_rtf:>7.2f} {turn.underrun_s:>7.2f} s {turn.audio_s:>5.1f} s {turn.total_s:>6.1f} s"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the result if asked; returns the exit code."""
    parser = argparse.ArgumentParser(description="First word, first sound and rates of whole turns, by speech mode.")
    parser.add_argument("clip", nargs="?", type=Path, default=CLIP)
    parser.add_argument("--model", default="demo", help="a folder, a hub id or demo (default: demo)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file, too")
    chosen = parser.parse_args(arguments)
    messages = [{"role": "user", "content": [{"type": "video", "video": str(chosen.clip)}]}]
    try:
        with OmniRuntime.open(chosen.model, device=chosen.device) as omni:
            turns, rates = measure_turns(omni, messages, SAMPLING, speech_ways(SPEECH, chosen.modes, chosen.solvers))
            card = _card(omni, chosen)
    except LowVRAMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    result: Mapping[str, Any] = {"card": card, "rates": asdict(rates), "turns": [asdict(turn) for turn in turns]}
    if chosen.output:
        write_result(chosen.output, result)
    print(json.dumps(result) if chosen.json else "\n".join([*card_lines(card), "", table(turns, rates)]))
    return 0


def _answer(omni: OmniRuntime, messages: Any, sampling: SamplingParams, speech: SpeechParams | None) -> Finished:
    *_, finished = omni.generate(messages, sampling=sampling, speech=speech)
    assert isinstance(finished, Finished)
    return finished


def _turn(params: SpeechParams, finished: Finished) -> Turn:
    evaluations = len(solver_stages(params.solver, time_grid(params.steps)))
    assert finished.audio_rtf is not None, "no code was said: choose another seed"
    return Turn(
        way=f"{params.mode}, {params.solver}",
        ttft_s=finished.timings["ttft"],
        first_sound_s=finished.timings["audio_ttfp"],
        first_sound_codes=min(first_sound_codes(evaluations, params.mode, params.chunk_s), len(finished.codec_ids)),
        audio_rtf=finished.audio_rtf,
        underrun_s=finished.audio_underrun_s,
        audio_s=finished.audio_s,
        total_s=finished.timings["total"],
    )


def bytes_per_s(omni: OmniRuntime) -> float:
    """Measured while the runtime gives its device away: residents may have left no room for what is read."""
    device = omni.device.torch
    omni.release()
    read = fastest_read(device)
    fastest_s = min(seconds(read.work, device) for _ in range(READS))
    omni.resume()
    return read.n_bytes / fastest_s


def _card(omni: OmniRuntime, chosen: argparse.Namespace) -> dict[str, Any]:
    return make_card(
        omni.device.title,
        model=Path(chosen.model).name,
        clip=chosen.clip.name,
        threads=torch.get_num_threads(),
        max_tokens=SAMPLING.max_tokens,
        max_codes=SPEECH.sampling.max_tokens,
        speech_dtype=SPEECH.dtype,
    )


if __name__ == "__main__":
    sys.exit(main())
