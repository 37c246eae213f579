"""One answer, from an encoded prompt to its last event: the only file that knows the order of stages.

The plan's phases say which stages share the device. Within a phase the stages are chained generators, each pulling
from the one before, so that speech starts while text is still being written; events that happen inside the chain wait
in the turn's account, which is emptied at every step. At the end of a phase the product of its last stage (thinker
steps, or codec ids) waits on the host for the next phase: that is the only difference a small budget makes, whether it
was small from the beginning or became so while the stages were at it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from .account import Account
from .detokenize import TextStream
from .encoders import AudioTower, VisionTower, embed_prompt, encode_audios, encode_visuals
from .errors import BudgetExceededError, LowVRAMError
from .events import Event, Progress, TextDelta
from .flow import Attempt, ThinkerStep
from .graphs import CapturedSteps, Stepping, one_by_one, open_recorder
from .kv_cache import KVCache
from .model import Decoder, OmniModel
from .offload.budget import format_bytes
from .offload.meter import Meter
from .offload.plan import Phase, Plan
from .offload.profile import DEVICE_ALLOCATOR, MemoryProfile
from .offload.residency import Residency
from .options import SamplingParams, SpeechParams
from .pacing import Lookahead
from .recall import Reading
from .room import Cancelled, Control, Replan, Room, forget
from .sampling import Choice, Recitation, Sampler
from .talker import Talker, TextRows, seen_by_penalty, talk
from .thinker import Prefilled, Thinker, decode, prefill
from .token2wav.conditioning import Conditionings, Setting, Speaker, condition
from .token2wav.stream import decode_speech

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Voice:
    """A voice of the checkpoint: the text id that begins its replies, and what its sound is conditioned on."""

    name: str
    bos_token: int
    speaker: Speaker


@dataclass(frozen=True)
class Machine:
    """What serves one turn after another: the model, where its weights are, its tokenizer's side of text, and what is
    known of its voices by now. `trim` gives the device what its allocator keeps for later, and `free_bytes` is what the
    device then has for us beside what we hold, where it can be asked."""

    model: OmniModel
    residency: Residency
    trim: Callable[[], None]
    free_bytes: Callable[[], int | None]
    device: torch.device
    meter: Meter
    stop_ids: frozenset[int]
    detokenize: Callable[[Sequence[int]], str]
    conditionings: Conditionings = field(default_factory=Conditionings)

    def speak_in(self, dtype: torch.dtype) -> None:
        """Have the DiT's layers in that precision. A change of it empties device and host: they move in anew."""
        if any(layer.dtype is not dtype for layer in self.model.dit_layers):
            self.residency.release()
            self.model.speak_in(dtype)


@dataclass(frozen=True)
class Request:
    """What one turn is asked: a prompt to read and how to answer it. `voice` None means text only. `replan` finds
    another way for what is left of the turn, when there is less room than `plan` counted on. `reply` are the ids to
    say, up to a stop id, where the answer is known beforehand."""

    reading: Reading
    plan: Plan
    replan: Replan
    sampling: SamplingParams
    speech: SpeechParams
    voice: Voice | None
    reply: tuple[int, ...] | None = None


