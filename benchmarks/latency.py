"""How soon speech sounds and what it costs: every mode and solver beside the reference's way, at the true size.

    python benchmarks/latency.py [--codes 150] [--rounds 3] [--json] [-o results/latency.json] [--picture latency.png]

token2wav alone, with random weights of the published shapes: codes cost nothing and are there when they are asked for,
so seconds are the decoder's own. Minutes on a CPU. Beside the wavefront and its kin stand the whole utterance by the
reference itself (RK4, 36 evaluations), by Euler's rule, and in chunks of 48 codes that see 24 before and 12 after them
(the authors' low-memory mode); all errors are against the whole Euler decode. Every round decodes once each way, each
round in another order; seconds are medians, and ratios are medians of those within a round. `--picture` draws each
way's error over the codes that its first sound waits for. The floor of a way is the time in which this machine, at the
rates that its card names, multiplies as much or reads the weights as often, whichever takes longer; an untimed decode
counts both. What each way holds is `speech_memory.py`'s to measure, what whole turns take `turn_times.py`'s.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from bandwidth import TRIALS, fastest_read, seconds
from figures import blank_figure
from harness import card_lines, make_card, write_result
from synthetic import SIZE_7B
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniToken2WavConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavModel
from transformers.utils import logging

from lowvram.demo import DemoSize
from lowvram.demo.config import MEL_BINS, SPEAKER_WIDTH, TINY, omni_config
from lowvram.demo.weights import Stored, draw
from lowvram.options import MODES, Solver, SpeechMode, SpeechParams
from lowvram.token2wav.conditioning import Speaker, condition
from lowvram.token2wav.ode import time_grid
from lowvram.token2wav.stream import decode_speech
from lowvram.token2wav.vocoder import StreamingVocoder
from lowvram.token2wav.windows import CODES_PER_SECOND, MEL_FRAMES_PER_CODE

PARAMS = SpeechParams(seed=0)
SEED = 0
SOLVERS = ("euler", "ab2")
"""Those that take 9 evaluations; RK4's 36 are measured as the reference takes them."""

COLOURS = {True: "#3f6fa3", False: "#b3401f"}
"""Ours, and others' ways."""

MATMUL_SIDE = 2048
"""Of the square matrices whose product shows the best rate."""

CHUNK_CODES, BEFORE_CODES, AFTER_CODES = 48, 24, 12

Pieces = Iterator[tuple[int, np.ndarray]]
"""How many codes had come in, and the sound that became final with them."""


Ways = Mapping[str, Callable[[], Pieces]]
"""Names of ways to decode one utterance, and what decodes it."""

REFERENCE, WHOLE = "reference, whole, rk4", "whole, euler"


@dataclass(frozen=True)
class Measured:
    """One way to decode an utterance. `work` counts evaluations per frame; `first_s` and `rtf` are compute seconds, to
    the first sample and per second of speech; `of_reference` and `of_whole` are its seconds by theirs, `spread` how far
    the rounds' `of_whole` are apart; `floor` is the share of its seconds that this machine's rates explain; `error` is
    of the sound, relative."""

    way: str
    first_codes: int
    first_s: float
    rtf: float
    of_reference: float
    of_whole: float
    spread: float
    floor: float
    work: float
    error: float


@dataclass(frozen=True)
class Work:
    """What a decode does: rows that go through the DiT's first layer, floating-point operations (those of activation
    functions left out), and bytes of weights that it reads: the DiT's layers at each pass, the vocoder's at each piece
    of sound."""

    rows: int
    flop: int
    weight_bytes: int


@dataclass(frozen=True)
class Rates:
    """What this machine does at best: multiplying matrices in float32, and reading."""

    flop_per_s: float
    bytes_per_s: float

    def floor_s(self, work: Work) -> float:
        """Less time it cannot take."""
        return max(work.flop / self.flop_per_s, work.weight_bytes / self.bytes_per_s)


@dataclass(frozen=True)
class Decoded:
    """One decode: the codes that its first sample waited for, seconds to that and to the last one, the sound [S]."""

    first_codes: int
    first_s: float
    seconds: float
    sound: np.ndarray


def load(size: DemoSize) -> Qwen2_5OmniToken2WavModel:
    """token2wav with the demo's random weights, which keep their inputs' variance."""
    config = omni_config(size, user_id=0, quantized=False, dtype="float32")["token2wav_config"]
    model: Any = Qwen2_5OmniToken2WavModel._from_config(
        Qwen2_5OmniToken2WavConfig(**config), attn_implementation="sdpa"
    ).eval()
    for name, weight in model.named_parameters():
        stored = Stored(f"token2wav.{name}", "F32", tuple(weight.shape))
        weight.data = torch.cat(list(draw(stored, size, SEED)))
    return model


