"""How much of one checkpoint another one keeps: 4 bits beside 16, a fine-tune beside its parent.

    python benchmarks/quality.py REFERENCE CANDIDATE [--texts FILE] [--media DIR] [--wer DIR] [--choices FILE.jsonl]
                                 [--limit N] [--vram 8GiB] [--json] [-o results/quality.json]
    python benchmarks/quality.py --tiny

Checkpoints are hub ids, folders or `demo`. One after the other they answer the same prompts within the budget; the
candidate then reads the reference's answers and speaks its codes, so that both are asked about the same next tokens.
Texts are read bare, without a chat, and count at every position; media by the answer that the reference gives. What
waits on the host between the models is hidden states, and its size is printed; logits are those that each runtime
would sample from, in its compute dtype (`--dtype float32` leaves the weights alone to differ). With data at hand there
are word error rates and multiple choice, with 95 % intervals. `--tiny` tries everything out on a tiny checkpoint and
its rounded copy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from agreement import (
    POSITIONS_AT_ONCE,
    Divergence,
    Head,
    agreed_tokens,
    agreement_of_answers,
    divergence,
    divergence_of_rows,
    joined,
    log_spectral_distance,
    relative_error,
)
from choices import INSTRUCTION, Question, compare_choices, named_choice, read_questions
from harness import make_card, write_result
from prompts import KINDS, Prompt, at_most, media_prompts, text_prompts
from quality_table import lines_of
from rich.console import Console
from rich.progress import track
from teacher_forcing import Messages, Said, read_answer, read_words, say
from tiny_pair import build_pair
from torch import Tensor, nn
from transformers.utils import logging
from wer import NORMALIZATION, QUESTION, SYSTEM_PROMPT, Recording, compare_rates, count_errors, read_recordings

from lowvram import Finished, LowVRAMError, OmniRuntime, SamplingParams
from lowvram.errors import InfeasibleBudgetError, OptionError
from lowvram.offload.budget import MIB, format_bytes
from lowvram.offload.placement import Phase, Placement

T = TypeVar("T")

SEED = 0
CHOICE_TOKENS = 16
TRANSCRIPT_TOKENS = 512
"""Far more than half a minute of speech takes."""

LOGIT_COPIES = 8
"""Float64 tensors of logits that `agreement.divergence` holds at once, at most."""

PUBLISHED = {
    "source": "model card of Qwen/Qwen2.5-Omni-7B-AWQ",
    "columns": ("Qwen2.5-Omni-7B", "Qwen2.5-Omni-7B-AWQ"),
    "rows": {
        "LibriSpeech test-other, WER %": (3.4, 3.91),
        "WenetSpeech test-net, WER %": (5.9, 6.31),
        "Seed-TTS test-hard, WER %": (8.7, 8.88),
        "MMLU-Pro, accuracy %": (47.0, 45.66),
        "OmniBench, accuracy %": (56.13, 54.64),
        "VideoMME, accuracy %": (72.4, 72.0),
    },
}
"""What the authors measured with their own prompts, data and normalization, which are not all known here."""


@dataclass(frozen=True)
class Work:
    """What both models are put to, and bounds on what they say."""

    prompts: Sequence[Prompt]
    recordings: Sequence[Recording]
    questions: Sequence[Question]
    max_tokens: int
    max_codes: int


@dataclass(frozen=True)
class Thought:
    """A prompt as one model took it: its own greedy answer, and its hidden states [n, H], on the host, at the positions
    where distributions are compared."""

    answer: tuple[int, ...]
    hidden: Tensor


@dataclass(frozen=True)
class Testimony:
    """All that one model said and thought: per prompt, per text aloud, per recording, per question."""

    thoughts: Sequence[Thought]
    said: Sequence[Said]
    heard: Sequence[str]
    picks: Sequence[int | None]

    @property
    def host_bytes(self) -> int:
        """Of what is kept for the comparison."""
        hidden_bytes = sum(thought.hidden.nbytes for thought in self.thoughts)
        return hidden_bytes + sum(said.logits.nbytes + said.samples.nbytes for said in self.said)


def question(omni: OmniRuntime, work: Work, reference: Testimony | None = None) -> Testimony:
    """Put one model to the work. Given the `reference`'s testimony, it reads its answers and speaks its codes."""
    thoughts, said = [], []
    for index, prompt in enumerate(_each(work.prompts, "prompts")):
        before = reference.thoughts[index] if reference else None
        thoughts.append(_think(omni, prompt, work.max_tokens, before))
    speaking = [prompt.words for prompt in work.prompts if prompt.words] if omni.voices else []
    if reference:
        speaking = speaking[: len(reference.said)]  # none where the reference has no voices
    for index, words in enumerate(_each(speaking, "aloud")):
        codes = reference.said[index].codes if reference else None
        said.append(say(omni, words, codes, max_codes=work.max_codes, seed=SEED))
    heard = [
        _answer(omni, recording.messages(), TRANSCRIPT_TOKENS).text
        for recording in _each(work.recordings, "recordings")
    ]
    answers = (_answer(omni, asked.messages(), CHOICE_TOKENS).text for asked in _each(work.questions, "questions"))
    picks = [named_choice(answer, len(asked.choices)) for answer, asked in zip(answers, work.questions, strict=True)]
    return Testimony(thoughts, said, heard, picks)


