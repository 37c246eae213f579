"""The whole runtime on a simulated card: one short turn with every medium, to ask again under all kinds of pressure.

Two seams stand in for what a device brings with it besides memory. Random numbers come from the host's generator, so
that draws equal the CPU's. Attention that keeps its log-sum-exp is one kernel, as on CUDA: the runtime spells it out
on devices it does not know, with all scores at once, which no plan counts.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sim.device import DEVICE, Card, simulated_card
from test_turn import MEDIA, MESSAGES

from lowvram.device import Device
from lowvram.errors import InfeasibleBudgetError
from lowvram.events import AudioChunk, Event, Finished
from lowvram.offload.meter import NoMeter
from lowvram.offload.plan import Plan
from lowvram.offload.profile import TRACKED_LIVE_TENSORS
from lowvram.options import TALKER_SAMPLING, Limits, SamplingParams, SpeechParams
from lowvram.runtime import OmniRuntime
from lowvram.sampling import Sampler

PLENTY_BYTES = 2**40
SAMPLING = SamplingParams(max_tokens=6)
SPEECH = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=30, seed=11), steps=2, seed=7, chunk_s=0.48)
"""Two chunks of sound: one before all codes are known, and the rest."""


class HostSampler(Sampler):
    """A sampler whose random numbers are the host's."""

    def __init__(self, *args: Any, device: torch.device, **options: Any) -> None:
        super().__init__(*args, device=torch.device("cpu"), **options)
        self._suppressed = self._suppressed.to(device)
        self._seen = self._seen.to(device)


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the runtime calls on a CPU, on a card's tensors."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)


class CardMeter(NoMeter):
    """The card's own count, by phase, from its first allocation on: what is left of an earlier phase goes before.

    `weights` and `caches` are what the runtime says that it holds of them, at most; `ends` is how many allocations a
    turn had made by the end of each phase.
    """

    kind = TRACKED_LIVE_TENSORS

    def __init__(self, card: Card) -> None:
        super().__init__()
        self._card = card
        self._begun_at = 0
        self._phase = ""
        self.weights: dict[str, int] = {}
        self.caches: dict[str, int] = {}
        self.ends: dict[str, int] = {}

    def begin(self, held_bytes: int) -> None:
        self._begun_at = self._card.allocations
        for column in (self.peaks, self.weights, self.caches, self.ends):
            column.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._card.peak_bytes = 0
        self._phase = name
        try:
            yield
        finally:
            self.peaks[name] = max(self.peaks.get(name, 0), self._card.peak_bytes)
            self.ends[name] = self._card.allocations - self._begun_at

    def mark(self, label: str, weights_bytes: int, kv_bytes: int) -> None:
        self.weights[self._phase] = max(self.weights.get(self._phase, 0), weights_bytes)
        self.caches[self._phase] = max(self.caches.get(self._phase, 0), kv_bytes)


@dataclass(frozen=True)
class Answer:
    """What a turn came to: its summary and all its sound."""

    finished: Finished
    samples: np.ndarray

    @classmethod
    def of(cls, events: Iterable[Event]) -> Answer:
        *others, finished = events
        assert isinstance(finished, Finished)
        sound = [event.samples for event in others if isinstance(event, AudioChunk)]
        return cls(finished, np.concatenate(sound) if sound else np.zeros(0, np.float32))

    def says(self, other: Answer) -> bool:
        """The same ids and, bit for bit, the same sound."""
        mine, others = self.finished, other.finished
        ids = (mine.text_ids, mine.codec_ids) == (others.text_ids, others.codec_ids)
        return ids and np.array_equal(self.samples, other.samples)


@dataclass(frozen=True)
class Question:
    """What is asked, and how to answer it; `speech` None is for text alone."""

    messages: Sequence[Mapping[str, Any]]
    speech: SpeechParams | None

    def ask(self, omni: OmniRuntime) -> Iterator[Event]:
        return omni.generate(self.messages, sampling=SAMPLING, speech=self.speech, media=MEDIA)

    def answer(self, omni: OmniRuntime) -> Answer:
        return Answer.of(self.ask(omni))

    def plan(self, omni: OmniRuntime) -> Plan:
        return omni.plan(self.messages, sampling=SAMPLING, speech=self.speech, media=MEDIA)


QUESTIONS = {
    "spoken": Question(MESSAGES, SPEECH),
    "silent": Question(MESSAGES, None),
    "in text alone": Question([{"role": "user", "content": "hello green river"}], None),
}
"""By name. The last one needs the thinker's weights and little else, so that small budgets stream them."""


class Host:
    """The demo in float32 on a card that is all its own; `tables_bytes` is what opening leaves there for good."""

    def __init__(self, card: Card, demo: Path, limits: Limits | None = None, remember: str | None = None) -> None:
        self.card, self.meter = card, CardMeter(card)
        device = Device(DEVICE, "a simulated card", PLENTY_BYTES)
        self.omni = OmniRuntime.open(
            demo,
            device=device,
            dtype="float32",
            vram=PLENTY_BYTES,
            limits=limits,
            meter=self.meter,
            remember=remember,
        )
        self.tables_bytes = card.live_bytes

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.omni.close()

    @property
    def held_bytes(self) -> int:
        """On the card now, without the tables."""
        return self.card.live_bytes - self.tables_bytes

    @property
    def leaked_bytes(self) -> int:
        """On the card after a turn, although it is no resident weight: to be 0."""
        if self.held_bytes != self.omni._machine.residency.live_bytes:
            gc.collect()  # the traceback of an error that was caught may be part of a cycle
        return self.held_bytes - self.omni._machine.residency.live_bytes

    def set_capacity(self, n_bytes: int) -> None:
        """Give the card so much room besides the tables, and let nothing more happen to it."""
        self.card.restore(self.tables_bytes + n_bytes)

    def least_bytes_left(self) -> int:
        """The smallest budget in which the answer in the making can go on."""
        try:
            self.omni.set_budget(1)
        except InfeasibleBudgetError as error:  # not `pytest.raises`, which would keep frames, and tensors in them
            return error.needed_bytes
        raise AssertionError("nothing runs in a byte")

    def moments(self, question: Question, count: int) -> list[int]:
        """Allocations spread over a whole turn, each at another place of its layer; to find them one turn is run."""
        before = self.card.allocations
        question.answer(self.omni)
        return [1 + (self.card.allocations - before) * i // count + i % 7 for i in range(count)]


@contextmanager
def furnished_card() -> Iterator[Card]:
    """A card with room for everything, random numbers and fused attention."""
    with pytest.MonkeyPatch.context() as patch, simulated_card(PLENTY_BYTES) as card:
        patch.setattr("lowvram.turn.Sampler", HostSampler)
        patch.setattr("lowvram.attention.explicit_attention", fused_attention)
        yield card