def some_codes(size: DemoSize, codes: int) -> list[int]:
    return torch.randint(0, size.codes, (codes,), generator=torch.Generator().manual_seed(SEED)).tolist()


def some_speaker() -> Speaker:
    generator = torch.Generator().manual_seed(SEED)
    return Speaker(
        cond=torch.randn(1, SPEAKER_WIDTH, generator=generator),
        ref_mel=torch.randn(1, 300, MEL_BINS, generator=generator) * 2 - 4,
    )


def streamed(model: Any, codes: Sequence[int], params: SpeechParams) -> Pieces:
    """Our way, in a voice that is new."""
    dit, bigvgan = nullcontext(model.code2wav_dit_model), nullcontext(model.code2wav_bigvgan_model)
    voice = condition(dit, some_speaker(), params)
    for arrived, piece in enumerate(decode_speech(iter(codes), dit, bigvgan, voice, params, seed=SEED), start=1):
        yield min(arrived, len(codes)), piece


@torch.no_grad()
def whole_by_reference(model: Any, codes: Sequence[int], steps: int) -> Pieces:
    """The reference's token2wav as it is."""
    speaker = some_speaker()
    torch.manual_seed(SEED)
    sound = model(torch.tensor([codes]), speaker.cond, speaker.ref_mel, num_steps=steps)
    yield len(codes), sound.numpy()


@torch.no_grad()
def whole_by_euler(model: Any, codes: Sequence[int], steps: int) -> Pieces:
    """The reference's modules under Euler's rule."""
    mel = euler(model.code2wav_dit_model, codes, noise_of(len(codes)), steps, some_speaker())
    yield len(codes), model.code2wav_bigvgan_model(mel).numpy()


@torch.no_grad()
def chunks_by_euler(model: Any, codes: Sequence[int], steps: int) -> Pieces:
    """Chunks solved each for itself; the vocoder is our exact one."""
    sound, heard = StreamingVocoder(model.code2wav_bigvgan_model), 0
    for heard, mel in chunk_mels(model.code2wav_dit_model, codes, some_speaker(), steps):
        yield heard, sound.push(mel, last=False).numpy()
    yield heard, sound.push(mel[..., :0], last=True).numpy()


def chunk_mels(dit: Any, codes: Sequence[int], voice: Speaker, steps: int) -> Iterator[tuple[int, Tensor]]:
    """Each chunk, some codes before and after it heard along: the codes that had come in, and its mel [1, M, F]."""
    noise = noise_of(len(codes))
    for start in range(0, len(codes), CHUNK_CODES):
        end = min(start + CHUNK_CODES, len(codes))
        first, after = max(0, start - BEFORE_CODES), min(end + AFTER_CODES, len(codes))
        seen = slice(first * MEL_FRAMES_PER_CODE, after * MEL_FRAMES_PER_CODE)
        mel = euler(dit, codes[first:after], noise[:, seen], steps, voice)
        yield after, mel[..., (start - first) * MEL_FRAMES_PER_CODE : (end - first) * MEL_FRAMES_PER_CODE]


def noise_of(codes: int) -> Tensor:
    torch.manual_seed(SEED)
    return torch.randn([1, codes * MEL_FRAMES_PER_CODE, MEL_BINS])


@torch.no_grad()
def euler(dit: Any, codes: Sequence[int], x: Tensor, steps: int, voice: Speaker) -> Tensor:
    """Codes and noise [1, F, M] to mel [1, M, F] by the reference's forward over all of them."""
    for start, end in pairwise(torch.tensor(time_grid(steps), dtype=x.dtype)):
        spoken, null = dit(
            hidden_states=x,
            condition_vector=voice.ref_mel.to(x),
            speaker_embedding=voice.cond.to(x)[:, None].expand(-1, x.shape[1], -1),
            quantized_code=torch.tensor([codes]),
            time_step=start,
        ).chunk(2)
        x = x + (spoken + (spoken - null) * PARAMS.guidance) * (end - start)
    return x.mT