def compare(work: Work, reference: Testimony, candidate: Testimony, heads: tuple[Head, Head]) -> dict[str, Any]:
    """The findings by section; None for one that had nothing to go by."""
    found: dict[str, Any] = {"next_token": {}, "answers": {}, "speech": None, "word_errors": None, "choices": None}
    pairs = list(zip(work.prompts, reference.thoughts, candidate.thoughts, strict=True))
    for kind in KINDS:
        same = [(one, other) for prompt, one, other in pairs if prompt.kind == kind]
        if same:
            parts = [divergence_of_rows(one.hidden, other.hidden, heads) for one, other in same]
            found["next_token"][kind] = joined(parts).summary()
            found["answers"][kind] = agreement_of_answers([(one.answer, other.answer) for one, other in same])
    if reference.said and candidate.said:
        found["speech"] = compare_speech(reference.said, candidate.said)
    if work.recordings:
        errors = [
            [count_errors(recording.transcript, text) for recording, text in zip(work.recordings, heard, strict=True)]
            for heard in (reference.heard, candidate.heard)
        ]
        found["word_errors"] = compare_rates(*errors)
    if work.questions:
        found["choices"] = compare_choices(work.questions, reference.picks, candidate.picks)
    return found


def compare_speech(reference: Sequence[Said], candidate: Sequence[Said]) -> dict[str, Any]:
    """The same texts in the same codes: how far the talkers' next-code distributions are apart at each, before any
    filter, and how far the sounds that both make of them from the same noise."""
    pairs = list(zip(reference, candidate, strict=True))
    parts: list[Divergence] = [divergence(one.logits, other.logits) for one, other in pairs]
    errors = [relative_error(one.samples, other.samples) for one, other in pairs]
    distances = [log_spectral_distance(one.samples, other.samples) for one, other in pairs]
    return {
        "texts": len(pairs),
        "codes": sum(len(one.codes) for one, _ in pairs),
        **joined(parts).summary(),
        "waveform_relative_error_max": max(errors),
        "log_spectral_distance_db_mean": sum(distances) / len(distances),
    }


@contextmanager
def both_heads(reference: OmniRuntime, candidate: OmniRuntime) -> Iterator[tuple[Head, Head]]:
    """Both models' output heads on the device, each in its own compute dtype, and nothing else of them."""
    runtimes = (reference, candidate)
    with ExitStack() as leaving:
        for omni in runtimes:
            residency, n_bytes = omni._machine.residency, omni._footprint.component_bytes("lm_head")
            leaving.callback(residency.leave)
            phase = Phase("compare", (), {"lm_head": Placement.PHASE}, n_bytes, 0, 0, n_bytes)
            for _ in residency.enter(phase):
                pass
        first, second = (partial(_apply, omni) for omni in runtimes)
        yield first, second


