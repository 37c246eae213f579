"""A runtime and what is to be said -> what its model thinks at every position, whatever it would have said itself.

Both ways go through the runtime's own turn: its plan, its budget, its encoders and kernels. The thinker reads prompt
and answer as one prompt, and its final hidden states are kept; the talker is handed its codes, and its logits are
noted. Hidden states lie on the host, H values a position in the compute dtype (7 KiB for the 7B model), where logits
would be 304 KB.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowvram import AudioChunk, OmniRuntime, SamplingParams, SpeechParams
from lowvram.flow import ModelInputs
from lowvram.options import TALKER_SAMPLING, MediaParams
from lowvram.recall import Reading
from lowvram.room import Control
from lowvram.runtime import RECITING
from lowvram.sampling import Sampler
from lowvram.turn import Request, Turn
from lowvram.workload import turn_of

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Said:
    """A text read aloud: the codes, the talker's logits [n, V] at each draw (the one that ended it included) on the
    host, and the sound [S] float32 at 24 kHz."""

    codes: tuple[int, ...]
    logits: Tensor
    samples: np.ndarray


class Reader(Turn):
    """A turn asked for what it reads: `hidden` [T, H] are the thinker's final hidden states at every row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # What the talker reads of a row is its embedding, which counts as zero for media, plus the hidden state.
        self._prompt = replace(self._prompt, is_media=torch.ones_like(self._prompt.is_media))
        self._talker_rows = torch.empty_like(self._prompt.embeds)

    @property
    def hidden(self) -> Tensor:
        assert self._talker_rows is not None
        return self._talker_rows


class Overheard:
    """A sampler whose logits are noted: `logits` holds those [V] of each draw, on the host. Codes that were `said`
    beforehand take the place of what is drawn.

    Choosing only fills a buffer, so that it may be part of a captured step.
    """

    def __init__(self, sampler: Sampler, said: Iterable[int] | None) -> None:
        self.logits: list[Tensor] = []
        self._sampler = sampler
        self._said = None if said is None else iter(said)
        self._latest: Tensor | None = None

    def __call__(self, logits: Tensor) -> int:
        self.prepare()
        return self.settle(self.choose(logits))

    def prepare(self) -> None:
        self._sampler.prepare()

    def choose(self, logits: Tensor) -> Tensor:
        if self._latest is None:
            self._latest = torch.empty_like(logits)
        self._latest.copy_(logits)
        return self._sampler.choose(logits)

    def settle(self, token: Tensor) -> int:
        drawn = self._sampler.settle(token)
        assert self._latest is not None
        self.logits.append(self._latest.to("cpu", copy=True))
        return drawn if self._said is None else next(self._said)


class Dictation(Turn):
    """A turn whose codes may be known beforehand (`codes`; None leaves them to the talker), and whose talker is
    `overheard`."""

    codes: Sequence[int] | None = None
    overheard: Overheard

    def _sampler(self, params: SamplingParams, **options: Any) -> Any:
        assert self.machine.model.speech
        said = None if self.codes is None else chain(self.codes, (self.machine.model.speech.codec_ids.end,))
        self.overheard = Overheard(super()._sampler(params, **options), said)
        return self.overheard


def read_words(omni: OmniRuntime, words: str) -> Tensor:
    """The hidden states [n, H] at each id of plain words, without any chat around them."""
    ids = omni.preprocessor.tokenize(words)
    return _read(omni, ModelInputs(torch.tensor(ids), torch.arange(len(ids)).expand(3, -1), len(ids)))


def read_answer(omni: OmniRuntime, messages: Messages, answer: Sequence[int]) -> Tensor:
    """The hidden states [n + 1, H] from which each of the `answer`'s n ids, and what follows them, would be drawn."""
    with omni.preprocessor.open(messages, MediaParams(), omni.limits) as prompt:
        inputs, shape = prompt.inputs, prompt.shape
        hidden = _read(omni, _followed_by(inputs, answer), shape.grids, shape.audio_windows)
        return hidden[len(inputs.input_ids) - 1 :].clone()


def say(omni: OmniRuntime, words: str, codes: Sequence[int] | None = None, *, max_codes: int, seed: int) -> Said:
    """Read words aloud as `OmniRuntime.speak` does, in the codes that are given or, without any, drawn from `seed`."""
    ids = omni.preprocessor.tokenize(words)
    reply = (*ids, min(omni.stop_ids))
    sampling = SamplingParams(max_tokens=len(reply))
    speech = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=max_codes, seed=seed), seed=seed)
    messages = [{"role": "user", "content": f"{RECITING}\n\n{words}"}]
    voice = omni._choose_voice(speech)
    with omni.preprocessor.open(messages, MediaParams(), omni.limits) as prompt:
        workload = omni._workload(prompt.shape.size, sampling, speech, voice)
        replan = partial(omni._plan, workload)
        request = Request(Reading(prompt.inputs), replan(omni.budget), replan, sampling, speech, voice, reply)
        turn = Dictation(omni._machine, request, Control(omni.budget), time.perf_counter())
        turn.codes = codes
        chunks = [event.samples for event in omni._steps(turn) if isinstance(event, AudioChunk)]
    return Said(tuple(turn.account.codec_ids), torch.stack(turn.overheard.logits), np.concatenate(chunks))


def _followed_by(inputs: ModelInputs, ids: Sequence[int]) -> ModelInputs:
    """A prompt with more ids at its end, as the thinker would meet them one by one while answering."""
    count, start = len(ids), inputs.next_position
    return replace(
        inputs,
        input_ids=torch.cat([inputs.input_ids, torch.tensor(ids, dtype=inputs.input_ids.dtype)]),
        position_ids=torch.cat([inputs.position_ids, torch.arange(start, start + count).expand(3, -1)], dim=1),
        next_position=start + count,
    )


def _read(
    omni: OmniRuntime, inputs: ModelInputs, grids: tuple[tuple[int, int, int], ...] = (), audio_windows: int = 0
) -> Tensor:
    """Hidden states [T, H] at every row, on the host."""
    sampling = SamplingParams(max_tokens=1)
    workload = turn_of(len(inputs.input_ids), grids, audio_windows, sampling, None, omni.limits.kv)
    replan = partial(omni._plan, workload)
    request = Request(Reading(inputs), replan(omni.budget), replan, sampling, SpeechParams(), None)
    turn = Reader(omni._machine, request, Control(omni.budget), time.perf_counter())
    for _ in omni._steps(turn):
        pass
    return turn.hidden