def decode_once(decode: Callable[[], Pieces]) -> Decoded:
    """Decode, and watch the clock."""
    heard: list[np.ndarray] = []
    first_codes, first_s = 0, 0.0
    started_s = time.perf_counter()
    for arrived, piece in decode():
        if len(piece) and not heard:
            first_codes, first_s = arrived, time.perf_counter() - started_s
        heard += [piece] if len(piece) else []
    return Decoded(first_codes, first_s, time.perf_counter() - started_s, np.concatenate(heard))


def count_work(decode: Callable[[], Pieces], model: Any) -> Work:
    """Decode, and count."""
    layers, vocoder = model.code2wav_dit_model.transformer_blocks, model.code2wav_bigvgan_model
    rows: list[int] = []
    hook = layers[0].ff.register_forward_hook(lambda _, __, output: rows.append(output.shape[0] * output.shape[1]))
    try:
        with FlopCounterMode(display=False) as counter:
            pieces = sum(len(piece) > 0 for _, piece in decode())
    finally:
        hook.remove()
    layer_bytes = sum(_bytes(layer.attn) + _bytes(layer.ff) for layer in layers)
    return Work(sum(rows), counter.get_total_flops(), len(rows) * layer_bytes + pieces * _bytes(vocoder))


def _bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def best_rates(measured: Sequence[Rates]) -> Rates:
    return Rates(max(rates.flop_per_s for rates in measured), max(rates.bytes_per_s for rates in measured))


def rates_here() -> Rates:
    """The best of some trials, with as many threads as torch uses now."""
    cpu, side = torch.device("cpu"), torch.randn(MATMUL_SIDE, MATMUL_SIDE)
    read = fastest_read(cpu)
    multiply_s = min(seconds(lambda: side @ side, cpu) for _ in range(TRIALS))
    read_s = min(seconds(read.work, cpu) for _ in range(TRIALS))
    return Rates(2 * MATMUL_SIDE**3 / multiply_s, read.n_bytes / read_s)


def all_ways(model: Any, codes: Sequence[int], modes: Iterable[str], solvers: Iterable[str], steps: int) -> Ways:
    """The reference's own, then the whole Euler decode, which errors refer to, then others' and ours."""
    ways: dict[str, Callable[[], Pieces]] = {
        REFERENCE: lambda: whole_by_reference(model, codes, steps),
        WHOLE: lambda: whole_by_euler(model, codes, steps),
        f"chunks {CHUNK_CODES}/{BEFORE_CODES}/{AFTER_CODES}, euler": lambda: chunks_by_euler(model, codes, steps),
    }
    for mode, solver in product(modes, solvers):
        params = replace(PARAMS, mode=cast(SpeechMode, mode), solver=cast(Solver, solver))
        ways[f"{mode}, {solver}"] = partial(streamed, model, codes, params)
    return ways


def compare(ways: Ways, model: Any, codes: int, rounds: int) -> tuple[list[Measured], Rates]:
    """Each way's figures over some rounds of all, and the best that the machine did meanwhile."""
    order, shuffled = list(ways), random.Random(SEED)
    works = {way: count_work(decode, model) for way, decode in ways.items()}
    decoded: dict[str, list[Decoded]] = {way: [] for way in ways}
    measured = []
    for _ in range(rounds):
        measured.append(rates_here())
        for way in order:
            decoded[way].append(decode_once(ways[way]))
        shuffled.shuffle(order)
    rates = best_rates(measured)
    return [_summed_up(way, works[way], decoded, codes, rates) for way in ways], rates


def _summed_up(way: str, work: Work, decoded: Mapping[str, Sequence[Decoded]], codes: int, rates: Rates) -> Measured:
    own, exact = decoded[way], decoded[WHOLE][0].sound
    of_whole, spent_s = _ratios(own, decoded[WHOLE]), median(one.seconds for one in own)
    return Measured(
        way=way,
        first_codes=own[0].first_codes,
        first_s=median(one.first_s for one in own),
        rtf=spent_s * CODES_PER_SECOND / codes,
        of_reference=median(_ratios(own, decoded[REFERENCE])),
        of_whole=median(of_whole),
        spread=max(of_whole) - min(of_whole),
        floor=rates.floor_s(work) / spent_s,
        work=work.rows / (2 * MEL_FRAMES_PER_CODE * codes),
        error=float(np.linalg.norm(own[0].sound - exact) / np.linalg.norm(exact)),
    )


def _ratios(own: Sequence[Decoded], others: Sequence[Decoded]) -> list[float]:
    """Seconds by another way's, round by round."""
    return [one.seconds / other.seconds for one, other in zip(own, others, strict=True)]


