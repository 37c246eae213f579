"""One answer, from an encoded prompt to its last event: the only file that knows the order of stages.

The plan's phases say which stages share the device. Within a phase the stages are chained generators, each pulling
from the one before, so that speech starts while text is still being written; events that happen inside the chain wait
in an outbox that is emptied at every step. At the end of a phase the product of its last stage (thinker steps, or
codec ids) waits on the host for the next phase: that is the only difference a small budget makes.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .detokenize import TextStream
from .encoders import AudioTower, VisionTower, embed_prompt, encode_audios, encode_visuals
from .errors import BudgetExceededError
from .events import AudioChunk, Event, Finished, FinishReason, Progress, TextDelta
from .flow import ModelInputs, ThinkerStep
from .kv_cache import KVCache
from .model import OmniModel
from .offload.budget import format_bytes
from .offload.meter import Meter
from .offload.plan import Phase, Plan
from .offload.residency import Residency
from .options import SamplingParams, SpeechParams
from .sampling import Sampler
from .talker import Talker, TextRows, seen_by_penalty, talk
from .thinker import Prefilled, Thinker, decode, prefill
from .token2wav.stream import Speaker, decode_speech
from .token2wav.windows import SAMPLE_RATE_HZ


@dataclass(frozen=True)
class Voice:
    """A voice of the checkpoint: the text id that begins its replies, and what its sound is conditioned on."""

    name: str
    bos_token: int
    speaker: Speaker


@dataclass(frozen=True)
class Machine:
    """What serves one turn after another: the model, where its weights are, and its tokenizer's side of text."""

    model: OmniModel
    residency: Residency
    device: torch.device
    meter: Meter
    stop_ids: frozenset[int]
    detokenize: Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Request:
    """What one turn is asked: its prompt and how to answer it. `voice` None means text only."""

    inputs: ModelInputs
    plan: Plan
    sampling: SamplingParams
    speech: SpeechParams
    voice: Voice | None