def require_room_for_heads(reference: OmniRuntime, candidate: OmniRuntime) -> None:
    """Raise InfeasibleBudgetError where a budget is smaller than what comparing will hold: both heads, some logits."""
    runtimes = (reference, candidate)
    vocabulary = max(len(omni._machine.model.embed_tokens) for omni in runtimes)
    needed_bytes = sum(omni._footprint.component_bytes("lm_head") for omni in runtimes)
    needed_bytes += LOGIT_COPIES * POSITIONS_AT_ONCE * vocabulary * torch.float64.itemsize
    available_bytes = min(omni.budget.vram_bytes or 0 for omni in runtimes)
    if needed_bytes > available_bytes:
        raise InfeasibleBudgetError(
            f"both models' output heads and {POSITIONS_AT_ONCE} positions' logits need {format_bytes(needed_bytes)},"
            f" but the budget is {format_bytes(available_bytes)}",
            phase="compare",
            needed_bytes=needed_bytes,
            available_bytes=available_bytes,
            hint=f"--vram {-(-needed_bytes // MIB)}MiB",
        )


def require_same_ids(reference: OmniRuntime, candidate: OmniRuntime, prompts: Sequence[Prompt]) -> None:
    """Raise OptionError where the models are not asked the same thing: their tokenizers or media options differ."""
    for prompt in prompts:
        one, other = (_ids(omni, prompt) for omni in (reference, candidate))
        if one != other:
            raise OptionError(
                f"the checkpoints read {prompt.name} as different ids, from position {agreed_tokens(one, other)} of"
                f" {len(one)} on",
                hint="distributions can be compared between models that share a tokenizer",
            )