def table(results: Sequence[Measured]) -> str:
    """For people: each figure beside its ratio to the reference's and to the whole Euler decode's."""
    titles = f"{'RTF':>7} {'x ref':>6} {'x whole':>7} {'+-':>5} {'floor':>6} {'work':>6} {'x whole':>7} {'error':>8}"
    lines = [f"{'way':<26} {'first audio':>20} {titles}"]
    whole = results[1]
    for one in results:
        lines.append(
            f"{one.way:<26} {one.first_codes:>5} codes {one.first_s:>6.2f} s {one.rtf:>7.2f} {one.of_reference:>6.2f}"
            f" {one.of_whole:>7.2f} {one.spread / 2:>5.2f} {one.floor:>6.1%} {one.work:>6.2f}"
            f" {one.work / whole.work:>7.3f} {one.error:>8.1e}"
        )
    return "\n".join(lines)


def draw_errors(results: Sequence[Measured], card: Mapping[str, Any], output: Path) -> None:
    """Error against the whole Euler decode over the seconds of speech that must be known before the first sound, as a
    PNG: of the ways that solve by Euler's rule, so that it is the mode's error. Raises BackendError without matplotlib.
    """
    figure = blank_figure(7.2, 4.6)
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.set_xlabel("speech that must be known before the first sound, seconds")
    axes.set_ylabel("error of the sound, relative to decoding it whole")
    conditions = card["conditions"]
    told = f"size {conditions['size']}, {conditions['weights']} weights, {conditions['codes']} codes"
    axes.set_title(f"Euler's rule, {told}", fontsize=10)
    shown = sorted((one for one in results if one.way.endswith("euler") and one.error), key=lambda one: one.first_codes)
    for index, one in enumerate(shown):
        point = one.first_codes / CODES_PER_SECOND, one.error
        axes.plot(*point, marker="o", color=COLOURS[one.way.startswith(MODES)], clip_on=False)
        beside = (6, 6) if index % 2 else (6, -13)  # neighbours' names would overlap
        axes.annotate(one.way.removesuffix(", euler"), point, textcoords="offset points", xytext=beside, fontsize=9)
    axes.set_xlim(left=0, right=1.25 * shown[-1].first_codes / CODES_PER_SECOND)
    axes.margins(y=0.15)
    axes.grid(visible=True, which="major", alpha=0.3)
    figure.savefig(output, format="png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the result if asked; returns the exit code."""
    parser = argparse.ArgumentParser(description="Latency, work and error of every way to decode speech.")
    parser.add_argument("--codes", type=int, default=150, help="length of the speech, 50 a second (default: 150)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way decodes it (default: 3)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS)
    parser.add_argument("--tiny", action="store_true", help="a toy's sizes in place of the published ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file, too")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw error over latency (needs matplotlib)")
    parser.add_argument("--result", type=Path, metavar="FILE.json", help="draw and print this result, measure nothing")
    chosen = parser.parse_args(arguments)
    logging.set_verbosity_error()
    result = json.loads(chosen.result.read_text(encoding="utf-8")) if chosen.result else measure_all(chosen)
    if chosen.output:
        write_result(chosen.output, result)
    results = [Measured(**one) for one in result["ways"]]
    if chosen.picture:
        draw_errors(results, result["card"], chosen.picture)
    print(json.dumps(result) if chosen.json else "\n".join([*card_lines(result["card"]), "", table(results)]))
    return 0


def measure_all(chosen: argparse.Namespace) -> dict[str, Any]:
    """The card and every way that was chosen."""
    size = TINY if chosen.tiny else SIZE_7B
    model, codes = load(size), some_codes(size, chosen.codes)
    ways = all_ways(model, codes, chosen.modes, chosen.solvers, PARAMS.steps)
    results, rates = compare(ways, model, len(codes), chosen.rounds)
    card = make_card(
        f"CPU, {torch.get_num_threads()} thread(s)",
        size="a toy's" if chosen.tiny else "as published (7B)",
        weights="random",
        codes=len(codes),
        steps=PARAMS.steps,
        guidance=PARAMS.guidance,
        chunk_s=PARAMS.chunk_s,
        rounds=chosen.rounds,
        multiplies=f"{rates.flop_per_s / 1e9:.0f} GFLOP/s",
        reads=f"{rates.bytes_per_s / 1e9:.1f} GB/s",
    )
    return {"card": card, "ways": [asdict(one) for one in results]}


if __name__ == "__main__":
    sys.exit(main())
