"""How long each question of a conversation about a clip waits for its first word, read whole and with what is known.

    python benchmarks/conversation.py [CLIP] [--model demo] [--remember 4GiB] [--json] [-o conversation.json]

The same questions are asked twice, of a runtime that remembers nothing and of one that keeps what it has read; both
answer in text, from one seed. A first answer beforehand brings weights and kernels. Times are those that `Finished`
reports, in one run. That both say the same is for `tests/test_recall.py` to show.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import card_lines, make_card, write_result
from turn_times import CLIP

from lowvram import Finished, LowVRAMError, OmniRuntime, SamplingParams

QUESTIONS = ("What happens here?", "Who is it?", "And then?")
SAMPLING = SamplingParams(max_tokens=16, seed=1)


@dataclass(frozen=True)
class Waited:
    """One question: the tokens of its prompt, how many of them were known, and the seconds to the first word."""

    prompt_tokens: int
    recalled_tokens: int
    whole_ttft_s: float
    ttft_s: float


def converse(omni: OmniRuntime, clip: Path) -> Iterator[Finished]:
    """Ask one question after another, each with all that was said before."""
    said: list[dict[str, Any]] = []
    media = [{"type": "file", "file": clip}]
    for question in QUESTIONS:
        said.append({"role": "user", "content": [*media, {"type": "text", "text": question}]})
        finished = answer(omni, said)
        yield finished
        said.append({"role": "assistant", "content": finished.text})
        media = []


def answer(omni: OmniRuntime, messages: Sequence[Any]) -> Finished:
    *_, finished = omni.generate(messages, sampling=SAMPLING, speech=None)
    assert isinstance(finished, Finished)
    return finished


def measure(chosen: argparse.Namespace) -> tuple[list[Waited], dict[str, Any]]:
    """Both conversations, and the card."""
    rounds: list[list[Finished]] = []
    for remember in (None, chosen.remember):
        with OmniRuntime.open(chosen.model, device=chosen.device, remember=remember) as omni:
            answer(omni, [{"role": "user", "content": "hello"}])
            rounds.append(list(converse(omni, chosen.clip)))
            card = make_card(
                omni.device.title,
                model=Path(chosen.model).name,
                clip=chosen.clip.name,
                threads=torch.get_num_threads(),
                max_tokens=SAMPLING.max_tokens,
                remember=chosen.remember,
            )
    waits = [
        Waited(known.prompt_tokens, known.recalled_tokens, whole.timings["ttft"], known.timings["ttft"])
        for whole, known in zip(*rounds, strict=True)
    ]
    return waits, card


def table(waits: Sequence[Waited]) -> str:
    """For people."""
    lines = [f"{'question':>8} {'prompt':>14} {'known':>8} {'first word':>12} {'read whole':>12}"]
    for number, wait in enumerate(waits, start=1):
        lines.append(
            f"{number:>8} {wait.prompt_tokens:>7} tokens {wait.recalled_tokens:>8} {wait.ttft_s:>10.2f} s"
            f" {wait.whole_ttft_s:>10.2f} s"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the result if asked; returns the exit code."""
    parser = argparse.ArgumentParser(description="First words of a conversation, read whole and with what is known.")
    parser.add_argument("clip", nargs="?", type=Path, default=CLIP)
    parser.add_argument("--model", default="demo", help="a folder, a hub id or demo (default: demo)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--remember", default="auto", help="host memory for what was read")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file, too")
    chosen = parser.parse_args(arguments)
    try:
        waits, card = measure(chosen)
    except LowVRAMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    result = {"card": card, "questions": [asdict(wait) for wait in waits]}
    if chosen.output:
        write_result(chosen.output, result)
    print(json.dumps(result) if chosen.json else "\n".join([*card_lines(card), "", table(waits)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