def measure(reference: str, candidate: str, work: Work, *, vram: str | None, device: str, dtype: str) -> dict[str, Any]:
    """Everything, with its card."""
    opening: dict[str, Any] = {"vram": vram, "device": device, "dtype": dtype}
    with OmniRuntime.open(reference, **opening) as first, OmniRuntime.open(candidate, **opening) as second:
        require_room_for_heads(first, second)
        require_same_ids(first, second, work.prompts)
        _say(_name(reference))
        testimony = question(first, work)
        first.release()  # the candidate has the device to itself
        _say(_name(candidate))
        others = question(second, work, testimony)
        second.release()
        _say("comparing")
        with torch.inference_mode(), both_heads(first, second) as heads:
            found = compare(work, testimony, others, heads)
        conditions = _conditions(work) | {
            "kernels": " and ".join(f"{omni.kernel} in {_dtype(omni)}" for omni in (first, second)),
            "budget": format_bytes(second.budget.vram_bytes or 0),
            "kept on the host": format_bytes(testimony.host_bytes + others.host_bytes),
        }
        card = make_card(second.device.title, **conditions)
    names = {"reference": _name(reference), "candidate": _name(candidate)}
    return {"card": card, **names, **found, "published": PUBLISHED}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the result if asked; returns the exit code."""
    chosen = _parser().parse_args(arguments)
    logging.set_verbosity_error()
    try:
        result = _run(chosen)
    except LowVRAMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if chosen.output:
        write_result(chosen.output, result)
    print(json.dumps(result) if chosen.json else "\n".join(lines_of(result)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="How much of one checkpoint another one keeps.")
    parser.add_argument("reference", nargs="?", help="hub id, folder or demo")
    parser.add_argument("candidate", nargs="?", help="what is measured against it")
    parser.add_argument("--tiny", action="store_true", help="try it out: a tiny checkpoint and its 4-bit copy")
    parser.add_argument("--texts", type=Path, help="texts in a file, parted by empty lines (default: built in)")
    parser.add_argument("--media", type=Path, help="folder of pictures, sounds, videos (default: the example clip)")
    parser.add_argument("--wer", type=Path, help="folder of recordings with transcripts, as LibriSpeech has them")
    parser.add_argument("--choices", type=Path, help="multiple-choice questions, a JSON object a line")
    parser.add_argument("--limit", type=int, help="at most so many prompts of a kind, recordings, questions")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--max-codes", type=int, default=250, help="of a text read aloud (default: %(default)s)")
    parser.add_argument("--vram", help="each model's budget, such as 8GiB (default: what is free)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto (each checkpoint's own), float32, float16 or bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file, too")
    return parser


def _run(options: argparse.Namespace) -> dict[str, Any]:
    if options.limit is not None and options.limit < 1:
        raise OptionError(f"limit is {options.limit}, but at least 1 prompt is needed")
    if options.tiny == bool(options.reference) or (options.reference and not options.candidate):
        raise OptionError("a comparison takes 2 checkpoints", hint="REFERENCE and CANDIDATE, or --tiny without either")
    prompts = [
        *at_most(options.limit, text_prompts(options.texts)),
        *at_most(options.limit, media_prompts(options.media)),
    ]
    work = Work(
        prompts,
        read_recordings(options.wer, options.limit) if options.wer else (),
        read_questions(options.choices, options.limit) if options.choices else (),
        options.max_tokens,
        options.max_codes,
    )
    where = {"vram": options.vram, "device": options.device, "dtype": options.dtype}
    if not options.tiny:
        return measure(options.reference, options.candidate, work, **where)
    with TemporaryDirectory() as folder:
        whole, rounded = build_pair(Path(folder))
        return measure(str(whole), str(rounded), work, **where)


def _think(omni: OmniRuntime, prompt: Prompt, max_tokens: int, before: Thought | None) -> Thought:
    """One prompt's answer, and hidden states over its words or over the answer that came `before` this model's."""
    answer = _answer(omni, prompt.messages, max_tokens).text_ids
    if prompt.words:
        return Thought(answer, read_words(omni, prompt.words))
    return Thought(answer, read_answer(omni, prompt.messages, answer if before is None else before.answer))


def _ids(omni: OmniRuntime, prompt: Prompt) -> list[int]:
    """What a prompt is to the thinker."""
    if prompt.words:
        return omni.preprocessor.tokenize(prompt.words)
    with omni.preprocessor.open(prompt.messages) as opened:
        return opened.inputs.input_ids.tolist()


def _answer(omni: OmniRuntime, messages: Messages, max_tokens: int) -> Finished:
    """A greedy answer in text."""
    *_, finished = omni.generate(messages, sampling=SamplingParams(max_tokens=max_tokens), speech=None)
    assert isinstance(finished, Finished)
    return finished


def _apply(omni: OmniRuntime, hidden: Tensor) -> Tensor:
    """Logits [n, V] of hidden states [n, H] by the model's head, which is on the device."""
    (use,) = omni._machine.residency.component("lm_head")
    with use as head:
        assert isinstance(head, nn.Module)
        return head(hidden.to(omni.device.torch))


def _name(model: str) -> str:
    """A checkpoint as a result calls it: where a folder lies is nobody else's business."""
    return Path(model).name if Path(model).is_dir() else model


def _dtype(omni: OmniRuntime) -> str:
    return str(omni._machine.model.dtype).removeprefix("torch.")


def _conditions(work: Work) -> dict[str, Any]:
    counts = {kind: sum(prompt.kind == kind for prompt in work.prompts) for kind in KINDS}
    conditions: dict[str, Any] = {
        "prompts": ", ".join(f"{count} {kind}" for kind, count in counts.items() if count),
        "answers": f"greedy, at most {work.max_tokens} tokens",
        "speech": f"reference's codes from seed {SEED}, at most {work.max_codes} a text",
    }
    if work.recordings:
        conditions["recognition"] = f'"{SYSTEM_PROMPT}" "{QUESTION}", at most {TRANSCRIPT_TOKENS} tokens'
        conditions["word normalization"] = NORMALIZATION
    if work.questions:
        conditions["multiple choice"] = f'"{INSTRUCTION}", the first letter that stands alone'
    return conditions


def _each(items: Sequence[T], what: str) -> Iterable[T]:
    """The items, with a bar for people who wait."""
    return track(items, what, console=Console(stderr=True), disable=not items)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
