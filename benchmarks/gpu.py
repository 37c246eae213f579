"""Everything that only a CUDA card can show, in one run and one file: what fails, what is held, how fast it is.

    python benchmarks/gpu.py [--weights DIR] [--device cuda] [--only SECTION ...] [-o results/gpu.json]

Only this repository and the installed packages are reached; weights of the true 7B shape (12 GB in the folder that
TMPDIR names, which must be on a disk, not in memory) are made on the spot where none are given, beside the sections
that need none. `--minutes` bounds the last and longest section, memory, which begins no row after them and names those
it left out. Where a card is lent by the minute, make the weights before with synthetic.py, and take some sections at a
time. A speed stands beside its floor: the time in which the same card reads the bytes that the step reads. On a CPU
(`--device cpu`) the same steps are gone through with the demo, so that a first run on a card is not spent on typing
errors; those figures mean nothing, and what only a card can be tested for is collected and not run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import psutil
import torch
import wheels
from harness import card_lines, make_card, write_result
from launches import babble, draw_options
from turn_times import CLIP, SAMPLING, SPEECH, bytes_per_s, measure_turns, speech_ways

from lowvram import AudioChunk, LowVRAMError, OmniRuntime, TextDelta
from lowvram.demo import demo_folder
from lowvram.device import open_device
from lowvram.graphs import CapturedSteps, Stepping, one_by_one, open_recorder
from lowvram.offload.plan import Phase, Placement
from lowvram.options import MODES
from lowvram.room import Control, Room
from lowvram.sampling import Sampler
from lowvram.talker import Talker

T = TypeVar("T")

HERE = Path(__file__).parent
TESTS = tuple(HERE.parent / "tests" / name for name in ("test_cuda.py", "offload/test_streams.py"))
"""Where there is something for a card alone."""

MESSAGES = [{"role": "user", "content": [{"type": "video", "video": str(CLIP)}]}]
QUESTION = [{"role": "user", "content": "What is a codec?"}]

COPY_BYTES = 2**28
"""Of one timed copy: past every cache, small beside any card."""

ROUNDS = 10
TOKENS_PER_ROUND = 200
STEPS_PER_TOKEN = 2
"""A token is read, and the next one drawn."""

WARM_CODES = 8
"""Not timed: kernels are loaded and a step is captured."""

TRACE_BYTES = 5 * 2**28
"""Of a process that traces: one of 60 s in 8 GiB took 1.08 GiB at its peak, most of it libraries."""

GIVE_UP_S = 900
"""On a program that hangs. The card's tests alone, some 60 answers of 100,000 operators each, may take half of it."""

TOLD_CHARACTERS = 8000
"""Of what a program printed: a card may be lent once, and what failed there must be understood afterwards."""

FAILURES = (LowVRAMError, RuntimeError, AssertionError, ArithmeticError, LookupError, OSError)
"""What a section may end in: a card's own errors, an answer that ended too soon to be timed, a full disk."""


@dataclass(frozen=True)
class Bench:
    """Where to measure: a torch device by name, and the folder of a checkpoint, which `making` may be at work on. All
    should be done by `until_s`, on the clock of `time.monotonic`."""

    device: str
    folder: Path
    making: subprocess.Popen[bytes] | None = None
    until_s: float = math.inf

    @property
    def on_card(self) -> bool:
        return self.device.startswith("cuda")

    @cached_property
    def weights(self) -> Path:
        """The folder, once all is in it. Raises RuntimeError where making it failed."""
        if self.making is not None and self.making.wait():
            raise RuntimeError(f"no weights: synthetic.py ended with {self.making.returncode}")
        return self.folder

    @property
    def left_s(self) -> float:
        """Seconds until all should be done."""
        return max(0.0, self.until_s - time.monotonic())

    def open(self, vram: str | int | None = None) -> OmniRuntime:
        return OmniRuntime.open(self.weights, vram=vram, device=self.device)


def missing(bench: Bench) -> dict[str, Any]:
    """Wheels by name that are not here, so that whoever carries them knows which."""
    return wheels.missing()


def suite(bench: Bench) -> dict[str, Any]:
    """The card's tests: attention, parity under every cut and placement, memory given back, copies beside computing."""
    return _pytest(bench)


