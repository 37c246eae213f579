"""Everything that only a CUDA card can show, in one run and one file: what fails, what is held, how fast it is.

    python benchmarks/gpu.py [--weights DIR] [--device cuda] [--only SECTION ...] [-o results/gpu.json]

Only this repository and the installed packages are reached; weights of the true 7B shape are made on the spot where
none are given. A speed stands beside its floor: the time in which the same card reads the bytes that the step reads. On
a CPU (`--device cpu`) the same steps are gone through with the demo, so that a first run on a card is not spent on
typing errors; those figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import card_lines, make_card, write_result

from lowvram import AudioChunk, Finished, LowVRAMError, OmniRuntime, SamplingParams, SpeechParams, TextDelta
from lowvram.demo import demo_folder
from lowvram.device import open_device
from lowvram.options import TALKER_SAMPLING

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests" / "test_cuda.py"
CLIP = HERE.parent / "examples" / "clip.mp4"

NEEDED = ("torch", "transformers", "av", "safetensors", "tokenizers", "soundfile", "soxr", "psutil", "pytest")
OPTIONAL = ("cuda.core",)

MESSAGES = [{"role": "user", "content": [{"type": "video", "video": str(CLIP)}]}]
SAMPLING = SamplingParams(max_tokens=48, seed=1)
SPEECH = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=240, seed=1))

COPY_BYTES = 2**28
"""Of one timed copy: past every cache, small beside any card."""

ROUNDS = 10
GIVE_UP_S = 400


@dataclass(frozen=True)
class Bench:
    """Where to measure: a torch device by name, and the folder of a checkpoint."""

    device: str
    weights: Path

    @property
    def on_card(self) -> bool:
        return self.device.startswith("cuda")

    def open(self, vram: str | int | None = None) -> OmniRuntime:
        return OmniRuntime.open(self.weights, vram=vram, device=self.device)


def missing(bench: Bench) -> dict[str, Any]:
    """Packages by name that are not here, so that whoever carries them knows which."""
    return {kind: [name for name in names if not _is_here(name)] for kind, names in _PACKAGES.items()}


def suite(bench: Bench) -> dict[str, Any]:
    """The card's tests: attention, parity under every cut and placement, memory given back."""
    return _python("-m", "pytest", "-q", str(TESTS))


def races(bench: Bench) -> dict[str, Any]:
    """Streamed layers under torch's CUDA sanitizer, which reports copies that race with what reads them."""
    return _python("-m", "pytest", "-q", "-k", "streamed", str(TESTS), environment={"TORCH_CUDA_SANITIZER": "1"})


def memory(bench: Bench) -> dict[str, Any]:
    """Planned, traced and measured peaks by phase, for three lengths of clip and four budgets."""
    if not bench.on_card:
        return _python(str(HERE / "memory.py"), "--device", "cpu", "--max-tokens", "2", "--max-codes", "12", "--json")
    clips_and_budgets = ("--seconds", "15", "30", "60", "--budgets", "6GiB", "8GiB", "12GiB", "16GiB")
    return _python(
        str(HERE / "memory.py"), "--trace", "7b-awq", "--weights", str(bench.weights), *clips_and_budgets, "--json"
    )


def rates(bench: Bench) -> dict[str, float]:
    """Bytes per second: the device reading and writing its own memory, and taking what the host has."""
    device = torch.device(bench.device)
    here = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    there, pageable = torch.empty_like(here), torch.zeros(COPY_BYTES, dtype=torch.uint8)
    sources = {"pageable_to_device": pageable}
    if bench.on_card:
        sources["pinned_to_device"] = pageable.pin_memory()
    copies = {"device_read_and_write": lambda: there.copy_(here)}
    copies |= {name: lambda source=source: here.copy_(source, non_blocking=True) for name, source in sources.items()}
    moved = {name: COPY_BYTES * (2 if name.startswith("device") else 1) for name in copies}
    return {name: moved[name] / _seconds(copy, bench) for name, copy in copies.items()}


def speed(bench: Bench) -> dict[str, Any]:
    """Tokens and codes a second with everything resident, beside the floor that the card's bandwidth sets."""
    bandwidth = rates(bench)["device_read_and_write"]
    with bench.open() as omni:
        list(omni.generate(MESSAGES, sampling=SAMPLING, speech=None))  # weights come, kernels are chosen
        *_, written = omni.generate(MESSAGES, sampling=SAMPLING, speech=None)
        *_, spoken = omni.generate(MESSAGES, sampling=SAMPLING, speech=SPEECH)
        read_bytes = _bytes_per_step(omni)
    assert isinstance(written, Finished) and isinstance(spoken, Finished)
    talking_s = spoken.timings["codes"] - spoken.timings["talk"]
    return {
        "text_tokens_per_s": (len(written.text_ids) - 1) / (written.timings["text"] - written.timings["ttft"]),
        "text_tokens_per_s_ceiling": bandwidth / read_bytes["thinker"],
        "codes_per_s_text_and_sound_included": len(spoken.codec_ids) / talking_s,
        "codes_per_s_ceiling": bandwidth / read_bytes["talker"],
        "audio_rtf": spoken.audio_rtf,
        "audio_underrun_s": spoken.audio_underrun_s,
        "timings": dict(spoken.timings),
    }