@dataclass
class Turn:
    """One answer in the making, since `started_s` (`time.perf_counter`). `run` yields its events and heeds `control`
    between steps."""

    machine: Machine
    request: Request
    control: Control
    started_s: float
    _read_tokens: int = 0
    _own_bytes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        request = self.request
        self.account = Account(self.started_s)
        self._text_seed = _seed(request.sampling.seed, secrets.randbits(32))
        self._speech_seed = _seed(request.speech.sampling.seed, self._text_seed)
        self._noise_seed = _seed(request.speech.seed, self._speech_seed)
        self._prompt = embed_prompt(request.reading.inputs, self.machine.model.embed_tokens)
        self._talker_rows = torch.empty_like(self._prompt.embeds) if request.voice else None
        self._streams: dict[str, Lookahead[Any]] = {}
        """By stage, of those that have begun: what they make, in the order in which they pull from one another."""
        machine = self.machine
        self.room = Room(
            machine.residency,
            machine.device,
            machine.trim,
            machine.free_bytes,
            self.control,
            request.plan,
            request.replan,
        )

    def run(self) -> Generator[Event, None, None]:
        """Carry out the plan, phase by phase, and end with `Finished`.

        Raises BudgetExceededError where the device has less room than the least that the turn can do with.
        """
        self.machine.meter.begin(self.machine.residency.live_bytes)
        if self.request.voice:
            self.machine.speak_in(getattr(torch, self.request.speech.dtype))
        try:
            yield from self._phases()
        except Cancelled:
            self._streams.clear()  # first: text that was held back may be shown
            yield from self.account.take()
        except LowVRAMError as error:
            if isinstance(error, BudgetExceededError):
                error.profile = self._profile()
                self.machine.residency.release()  # residents, too: whoever has the device now needs it
            # Frames further down hold caches, and what the failed step computed: so would who keeps the error.
            if error.__cause__ is not None:
                error.__cause__.__traceback__ = None
            raise error.with_traceback(None) from error.__cause__
        finally:
            self._streams.clear()  # they hold caches, and this turn, which holds them: else they would stay for a while
            self.room.leave()
            self.machine.conditionings.settle()
        meter = self.machine.meter
        yield self.account.finished(
            prompt_tokens=len(self._prompt.embeds),
            recalled_tokens=self.request.reading.known_tokens,
            speaks=self.request.voice is not None,
            memory={"kind": meter.kind, "peak_bytes": dict(meter.peaks)},
        )

    def _phases(self) -> Iterator[Event]:
        replanned = set[str]()
        for phase in self.room.phases():
            plan = self.room.plan
            with self.machine.meter.phase(phase.name):
                for part in (self._onload, self._condition, self._encode, self._answer):
                    yield from self._watched(part(), phase)
                    if self.room.plan is not plan:
                        break  # what is left is done, and told of, under the phases of the other plan
            if self.room.plan is not plan:
                replanned.add(phase.name)  # also where it comes again: its peak is then of more than one plan
            if phase.name not in replanned:
                self._compare_with(plan, phase)

    def _watched(self, events: Iterator[Event], phase: Phase) -> Iterator[Event]:
        """Events, with what was held up to each noted by the meter, and by us."""
        for event in events:
            label = event.stage if isinstance(event, Progress) else "text" if isinstance(event, TextDelta) else "sound"
            weights_bytes, kv_bytes = self.machine.residency.live_bytes, self.room.kv_bytes
            self.machine.meter.mark(label, weights_bytes, kv_bytes)
            self._own_bytes[phase.name] = max(weights_bytes + kv_bytes, self._own_bytes.get(phase.name, 0))
            yield event

    def _compare_with(self, plan: Plan, phase: Phase) -> None:
        """Say so where a phase held more than was planned, and stop where weights and caches alone break the budget.

        They are counted by us. Among what a card's allocator counts is what the reserve is for, libraries' workspaces
        and rounding, and what others in this process take meanwhile, an application or a second runtime: that ends no
        turn, whose own tensors have a cap (`device.MemoryCap`).
        """
        own_bytes = self._own_bytes.get(phase.name, 0)
        if plan.budget_bytes is not None and own_bytes > plan.budget_bytes:
            raise BudgetExceededError(
                f'phase "{phase.name}" held {format_bytes(own_bytes)} of weights and caches, but the budget is'
                f" {format_bytes(plan.budget_bytes)}",
                phase=phase.name,
                needed_bytes=own_bytes,
                available_bytes=plan.budget_bytes,
                hint="the plan was wrong: please report it with this profile, and name a smaller budget for now",
            )
        meter, reserve_bytes = self.machine.meter, plan.workspace_bytes + plan.slack_bytes
        more_bytes = meter.peaks.get(phase.name, 0) - phase.peak_bytes
        if meter.kind == DEVICE_ALLOCATOR and more_bytes > 0:
            log.log(
                logging.WARNING if more_bytes > reserve_bytes else logging.INFO,
                'phase "%s" held %s more than planned, or others in this process did; %s are kept for rounding and'
                " workspaces",
                phase.name,
                format_bytes(more_bytes),
                format_bytes(reserve_bytes),
            )

    def _profile(self) -> MemoryProfile:
        """The plan in force beside what was measured so far, where anything was."""
        profile, meter = MemoryProfile.of(self.room.plan), self.machine.meter
        return profile.add(meter.kind, meter.peaks) if meter.peaks else profile

    def _onload(self) -> Iterator[Event]:
        with self.account.timed("load"):
            for done, total in self.room.load():
                yield Progress("load", done, total, "bytes")

    def _condition(self) -> Iterator[Event]:
        """Work out what the DiT hears of the voice, for this turn and later ones, if this phase is for that."""
        speech, voice = self.request.speech, self.request.voice
        if voice and self.room.begin("conditioning"):
            (block,) = self.machine.residency.component("dit_conditioning")
            with self.account.timed("condition"):
                made = condition(block, voice.speaker, speech, attempt=self._attempts("conditioning"))
            self.machine.conditionings.keep(Setting.of(voice.name, speech), made)
            yield Progress("condition", 1, 1, "voices")
            self.room.end("conditioning")

    def _encode(self) -> Iterator[Event]:
        """Fill the prompt's media rows with whatever encoders this phase holds."""
        reading, model, room = self.request.reading, self.machine.model, self.room
        device, embeds = self.machine.device, self._prompt.embeds
        if room.begin("audio_tower"):
            ears = AudioTower(model.hearing, *self._layers_and_rest("audio_tower"), self._attempts("audio_tower"))
            windows = lambda: room.plan.audio_chunk_windows  # noqa: E731 (asked anew for each chunk)
            heard = encode_audios(reading.audios, ears, embeds, chunk_windows=windows, device=device)
            yield from self._encoding("hear", heard, reading.audios)
            room.end("audio_tower")
        if room.begin("visual"):
            eyes = VisionTower(model.vision, *self._layers_and_rest("visual"), self._attempts("visual"))
            patches = lambda: room.plan.vision_chunk_patches  # noqa: E731
            seen = encode_visuals(reading.visuals, eyes, embeds, chunk_patches=patches, device=device)
            yield from self._encoding("see", seen, reading.visuals)
            room.end("visual")

    def _encoding(self, stage: str, filled: Iterator[int], media: Sequence[Any]) -> Iterator[Event]:
        done, total = 0, sum(len(medium.rows) for medium in media)
        with self.account.timed("encode"):
            for rows in filled:
                done += rows
                yield Progress(stage, done, total, "tokens")

    def _answer(self) -> Iterator[Event]:
        """Chain this phase's share of thinker, talker and token2wav, and pull on its end, handing out events as they
        happen; what is not used up waits for the next phase."""
        streams, room = self._streams, self.room
        if room.begin("thinker"):
            streams["thinker"] = Lookahead((yield from self._prefill()))
        if room.begin("talker"):
            streams["talker"] = Lookahead(self._talk(streams["thinker"]))
        if room.begin("token2wav"):
            streams["token2wav"] = Lookahead(self._speak(streams["talker"]))
        while self._pull():
            yield from self.account.take()
        yield from self.account.take()

    def _pull(self) -> bool:
        """Have one more made by the last stage of the phase in force that is not at its end: a talker may fall silent
        before the text ends, and another plan may have cut off the stages after."""
        stages = (stage for stage in reversed(self.room.phase.stages) if stage in self._streams)
        return any(self._streams[stage].make_one() for stage in stages)

    def _prefill(self) -> Generator[Event, None, Iterator[ThinkerStep]]:
        """Read what of the prompt is not known; returns the answer's text, still to be written."""
        max_tokens = len(self._prompt.embeds) + self.request.sampling.max_tokens
        cache = self._cache("thinker", self.machine.model.thinker, max_tokens, self._keep_what_was_read)
        recall = partial(self.request.reading.recall, cache, self._talker_rows)
        self.room.attempt(recall, stage="thinker")
        self._read_tokens = self.request.reading.known_tokens
        progress = prefill(
            self._thinker(),
            self._prompt,
            cache,
            chunk_tokens=self._chunk_tokens,
            talker_rows=self._talker_rows,
            device=self.machine.device,
        )
        with self.account.timed("prefill"):
            for step in progress:
                if isinstance(step, Prefilled):
                    return self._think(step, cache)
                self._read_tokens = step
                yield Progress("prefill", step, len(self._prompt.embeds), "tokens")
        raise AssertionError("a prefill ends with what it read")

    def _keep_what_was_read(self, cache: KVCache) -> None:
        self.request.reading.keep(cache, self._talker_rows, self._read_tokens)

    def _think(self, prefilled: Prefilled, cache: KVCache) -> Iterator[ThinkerStep]:
        """The answer's text, step by step; what can be shown of it goes to the account."""
        machine, account, max_tokens = self.machine, self.account, self.request.sampling.max_tokens
        steps = decode(
            replace(self._thinker(), stepping=self._stepping("thinker")),
            prefilled,
            cache,
            self._choice(),
            stop_ids=machine.stop_ids,
            max_tokens=max_tokens,
        )
        text = TextStream(machine.detokenize)
        try:
            for step in steps:
                if step.token_id in machine.stop_ids:
                    account.text_ends = "stop"
                else:
                    account.text_ids.append(step.token_id)
                    account.show(text.push(step.token_id))
                yield step
            if account.text_ends != "stop":
                account.text_ends = "length"
            self.room.end("thinker")
        finally:
            account.show(text.finish())
            account.mark("text")

    def _choice(self) -> Choice:
        """How the next text id is found."""
        request = self.request
        if request.reply is not None:
            return Recitation(request.reply)
        vocab_size = len(self.machine.model.embed_tokens)
        seen = request.reading.inputs.input_ids
        return self._draws("thinker", request.sampling, vocab_size=vocab_size, seed=self._text_seed, seen=seen)

    def _talk(self, steps: Iterable[ThinkerStep]) -> Iterator[int]:
        """The reply as codec ids."""
        machine, account = self.machine, self.account
        speech, voice = self.request.speech, self.request.voice
        model, max_codes = machine.model, speech.sampling.max_tokens
        assert voice and model.speech and self._talker_rows is not None
        account.mark("talk")
        ids = model.speech.codec_ids
        sampler = self._draws(
            "talker",
            speech.sampling,
            vocab_size=len(model.speech.codec_embed),
            seed=self._speech_seed,
            suppressed=[ids.start],
            seen=seen_by_penalty(ids),
        )
        layers, rest = self._layers_and_rest("talker")
        codes = talk(
            Talker(model.speech, layers, rest, self._attempts("talker"), self._stepping("talker")),
            self._prompt,
            self._talker_rows,
            steps,
            _text_rows(model, voice),
            self._cache("talker", model.speech.decoder, len(self._talker_rows) + 2 + max_codes),
            sampler,
            chunk_tokens=self._chunk_tokens,
            max_codes=max_codes,
            device=machine.device,
        )
        for code in codes:
            account.say(code, is_heard="token2wav" in self.room.phase.stages)
            yield code
        account.codes_end = "length" if len(account.codec_ids) == max_codes else "stop"
        self.room.end("talker")
        account.mark("codes")

    def _speak(self, codes: Iterable[int]) -> Iterator[None]:
        """Sound as it becomes final, to the account; one turn of the loop per codec id, most of them silent."""
        speech, voice = self.request.speech, self.request.voice
        assert voice
        layers, dit = self._layers_and_rest("dit")
        (bigvgan,) = self.machine.residency.component("bigvgan")
        heard = self.machine.conditionings[Setting.of(voice.name, speech)]
        attempts = self._attempts("token2wav")
        pieces = decode_speech(
            codes, dit, bigvgan, heard, speech, seed=self._noise_seed, layers=layers, attempt=attempts
        )
        for samples in pieces:
            if len(samples):
                self.account.sound(samples)
            yield
            while self.account.can_spare_time and self._streams["thinker"].make_one():
                yield
        self.room.end("token2wav")
        self.account.end_sound()

    def _thinker(self) -> Thinker:
        model = self.machine.model
        layers, rest = self._layers_and_rest("thinker")
        (lm_head,) = self.machine.residency.component("lm_head")
        return Thinker(model.thinker, layers, rest, lm_head, model.embed_tokens, self._attempts("thinker"))

    def _attempts(self, stage: str) -> Attempt:
        return partial(self.room.attempt, stage=stage)

    def _stepping(self, component: str) -> Stepping:
        """How a stage decodes: captured, where the device can and the cache is in the compute dtype."""
        recorder = open_recorder(self.machine.device)
        if recorder is None or self.room.plan.kv != "16bit":
            return one_by_one
        steps = CapturedSteps(recorder, partial(self.machine.residency.whereabouts, component))
        self.room.before_moving(steps.drop)
        return steps

    def _cache(
        self, stage: str, decoder: Decoder, max_tokens: int, keep: Callable[[KVCache], None] = forget
    ) -> KVCache:
        make = partial(decoder.new_cache, max_tokens, self.machine.device, self.room.plan.kv)
        return self.room.hold(stage, make, keep)

    def _draws(self, stage: str, params: SamplingParams, **options: Any) -> Sampler:
        return self.room.attempt(partial(self._sampler, params, stage=stage, **options), stage=stage)

    def _sampler(self, params: SamplingParams, **options: Any) -> Sampler:
        return Sampler(params, device=self.machine.device, **options)

    def _chunk_tokens(self) -> int:
        """How many prompt rows to read next; fewer once there is less room."""
        return self.room.plan.prefill_chunk_tokens

    def _layers_and_rest(self, component: str) -> tuple[tuple[Any, ...], Any]:
        *layers, rest = self.machine.residency.component(component)
        return tuple(layers), rest


def _seed(chosen: int | None, fallback: int) -> int:
    return fallback if chosen is None else chosen


def _text_rows(model: OmniModel, voice: Voice) -> TextRows:
    assert model.speech
    ids = [voice.bos_token, model.speech.text_end, model.speech.text_pad]
    return TextRows(*model.embed_tokens(torch.tensor(ids, device="cpu")))