def races(bench: Bench) -> dict[str, Any]:
    """Streamed layers under torch's CUDA sanitizer, which must report copies that race with what reads them, and does
    so where a wait is left out. No number is looked at: over stub.py all of these tests pass, too."""
    return _pytest(bench, "-k", "sanitizer", environment={"TORCH_CUDA_SANITIZER": "1"})


def kernels(bench: Bench) -> dict[str, Any]:
    """4-bit products at the model's shapes beside a 16-bit linear and a copy."""
    return _kernels(bench, bits=4)


def int8_kernels(bench: Bench) -> dict[str, Any]:
    """The same in 8 bits."""
    return _kernels(bench, bits=8)


def _kernels(bench: Bench, bits: int) -> dict[str, Any]:
    brief = () if bench.on_card else ("--shape", "128x64", "--rows", "1", "--threads", "1", "--rounds", "1")
    return _python(str(HERE / "kernels.py"), "--bits", str(bits), "--device", bench.device, *brief, "--json")


def memory(bench: Bench) -> dict[str, Any]:
    """Planned, traced and measured peaks by phase, for three lengths of clip and four budgets, the hardest first."""
    arguments = memory_arguments(bench)
    last_row_s = bench.left_s + GIVE_UP_S if bench.on_card else GIVE_UP_S
    return _python(str(HERE / "memory.py"), *arguments, give_up_s=last_row_s)


def memory_arguments(bench: Bench) -> tuple[str, ...]:
    """What `memory` asks of memory.py; on a card each row is kept as it comes, should time run out."""
    if not bench.on_card:
        return ("--trace", "demo", "--seconds", "1", "--budgets", "2GiB", "--no-speech", "--json")
    weights = str(bench.weights)  # waits until they are made: what is left of the time is known after that
    clips_and_budgets = ("--seconds", "60", "15", "30", "--budgets", "8GiB", "6GiB", "12GiB", "16GiB")
    brief = ("--max-tokens", str(SAMPLING.max_tokens), "--max-codes", str(SPEECH.sampling.max_tokens))
    kept = ("--json", "-o", str(HERE / "results" / "gpu-memory.json"))
    time_ = ("--minutes", f"{bench.left_s / 60:.2f}", "--jobs", str(_jobs()))
    return ("--trace", "7b-awq", "--weights", weights, *clips_and_budgets, *brief, *kept, *time_)


