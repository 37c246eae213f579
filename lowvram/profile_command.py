"""What `lowvram profile` does: an answer traced or measured -> its profile, printed, kept, and drawn beside another.

Tracing reads no weight and runs the real stages on tensors without data. Measuring answers for real: on CUDA the
allocator tells its peaks for free, on a CPU live tensors are tracked, which is slow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Headers, stored_dtype
from .contradictions import STAND_INS, refuse_to_overwrite
from .device import DTYPES, Device
from .events import Event, Finished
from .offload.budget import Budget, format_bytes
from .offload.meter import LiveBytes, Meter, open_meter
from .offload.profile import KINDS, MemoryProfile
from .options import Limits, MediaParams, SamplingParams, SpeechParams
from .planning import plan_without_loading
from .profile_file import MEANINGS, ProfileFile, card_lines, make_card, read_profile, write_file, write_profile
from .report import page
from .runtime import OmniRuntime
from .trace import trace_turn, traceable_model
from .workload import Workload

NO_DEVICE = "none: traced on tensors without data"
SLOW_TRACE = "tracing runs every stage once without data: about a minute or two"
SLOW_COUNT = "tracking live tensors watches every operator on the CPU: several times slower than answering"

NOTHING_YET = (("--vs", "--html"), *((option, "--trace") for option in STAND_INS))
"""Options of this command that mean something only beside another: media that nobody has cannot be measured."""


@dataclass(frozen=True)
class Asked:
    """What a measured answer is asked, as `OmniRuntime.generate` takes it; `speech` None is an answer in text."""

    messages: Sequence[Mapping[str, Any]]
    sampling: SamplingParams
    speech: SpeechParams | None
    media: MediaParams | None = None


@dataclass(frozen=True)
class Outputs:
    """Where a profile goes: a page, a file, and the profile it is shown beside."""

    html: Path | None = None
    kept: Path | None = None
    beside: ProfileFile | None = None

    @classmethod
    def of(cls, html: str | None, kept: str | None, beside: str | None, sources: Sequence[str]) -> Outputs:
        """Outputs by their names. Raises OptionError for a profile to compare with that is none, and for an output that
        would replace what is read."""
        for output in (html, kept):
            refuse_to_overwrite([*sources, *([beside] if beside else [])], output)
        other = read_profile(Path(beside)) if beside else None
        return cls(Path(html) if html else None, Path(kept) if kept else None, other)

    def write(self, recorded: ProfileFile) -> None:
        """Keep the profile and draw its page, as asked for. Raises OptionError where that is not possible."""
        if self.kept:
            write_profile(self.kept, recorded)
        if self.html:
            write_file(self.html, page(recorded, *([self.beside] if self.beside else [])))


def trace_answer(
    headers: Headers,
    work: Workload,
    budget: Budget,
    limits: Limits,
    *,
    speech: SpeechParams | None,
    dtype: str = "auto",
) -> ProfileFile:
    """The profile of an answer of `work` on a CUDA card of such a budget, traced at the checkpoint's full size.

    Raises InfeasibleBudgetError, and what `plan_without_loading` raises.
    """
    plan = plan_without_loading(headers, work.turn, budget, limits, dtype=dtype)
    stored = stored_dtype(headers.config) if dtype == "auto" else dtype
    model = traceable_model(headers, DTYPES.get(stored or "", DTYPES["float16"]))
    card = make_card(
        NO_DEVICE,
        model=headers.name,
        clip=_media_words([medium.name for medium in work.media]),
        budget=_budget_words(plan.budget_bytes),
        prompt_tokens=plan.prompt_tokens,
        speech=speech is not None,
    )
    return ProfileFile(plan, trace_turn(model, plan, work.turn, speech), card)


def open_counter(device: Device) -> Meter:
    """What counts on a device: a GPU's allocator; on a CPU a ledger of live tensors, which the answer waits for."""
    return LiveBytes() if device.torch.type == "cpu" else open_meter(device.torch)


def measure_answer(
    runtime: OmniRuntime,
    meter: Meter,
    asked: Asked,
    *,
    model: str,
    on_event: Callable[[Event], None] | None = None,
) -> ProfileFile:
    """Answer for real and count: `meter` is the one that `runtime` was opened with. Raises what `generate` raises."""
    plan = runtime.plan(asked.messages, sampling=asked.sampling, speech=asked.speech, media=asked.media)
    names = [medium.name for medium in runtime.measure(asked.messages, media=asked.media).media]
    finished = _follow(runtime, meter, asked, on_event or (lambda _: None))
    card = make_card(
        runtime.device.title,
        model=model,
        clip=_media_words(names),
        budget=_budget_words(plan.budget_bytes),
        prompt_tokens=finished.prompt_tokens,
        text_tokens=len(finished.text_ids),
        codes=len(finished.codec_ids),
    )
    return ProfileFile(plan, MemoryProfile.of(plan).add(meter.kind, meter.peaks, meter.timeline), card)


def profile_text(recorded: ProfileFile, *, as_json: bool = False) -> str:
    """A profile on a terminal: the card, the peaks by phase, the plan, and what each kind of figure is; or JSON."""
    if as_json:
        return json.dumps(recorded.to_json())
    card = (f"{name}: {words}" for name, words in card_lines(recorded.card))
    kinds = (f"{kind}: {MEANINGS[kind]}" for kind in KINDS if kind in recorded.profile.columns)
    return "\n".join([*card, "", str(recorded.profile), "", str(recorded.plan), "", *kinds])


def patience(meter: Meter | None) -> str:
    """Why counting so (None: by a trace) will take its time; nothing where it costs nothing."""
    return SLOW_TRACE if meter is None else SLOW_COUNT if isinstance(meter, LiveBytes) else ""


def _follow(runtime: OmniRuntime, meter: Meter, asked: Asked, on_event: Callable[[Event], None]) -> Finished:
    counting: AbstractContextManager[Any] = meter if isinstance(meter, LiveBytes) else nullcontext()
    event: Event | None = None
    with counting:
        for event in runtime.generate(asked.messages, sampling=asked.sampling, speech=asked.speech, media=asked.media):
            on_event(event)
    assert isinstance(event, Finished)
    return event


def _media_words(names: Sequence[str]) -> str:
    """Media by their last names: where they lie, and what a URL asks with, is nobody else's business."""
    return ", ".join(re.split(r"[/\\]", name.partition("?")[0])[-1] for name in names) or "no media"


def _budget_words(budget_bytes: int | None) -> str:
    return "no limit" if budget_bytes is None else format_bytes(budget_bytes)