def guest(bench: Bench) -> dict[str, Any]:
    """Another program takes the card's free memory in mid-answer and gives it back: the answer must not change."""
    with bench.open() as omni:
        undisturbed = _ids(omni.generate(MESSAGES, sampling=SAMPLING, speech=SPEECH))
        disturbed = _ids(_with_a_guest(omni.generate(MESSAGES, sampling=SAMPLING, speech=SPEECH), bench))
        omni.release()
        held_bytes = torch.cuda.memory_allocated() if bench.on_card else 0
        omni.resume()
    return {"same_answer": disturbed == undisturbed, "held_after_release_bytes": held_bytes}


def _with_a_guest(events: Iterator[Any], bench: Bench) -> Iterator[Any]:
    taken: list[torch.Tensor] = []
    for event in events:
        yield event
        if isinstance(event, TextDelta) and bench.on_card and not taken:
            taken.append(torch.empty(int(torch.cuda.mem_get_info()[0] * 0.98), dtype=torch.uint8, device=bench.device))
        if isinstance(event, AudioChunk):
            taken.clear()


def _ids(events: Iterator[Any]) -> tuple[Any, Any]:
    *_, finished = events
    return finished.text_ids, finished.codec_ids


def _bytes_per_step(omni: OmniRuntime) -> dict[str, int]:
    """Weights that a text token and a code read."""
    footprint = omni._footprint
    return {
        "thinker": footprint.component_bytes("thinker") + footprint.component_bytes("lm_head"),
        "talker": footprint.component_bytes("talker"),
    }


def _seconds(copy: Callable[[], Any], bench: Bench) -> float:
    """The fastest of some rounds."""
    return min(_once(copy, bench) for _ in range(ROUNDS))


def _once(copy: Callable[[], Any], bench: Bench) -> float:
    wait = torch.cuda.synchronize if bench.on_card else lambda: None
    wait()
    began_s = time.perf_counter()
    copy()
    wait()
    return time.perf_counter() - began_s


def _is_here(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def _python(*arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A Python program's exit code, and what it printed: parsed if it is JSON, else its end."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=GIVE_UP_S,
    )
    try:
        printed: Any = json.loads(done.stdout)
    except ValueError:
        printed = (done.stdout + done.stderr)[-2000:]
    return {"exit_code": done.returncode, "printed": printed}


_PACKAGES = {"needed": NEEDED, "optional": OPTIONAL}
SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    section.__name__: section for section in (missing, suite, races, rates, speed, guest, memory)
}


@contextmanager
def _weights(given: Path | None, device: str) -> Iterator[Path]:
    """A checkpoint: the one given, else one of the true 7B shape for a card and the demo for a CPU."""
    if given is not None or not device.startswith("cuda"):
        yield given or demo_folder()
        return
    with TemporaryDirectory() as folder:
        made = Path(folder) / "7b-awq"
        subprocess.run([sys.executable, str(HERE / "synthetic.py"), str(made)], check=True)
        yield made


def run_section(section: Callable[[Bench], dict[str, Any]], bench: Bench) -> dict[str, Any]:
    """A section's result and its seconds; one that fails says how, and the others still run."""
    began_s = time.perf_counter()
    try:
        result = section(bench)
    except (LowVRAMError, RuntimeError, subprocess.TimeoutExpired) as error:
        result = {"failed": f"{type(error).__name__}: {error}"}
    return result | {"took_s": round(time.perf_counter() - began_s, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print them as they come, keep all in one file; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a checkpoint's folder (default: made on the spot)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file")
    chosen = parser.parse_args(arguments)
    title = open_device(chosen.device).title
    results: dict[str, Any] = {}
    with _weights(chosen.weights, chosen.device) as weights:
        card = make_card(title, weights=weights.name)
        print("\n".join(card_lines(card)), flush=True)
        for name in chosen.only:
            results[name] = run_section(SECTIONS[name], Bench(chosen.device, weights))
            print(f"\n{name}: {json.dumps(results[name], indent=2)}", flush=True)
            if chosen.output:
                write_result(chosen.output, {"card": card, **results})
    return int(any("failed" in result or result.get("exit_code") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