def _jobs() -> int:
    """Processes that trace beside the one that measures: on half the cores, in half the memory that is free."""
    return max(1, min((os.cpu_count() or 1) // 2, psutil.virtual_memory().available // 2 // TRACE_BYTES))


def overhead(bench: Bench) -> dict[str, float]:
    """Microseconds of Python that the executor adds to a decoded token while all its weights stay: each block entered
    and left, and each step asked for."""
    with bench.open() as omni:
        machine, workload = omni._machine, omni._workload(omni.measure(QUESTION).size, SAMPLING, SPEECH, None)
        replan = partial(omni._plan, workload)
        plan = replan(omni.budget)
        room = Room(
            machine.residency,
            machine.device,
            machine.trim,
            machine.free_bytes,
            Control(omni.budget),
            plan,
            replan,
        )
        next(room.phases())
        list(room.load())
        uses = [use for name in ("thinker", "lm_head") for use in machine.residency.component(name)]

        def walk() -> None:
            for use in uses:
                with use:
                    pass

        walk_us, step_us = _microseconds(walk), _microseconds(lambda: room.attempt(int))
        room.leave()
    return {
        "blocks": len(uses),
        "walk_us": walk_us,
        "step_us": step_us,
        "token_us": walk_us + STEPS_PER_TOKEN * step_us,
    }


def rates(bench: Bench) -> dict[str, float]:
    """Bytes per second: the device reading and writing its own memory, and taking what the host has."""
    device = torch.device(bench.device)
    here = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    there, pageable = torch.empty_like(here), torch.zeros(COPY_BYTES, dtype=torch.uint8)
    sources = {"pageable_to_device": pageable}
    if bench.on_card:
        sources["pinned_to_device"] = pageable.pin_memory()
    copies = {"device_read_and_write": lambda: there.copy_(here)}
    copies |= {name: partial(here.copy_, source, non_blocking=True) for name, source in sources.items()}
    moved = {name: COPY_BYTES * (2 if name.startswith("device") else 1) for name in copies}
    return {name: moved[name] / _seconds(copy, bench) for name, copy in copies.items()}


def speed(bench: Bench) -> dict[str, Any]:
    """First word, first sound, tokens and codes a second with everything resident, in every speech mode."""
    with bench.open() as omni:
        turns, rates = measure_turns(omni, MESSAGES, SAMPLING, speech_ways(SPEECH, MODES, ["euler"]))
    return {"rates": asdict(rates), "turns": [asdict(turn) for turn in turns]}


def graphs(bench: Bench) -> dict[str, Any]:
    """Codes a second of the talker alone: one by one, in the fixed shapes of a captured step, and captured.

    The last two are the same kernels on the same numbers and must say the same; the first merges no tail, and may part
    from them where rounding decides.
    """
    with bench.open() as omni:
        ceiling = bytes_per_s(omni) / omni._footprint.component_bytes("talker")
        residency, device = omni._machine.residency, omni._machine.device
        list(residency.enter(Phase("talk", ("talker",), {"talker": Placement.PHASE}, 0, 0, 0, 0)))
        whereabouts = partial(residency.whereabouts, "talker")
        ways: dict[str, Stepping] = {"one by one": one_by_one, "fixed shapes": CapturedSteps(Uncaptured(), whereabouts)}
        if recorder := open_recorder(device):
            ways["captured"] = CapturedSteps(recorder, whereabouts)
        said = {way: _codes_and_their_rate(omni, stepping) for way, stepping in ways.items()}
    return {
        "codes_per_s": {way: rate for way, (_, rate) in said.items()},
        "codes_per_s_ceiling": ceiling,
        "alike_codes": {way: _alike(codes, said["fixed shapes"][0]) for way, (codes, _) in said.items()},
    }


def _alike(codes: Sequence[int], others: Sequence[int]) -> int:
    """How many are the same until the first that is not."""
    return next((n for n, (one, other) in enumerate(zip(codes, others, strict=False)) if one != other), len(codes))


class Uncaptured:
    """Computes what a recorder would capture."""

    def capture(self, step: Callable[[], T]) -> Callable[[], T]:
        return step


def _codes_and_their_rate(omni: OmniRuntime, stepping: Stepping) -> tuple[list[int], float]:
    """Codes drawn with one seed, and how many came in a second from the `WARM_CODES`-th on."""
    machine = omni._machine
    *layers, rest = machine.residency.component("talker")
    speech = machine.model.speech
    assert speech
    sampler = Sampler(SPEECH.sampling, device=machine.device, seed=0, **draw_options(speech))
    codes, said = (
        babble(Talker(speech, layers, rest, stepping=stepping), sampler, SPEECH.sampling.max_tokens, machine.device),
        [],
    )
    began_s = 0.0
    for code in codes:
        said.append(code)
        if len(said) == WARM_CODES:
            began_s = time.perf_counter()
    return said, (len(said) - WARM_CODES) / (time.perf_counter() - began_s)


def guest(bench: Bench) -> dict[str, Any]:
    """Another program takes the card's free memory in mid-answer and gives it back: the answer must not change.

    Unless steps that were captured are not any more: in 16 bit those may part where rounding decides, as `graphs` says.
    """
    with bench.open() as omni:
        undisturbed = _ids(omni.generate(MESSAGES, sampling=SAMPLING, speech=SPEECH))
        disturbed = _ids(_with_a_guest(omni.generate(MESSAGES, sampling=SAMPLING, speech=SPEECH), bench))
        omni.release()
        held_bytes = torch.cuda.memory_allocated(bench.device) if bench.on_card else 0
        omni.resume()
    return {
        "same_answer": disturbed == undisturbed,
        "alike_text_and_codec_ids": [_alike(*pair) for pair in zip(disturbed, undisturbed, strict=True)],
        "held_after_release_bytes": held_bytes,
    }


def _with_a_guest(events: Iterator[Any], bench: Bench) -> Iterator[Any]:
    taken: list[torch.Tensor] = []
    for event in events:
        yield event
        if isinstance(event, TextDelta) and bench.on_card and not taken:
            free_bytes, _ = torch.cuda.mem_get_info(bench.device)
            taken.append(torch.empty(int(free_bytes * 0.98), dtype=torch.uint8, device=bench.device))
        if isinstance(event, AudioChunk):
            taken.clear()


def _ids(events: Iterator[Any]) -> tuple[Any, Any]:
    *_, finished = events
    return finished.text_ids, finished.codec_ids


def _seconds(copy: Callable[[], Any], bench: Bench) -> float:
    """The fastest of some rounds."""
    return min(_once(copy, bench) for _ in range(ROUNDS))


def _microseconds(work: Callable[[], Any]) -> float:
    """Of one call, on the host, in the fastest of some rounds."""

    def round_s() -> float:
        began_s = time.perf_counter()
        for _ in range(TOKENS_PER_ROUND):
            work()
        return time.perf_counter() - began_s

    return 1e6 * min(round_s() for _ in range(ROUNDS)) / TOKENS_PER_ROUND


def _once(copy: Callable[[], Any], bench: Bench) -> float:
    wait = partial(torch.cuda.synchronize, bench.device) if bench.on_card else lambda: None
    wait()
    began_s = time.perf_counter()
    copy()
    wait()
    return time.perf_counter() - began_s


def _pytest(bench: Bench, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    dry = () if bench.on_card else ("--collect-only",)
    return _python("-m", "pytest", "-q", *dry, *arguments, *map(str, TESTS), environment=environment)


def _python(
    *arguments: str, environment: Mapping[str, str] | None = None, give_up_s: float = GIVE_UP_S
) -> dict[str, Any]:
    """A Python program's exit code, and what it printed: parsed if it is JSON, and what it warned of beside that; else
    the end of both. One that is not done in time has failed, and what it had printed by then is told, too."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            timeout=give_up_s,
        )
    except subprocess.TimeoutExpired as late:
        return {"failed": f"not done after {give_up_s:g} s", "printed": _end(late.stdout) + _end(late.stderr)}
    warned = _end(done.stderr)
    try:
        said = {"printed": json.loads(done.stdout)} | ({"warned": warned} if warned else {})
    except ValueError:
        said = {"printed": _end(done.stdout) + warned}
    return {"exit_code": done.returncode, **said}


def _end(printed: bytes | None) -> str:
    return (printed or b"").decode("utf-8", "replace")[-TOLD_CHARACTERS:]


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    section.__name__: section
    for section in (missing, suite, races, overhead, kernels, int8_kernels, rates, graphs, speed, guest, memory)
}
"""Those that need no weights and time nothing come first, while the weights are made."""


@contextmanager
def _bench(given: Path | None, device: str, minutes: float) -> Iterator[Bench]:
    """With the checkpoint that was given, else one of the true 7B shape for a card and the demo for a CPU."""
    until_s = time.monotonic() + 60 * minutes
    if given is not None or not device.startswith("cuda"):
        yield Bench(device, given or demo_folder(), until_s=until_s)
        return
    with TemporaryDirectory() as folder:
        made = Path(folder) / "7b-awq"
        making = subprocess.Popen([sys.executable, str(HERE / "synthetic.py"), str(made)], stdout=subprocess.DEVNULL)
        try:
            yield Bench(device, made, making, until_s)
        finally:
            making.kill()
            making.wait()


def run_section(section: Callable[[Bench], dict[str, Any]], bench: Bench) -> dict[str, Any]:
    """A section's result and its seconds; one that fails says how, and the others still run."""
    began_s = time.perf_counter()
    try:
        result = section(bench)
    except FAILURES as error:
        result = {"failed": f"{type(error).__name__}: {error}"}
    return result | {"took_s": round(time.perf_counter() - began_s, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print them as they come, keep all in one file; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a checkpoint's folder (default: made on the spot)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu; of several cards CUDA_VISIBLE_DEVICES chooses")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--minutes", type=float, default=7.0, help="when memory begins no further row (default: 7)")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file")
    chosen = parser.parse_args(arguments)
    title = open_device(chosen.device).title
    results: dict[str, Any] = {}
    with _bench(chosen.weights, chosen.device, chosen.minutes) as bench:
        card = make_card(title, weights=bench.folder.name)
        print("\n".join(card_lines(card)), flush=True)
        for name in chosen.only:
            results[name] = run_section(SECTIONS[name], bench)
            print(f"\n{name}: {json.dumps(results[name], indent=2)}", flush=True)
            if chosen.output:
                write_result(chosen.output, {"card": card, **results})
    return int(any("failed" in result or result.get("exit_code") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
