"""Peak memory of one turn, phase by phase: what the plan promised beside what the run held.

    python benchmarks/memory.py [CLIP] [--model demo] [--vram 8GiB] [--json] [-o results/memory.json]

On CUDA the device's allocator is asked; on a CPU live tensors are tracked, which is slow and counts the host's share,
too. A plan is no measurement: the two never share a column.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import card_lines, make_card, write_result
from transformers.utils import logging

from lowvram import Finished, LowVRAMError, OmniRuntime, SamplingParams, SpeechParams
from lowvram.device import open_device
from lowvram.offload.meter import TRACKED_LIVE_TENSORS, LiveBytes
from lowvram.offload.profile import MemoryProfile
from lowvram.options import TALKER_SAMPLING

CLIP = Path(__file__).parent.parent / "examples" / "clip.mp4"
NOTES = {
    TRACKED_LIVE_TENSORS: "Tracked live tensors hold the host's share, too (buffers that weights are read through,"
    " pictures, the prompt's rows); the plan counts the device's alone."
}


def measure(
    clip: Path, *, model: str, vram: str | None, device: str, max_tokens: int, max_codes: int
) -> tuple[dict[str, Any], MemoryProfile]:
    """Answer once about `clip` in text and speech (greedy text, seed 0); returns the turn's card and its peaks."""
    messages = [{"role": "user", "content": [{"type": "video", "video": str(clip)}]}]
    sampling = SamplingParams(max_tokens=max_tokens, seed=0)
    speech = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=max_codes))
    ledger = LiveBytes() if open_device(device).torch.type == "cpu" else None
    counting: AbstractContextManager[Any] = ledger or nullcontext()
    with OmniRuntime.open(model, vram=vram, device=device, meter=ledger) as omni:
        plan = omni.plan(messages, sampling=sampling, speech=speech)
        with counting:
            *_, finished = omni.generate(messages, sampling=sampling, speech=speech)
        assert isinstance(finished, Finished)
        card = make_card(
            omni.device.title,
            model=model,
            clip=clip.name,
            vram=vram or "what was free",
            prompt_tokens=finished.prompt_tokens,
            text_tokens=len(finished.text_ids),
            codes=len(finished.codec_ids),
        )
    memory: Any = finished.memory
    return card, MemoryProfile.of(plan).add(memory["kind"], memory["peak_bytes"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the result if asked; returns the exit code."""
    parser = argparse.ArgumentParser(description="Peak memory of one turn by phase: planned beside measured.")
    parser.add_argument("clip", nargs="?", type=Path, default=CLIP, help="a video (default: %(default)s)")
    parser.add_argument("--model", default="demo", help="hub id, folder or demo (default: %(default)s)")
    parser.add_argument("--vram", help="budget, such as 8GiB (default: what is free)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--max-codes", type=int, default=100)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file, too")
    chosen = vars(parser.parse_args(arguments))
    as_json, output = chosen.pop("json"), chosen.pop("output")
    logging.set_verbosity_error()
    try:
        card, profile = measure(chosen.pop("clip"), **chosen)
    except LowVRAMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    result = {"card": card, "peak_bytes": profile.to_json()}
    if output:
        write_result(output, result)
    notes = [note for kind, note in NOTES.items() if kind in profile.columns]
    print(json.dumps(result) if as_json else "\n".join([*card_lines(card), "", str(profile), *notes]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