@dataclass
class Turn:
    """One answer in the making. `run` yields its events; `cancelled` is asked at every step; timings count from
    `started_s` (`time.perf_counter`)."""

    machine: Machine
    request: Request
    cancelled: Callable[[], bool]
    started_s: float
    _outbox: deque[Event] = field(default_factory=deque)
    _text_ids: list[int] = field(default_factory=list)
    _text: list[str] = field(default_factory=list)
    _codec_ids: list[int] = field(default_factory=list)
    _samples: int = 0
    _finish_reason: FinishReason = "cancelled"
    _speech_finish_reason: FinishReason = "cancelled"
    _sound_is_whole: bool = False
    _timings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        request = self.request
        self._text_seed = _seed(request.sampling.seed, secrets.randbits(32))
        self._speech_seed = _seed(request.speech.sampling.seed, self._text_seed)
        self._noise_seed = _seed(request.speech.seed, self._speech_seed)
        self._prompt = embed_prompt(request.inputs, self.machine.model.embed_tokens)
        self._talker_rows = torch.empty_like(self._prompt.embeds) if request.voice else None
        self._steps: Iterator[ThinkerStep] = iter(())
        self._codes: Iterator[int] = iter(())

    def run(self) -> Iterator[Event]:
        """Carry out the plan, phase by phase, and end with `Finished`.

        Raises BudgetExceededError where the device has less room than the plan counted on.
        """
        self.machine.meter.begin()
        try:
            for phase in self.request.plan.phases:
                yield from self._phase(phase)
                if self.cancelled():
                    break
            yield self._finished()
        finally:
            self.machine.residency.leave()

    def _phase(self, phase: Phase) -> Iterator[Event]:
        try:
            with self.machine.meter.phase(phase.name):
                for part in (self._onload, self._encode, self._answer):
                    if not self.cancelled():
                        yield from part(phase)
        except torch.OutOfMemoryError as error:
            raise BudgetExceededError(
                f'phase "{phase.name}" was planned to need {format_bytes(phase.peak_bytes)}, but the device ran out',
                phase=phase.name,
                needed_bytes=phase.peak_bytes,
                profile=dict(self.machine.meter.peaks),
                hint="another program may have taken the room: name a smaller budget, or close it",
            ) from error

    def _onload(self, phase: Phase) -> Iterator[Event]:
        with self._timed("load"):
            for done, total in self.machine.residency.enter(phase):
                yield Progress("load", done, total, "bytes")
                if self.cancelled():
                    return

    def _encode(self, phase: Phase) -> Iterator[Event]:
        """Fill the prompt's media rows with whatever encoders this phase holds."""
        inputs, plan = self.request.inputs, self.request.plan
        device, embeds = self.machine.device, self._prompt.embeds
        if "audio_tower" in phase.stages and inputs.audios:
            ears = AudioTower(self.machine.model.hearing, *self._layers_and_rest("audio_tower"))
            heard = encode_audios(inputs.audios, ears, embeds, chunk_windows=plan.audio_chunk_windows, device=device)
            yield from self._encoding("hear", heard, inputs.audios)
        if "visual" in phase.stages and inputs.visuals:
            eyes = VisionTower(self.machine.model.vision, *self._layers_and_rest("visual"))
            seen = encode_visuals(inputs.visuals, eyes, embeds, chunk_patches=plan.vision_chunk_patches, device=device)
            yield from self._encoding("see", seen, inputs.visuals)

    def _encoding(self, stage: str, filled: Iterator[int], media: Sequence[Any]) -> Iterator[Event]:
        done, total = 0, sum(len(medium.rows) for medium in media)
        with self._timed("encode"):
            for rows in filled:
                done += rows
                yield Progress(stage, done, total, "tokens")
                if self.cancelled():
                    return

    def _answer(self, phase: Phase) -> Iterator[Event]:
        """Chain this phase's share of thinker, talker and token2wav, and pull on its end."""
        pipe: Iterator[Any] = iter(())
        if "thinker" in phase.stages:
            cache = self._thinker_cache()
            prefilled = yield from self._prefill(cache)
            if prefilled is None:
                return
            pipe = self._steps = self._think(prefilled, cache)
        if "talker" in phase.stages:
            pipe = self._codes = self._talk(self._steps)
        if "token2wav" in phase.stages:
            pipe = self._speak(self._codes)
        yield from self._pull(pipe)

    def _pull(self, pipe: Iterator[Any]) -> Iterator[Event]:
        """Run a chain to its end, handing out its events as they happen; keep its product for the next phase."""
        product = []
        for item in pipe:
            product.append(item)
            yield from self._take_outbox()
        for _ in self._steps:  # a talker may fall silent before the text ends
            yield from self._take_outbox()
        yield from self._take_outbox()
        if pipe is self._steps:
            self._steps = iter(product)
        elif pipe is self._codes:
            self._codes = iter(product)

    def _prefill(self, cache: KVCache) -> Generator[Event, None, Prefilled | None]:
        """Read the prompt; returns None if the turn was cancelled on the way."""
        plan = self.request.plan
        progress = prefill(
            self._thinker(),
            self._prompt,
            cache,
            chunk_tokens=plan.prefill_chunk_tokens,
            talker_rows=self._talker_rows,
            device=self.machine.device,
        )
        with self._timed("prefill"):
            for step in progress:
                if isinstance(step, Prefilled):
                    return step
                yield Progress("prefill", step, len(self._prompt.embeds), "tokens")
                if self.cancelled():
                    break
        return None

    def _think(self, prefilled: Prefilled, cache: KVCache) -> Iterator[ThinkerStep]:
        """The answer's text, step by step; what can be shown of it goes to the outbox."""
        machine, params = self.machine, self.request.sampling
        vocab_size = len(machine.model.embed_tokens)
        sampler = Sampler(
            params,
            vocab_size=vocab_size,
            device=machine.device,
            seed=self._text_seed,
            seen=self.request.inputs.input_ids,
        )
        steps = decode(
            self._thinker(), prefilled, cache, sampler, stop_ids=machine.stop_ids, max_tokens=params.max_tokens
        )
        text = TextStream(machine.detokenize)
        for step in steps:
            if self.cancelled():
                break
            if step.token_id in machine.stop_ids:
                self._finish_reason = "stop"
            else:
                self._text_ids.append(step.token_id)
                self._show(text.push(step.token_id))
            yield step
        else:
            if self._finish_reason != "stop":
                self._finish_reason = "length"
        self._show(text.finish())
        self._mark("text")

    def _talk(self, steps: Iterable[ThinkerStep]) -> Iterator[int]:
        """The reply as codec ids."""
        machine, speech, voice = self.machine, self.request.speech, self.request.voice
        model, max_codes = machine.model, speech.sampling.max_tokens
        assert voice and model.speech and self._talker_rows is not None
        ids = model.speech.codec_ids
        sampler = Sampler(
            speech.sampling,
            vocab_size=len(model.speech.codec_embed),
            device=machine.device,
            seed=self._speech_seed,
            suppressed=[ids.start],
            seen=seen_by_penalty(ids),
        )
        layers, rest = self._layers_and_rest("talker")
        codes = talk(
            Talker(model.speech, layers, rest),
            self._prompt,
            self._talker_rows,
            steps,
            _text_rows(model, voice),
            model.speech.decoder.new_cache(len(self._talker_rows) + 2 + max_codes, machine.device),
            sampler,
            chunk_tokens=self.request.plan.prefill_chunk_tokens,
            max_codes=max_codes,
            device=machine.device,
        )
        for code in codes:
            if self.cancelled():
                return
            self._codec_ids.append(code)
            yield code
        self._speech_finish_reason = "length" if len(self._codec_ids) == max_codes else "stop"
        self._mark("codes")

    def _speak(self, codes: Iterable[int]) -> Iterator[None]:
        """Sound as it becomes final, to the outbox; one turn of the loop per codec id, most of them silent."""
        speech, voice = self.request.speech, self.request.voice
        assert voice
        (dit,), (bigvgan,) = (self.machine.residency.component(name) for name in ("dit", "bigvgan"))
        with dit as dit_module, bigvgan as bigvgan_module:
            pieces = decode_speech(codes, dit_module, bigvgan_module, voice.speaker, speech, seed=self._noise_seed)
            for samples in pieces:
                if self.cancelled():
                    return
                if len(samples):
                    self._sound(samples)
                yield
        self._sound_is_whole = True
        self._sound(np.zeros(0, np.float32), is_last=True)
        self._mark("speech")

    def _show(self, piece: str) -> None:
        if piece:
            self._mark("ttft", once=True)
            self._text.append(piece)
            self._outbox.append(TextDelta(piece))

    def _sound(self, samples: np.ndarray, is_last: bool = False) -> None:
        if not is_last:
            self._mark("audio_ttfp", once=True)
        self._outbox.append(AudioChunk(samples, SAMPLE_RATE_HZ, self._samples / SAMPLE_RATE_HZ, is_last))
        self._samples += len(samples)

    def _take_outbox(self) -> Iterator[Event]:
        while self._outbox:
            yield self._outbox.popleft()

    def _finished(self) -> Finished:
        self._mark("total")
        spoken: FinishReason = self._speech_finish_reason if self._sound_is_whole else "cancelled"
        return Finished(
            text="".join(self._text),
            text_ids=tuple(self._text_ids),
            codec_ids=tuple(self._codec_ids),
            prompt_tokens=len(self._prompt.embeds),
            finish_reason=self._finish_reason,
            speech_finish_reason=spoken if self.request.voice else None,
            audio_s=self._samples / SAMPLE_RATE_HZ,
            sample_rate_hz=SAMPLE_RATE_HZ,
            timings=dict(self._timings),
            memory={"kind": self.machine.meter.kind, "peak_bytes": dict(self.machine.meter.peaks)},
        )

    def _thinker(self) -> Thinker:
        model = self.machine.model
        layers, rest = self._layers_and_rest("thinker")
        (lm_head,) = self.machine.residency.component("lm_head")
        return Thinker(model.thinker, layers, rest, lm_head, model.embed_tokens)

    def _thinker_cache(self) -> KVCache:
        tokens = len(self._prompt.embeds) + self.request.sampling.max_tokens
        return self.machine.model.thinker.new_cache(tokens, self.machine.device)

    def _layers_and_rest(self, component: str) -> tuple[tuple[Any, ...], Any]:
        *layers, rest = self.machine.residency.component(component)
        return tuple(layers), rest

    def _timed(self, name: str) -> _Stopwatch:
        return _Stopwatch(self._timings, name)

    def _mark(self, name: str, once: bool = False) -> None:
        """Note the seconds since the turn began."""
        if not (once and name in self._timings):
            self._timings[name] = time.perf_counter() - self.started_s


class _Stopwatch:
    """Adds the seconds spent inside to a named sum."""

    def __init__(self, sums: dict[str, float], name: str) -> None:
        self._sums = sums
        self._name = name

    def __enter__(self) -> None:
        self._began_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._sums[self._name] = self._sums.get(self._name, 0.0) + time.perf_counter() - self._began_s


def _seed(chosen: int | None, fallback: int) -> int:
    return fallback if chosen is None else chosen


def _text_rows(model: OmniModel, voice: Voice) -> TextRows:
    assert model.speech
    ids = [voice.bos_token, model.speech.text_end, model.speech.text_pad]
    return TextRows(*model.embed_tokens(torch.tensor(ids, device="cpu")))
