"""OmniRuntime: open a checkpoint, plan a turn, generate an answer, make room for others, close.

Data flows media -> prompt -> rows -> thinker -> talker -> token2wav -> events (`turn.py`); control flows budget ->
footprint -> plan -> residency. Here they are made and handed to each other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .allowance import grant, part
from .checkpoint import DEFAULT_MODEL, DEMO, Checkpoint, TensorReader, open_checkpoint, stored_dtype
from .device import Device, MemoryCap, choose_dtype, exact_arithmetic, free_bytes, open_device
from .errors import CheckpointError, LowVRAMError, OptionError
from .events import Event, Finished
from .flow import ModelInputs
from .model import OmniModel, build_model
from .offload.budget import Budget
from .offload.footprint import Footprint, read_footprint
from .offload.meter import Meter, open_meter
from .offload.plan import Plan, plan_memory
from .offload.plan import Turn as Workload
from .offload.residency import Residency
from .options import Limits, MediaParams, SamplingParams, SpeechParams, require_options
from .preprocess import Preprocessor, PromptShape
from .preprocess.counts import PromptSize, audio_windows
from .quant.matmul import choose_backend
from .recall import Reading, Recall
from .room import Control
from .token2wav.conditioning import Setting, Speaker
from .turn import Machine, Request, Turn, Voice
from .voices import load_speakers
from .workload import turn_of

Messages = Sequence[Mapping[str, Any]]
DEFAULT_SPEECH = SpeechParams()
"""Speak if the checkpoint can, with its first voice."""

RECITING = "Read the following text aloud, word for word."
"""What `speak` lets the user ask, so that the reply is what a model would expect to say."""


class OmniRuntime:
    """A checkpoint ready to answer inside a budget: one answer at a time, any number one after another.

    Make one with `open`; use it as a context manager or `close` it. Opening reads headers, not weights. The host
    application is left alone: no global settings, no signal handlers, and no thread but one that reads the next weights
    while a card computes, and ends before the answer does.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        reader: TensorReader,
        model: OmniModel,
        machine: Machine,
        voices: Mapping[str, Voice],
        preprocessor: Preprocessor,
        footprint: Footprint,
        budget: Budget,
        limits: Limits,
        device: Device,
        recall: Recall,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.budget = budget
        self.limits = limits
        self._reader = reader
        self._model = model
        self._machine = machine
        self._voices = voices
        self.preprocessor = preprocessor
        self._footprint = footprint
        self._recall = recall
        self._answering = threading.Lock()
        self._stepping = threading.Lock()
        self._telling = threading.RLock()  # a signal handler may come in between, in the same thread
        self._control = Control(budget)
        self._turn: Turn | None = None
        self._released = False
        self._closed = False

    @classmethod
    def open(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        vram: str | int | None = None,
        ram: str | int | None = None,
        device: str | Device = "auto",
        dtype: str = "auto",
        kernel: str | None = None,
        revision: str | None = None,
        limits: Limits | None = None,
        meter: Meter | None = None,
        on_download: Callable[[int, int | None], None] | None = None,
        remember: str | int | None = None,
    ) -> OmniRuntime:
        """Open a checkpoint: a hub id, a folder, or `demo`.

        `vram` is the budget ("8GiB"; None or "auto" takes what is free on the device, a CPU's RAM included, less some
        headroom for others). `ram` bounds what the process keeps on the host; without it, weights wait in their files.
        `meter` notes memory by phase; by default a GPU's allocator does. `on_download` is told of bytes so far
        and in all, from the threads that download; what it raises ends the download and comes out here. Raises
        CheckpointError, BackendError, OptionError.

        `remember` is host memory ("4GiB"; "auto": a quarter of `ram`, or of what is free if that is less) for what was
        read of the last prompt: one that begins alike, as a conversation's do, is read from where it differs. It is
        taken from `ram` and, on a CPU, from what is free.
        """
        require_options(limits=limits)
        asked, remembered_bytes = part(Budget.of(vram, ram), remember)
        opened = device if isinstance(device, Device) else open_device(device)
        checkpoint = open_checkpoint(_demo_or(model), revision=revision, on_progress=on_download)
        compute = choose_dtype(dtype, opened.torch, stored_dtype(checkpoint.config))
        backend = choose_backend(opened.torch, compute, kernel)
        with ExitStack() as opening:
            reader = opening.enter_context(TensorReader())
            built = build_model(checkpoint, reader, device=opened.torch, dtype=compute, backend=backend)
            preprocessor = Preprocessor(checkpoint.folder, checkpoint.config)
            voices = _read_voices(checkpoint, len(built.embed_tokens)) if built.speech else {}
            footprint = read_footprint(checkpoint.tensors, checkpoint.config, width_bytes=compute.itemsize)
            budget = grant(asked, opened, remembered_bytes)
            opening.pop_all()  # all is well: the reader stays open until `close`
        return cls(
            checkpoint,
            reader,
            built,
            _machine_of(built, opened.torch, meter, checkpoint, preprocessor),
            voices,
            preprocessor,
            footprint,
            budget,
            limits or Limits(),
            opened,
            Recall(remembered_bytes),
        )

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer's text."""
        return self._machine.stop_ids

    @property
    def voices(self) -> tuple[str, ...]:
        """Names of the voices that the checkpoint offers; empty if it does not speak."""
        return tuple(self._voices)

    @property
    def kernel(self) -> str:
        """The code that multiplies by the thinker's weights: a 4-bit backend, or plain torch."""
        return self._model.kernel

    def measure(self, messages: Messages, *, media: MediaParams | None = None) -> PromptShape:
        """Count a prompt's tokens before it is run: exact, and no video is decoded beyond its packets' times."""
        self._require_open()
        require_options(media=media)
        return self.preprocessor.measure(messages, media or MediaParams(), self.limits)

    def plan(
        self,
        messages: Messages | None = None,
        *,
        sampling: SamplingParams | None = None,
        speech: SpeechParams | None = DEFAULT_SPEECH,
        media: MediaParams | None = None,
    ) -> Plan:
        """How a turn with these messages would use the device; raises InfeasibleBudgetError if it cannot.

        Without messages: a short question in text. `speech` None plans a text answer.
        """
        self._require_open()
        require_options(sampling=sampling, speech=speech, media=media)
        voice = self._choose_voice(speech)
        shape = self.measure(messages or [{"role": "user", "content": "?"}], media=media)
        return self._plan(
            self._workload(shape.size, sampling or SamplingParams(), speech or DEFAULT_SPEECH, voice), self.budget
        )

    def generate(
        self,
        messages: Messages,
        *,
        sampling: SamplingParams | None = None,
        speech: SpeechParams | None = DEFAULT_SPEECH,
        media: MediaParams | None = None,
    ) -> Generator[Event, None, None]:
        """Answer a conversation: yields Progress, TextDelta, AudioChunk as they happen and one Finished at the end.

        `messages` follow the chat format of transformers and OpenAI; {"type": "file", "file": path} is whatever its
        content is. `speech` None answers in text alone. Closing the iterator cancels; `cancel` does so from another
        thread, from this call on, and the turn then still ends with a Finished. Options are checked here, at the call;
        media and budget when the first event is asked for.
        """
        self._require_open()
        require_options(sampling=sampling, speech=speech, media=media)
        voice = self._choose_voice(speech)
        return self._begin(messages, sampling or SamplingParams(), speech or DEFAULT_SPEECH, voice, media)

    def speak(self, text: str, *, speech: SpeechParams = DEFAULT_SPEECH) -> Generator[Event, None, None]:
        """Read `text` aloud: the events of an answer whose words are given.

        The thinker reads them as its reply to being asked for just that, and the talker speaks from what it made of
        them. Raises OptionError for a text without words or a checkpoint without voices, and what `generate` raises.
        """
        self._require_open()
        require_options(speech=speech)
        ids = self.preprocessor.tokenize(text)
        if not text.strip() or not ids:
            raise OptionError(f"there is nothing to say in {text!r}: 0 words", hint="give a sentence")
        voice = self._choose_voice(replace(speech))  # a copy, so that a checkpoint without voices is refused
        messages = [{"role": "user", "content": f"{RECITING}\n\n{text}"}]
        reply = (*ids, min(self.stop_ids))
        return self._begin(messages, SamplingParams(max_tokens=len(reply)), speech, voice, None, reply)

    def cancel(self) -> None:
        """End the answer in the making at its next step, from any thread; before its first event, the one that
        `generate` or `speak` gave last. Without one, nothing happens."""
        self._control.cancel()

    def set_budget(self, vram: str | int | None) -> None:
        """Stay within another VRAM budget from the next step on, this turn and later; None is what is free.

        From any thread. An answer in the making goes on and says what it would have said. Raises
        InfeasibleBudgetError, and changes nothing, when what is left of it cannot run in so little.
        """
        self._require_open()
        with self._telling:
            asked = replace(Budget.of(vram), ram_bytes=self.budget.ram_bytes)
            budget = grant(asked, self.device, self._recall.most_bytes)
            turn = self._turn
            if turn is not None:
                turn.room.accept(budget)
            else:
                self._control.set_budget(budget)
            self.budget = budget
        self._adapt()

    def release(self) -> None:
        """Give the device back until `resume`, from any thread: for a game, say.

        An answer in the making drops its weights and takes its KV cache to the host at its next step, at once if
        nobody is asking for its next event; its iterator waits meanwhile. Without one, resident weights leave now.
        """
        self._require_open()
        with self._telling:
            self._released = True
            self._control.release()
        self._adapt()

    def resume(self) -> None:
        """Take the device again; an answer that waited goes on as if nothing had been."""
        with self._telling:
            self._released = False
            self._control.resume()

    def close(self) -> None:
        """Free the device and close the checkpoint's files, from any thread; closing twice is fine.

        An answer in the making is cancelled, and frees the device when it ends.
        """
        self._closed = True
        self._control.cancel()
        if self._answering.acquire(blocking=False):
            try:
                self._free()
            finally:
                self._answering.release()

    def __enter__(self) -> OmniRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(
        self,
        messages: Messages,
        sampling: SamplingParams,
        speech: SpeechParams,
        voice: Voice | None,
        media: MediaParams | None,
        reply: tuple[int, ...] | None = None,
    ) -> Generator[Event, None, None]:
        """A turn that begins when its first event is asked for."""
        with self._telling:  # else an answer that another thread begins meanwhile would be told nothing more
            self._require_idle()
            self._require_present()
            control = Control(self.budget)  # each turn its own, so that cancelling before its first event counts
            self._control = control
        return self._generate(messages, sampling, speech, voice, media, reply, control)

    def _generate(
        self,
        messages: Messages,
        sampling: SamplingParams,
        speech: SpeechParams,
        voice: Voice | None,
        media: MediaParams | None,
        reply: tuple[int, ...] | None,
        control: Control,
    ) -> Generator[Event, None, None]:
        self._require_open()
        while not self._answering.acquire(blocking=False):
            self._require_idle()
        try:
            started_s = time.perf_counter()
            self._heed(control)
            with self.preprocessor.open(messages, media or MediaParams(), self.limits) as prompt:
                reading = self._reading(prompt.inputs, voice, is_given=reply is not None)
                workload = self._workload(self._size(reading), sampling, speech, voice)
                replan = partial(self._plan, workload)
                request = Request(reading, replan(self.budget), replan, sampling, speech, voice, reply)
                finished = yield from self._steps(Turn(self._machine, request, control, started_s))
        finally:
            self._answering.release()
            if self._closed:
                self.close()
        yield finished  # when all is given back: whoever hears it may ask again at once

    def _heed(self, control: Control) -> None:
        """Let `control` be told what other threads ask, and now what they have asked since it was made."""
        with self._telling:
            self._control = control
            control.set_budget(self.budget)
            (control.release if self._released else control.resume)()
        if self._closed:  # meanwhile, which only the answer made last was told
            control.cancel()

    def _steps(self, turn: Turn) -> Generator[Event, None, Finished]:
        """A turn's events but the last, which is returned; between two of them other threads may change where its
        weights are."""
        self._turn = turn
        events = turn.run()
        try:
            while not isinstance(event := self._next(turn, events), Finished):
                yield event
            return event
        finally:
            with self._stepping:
                self._turn = None
                events.close()

    def _next(self, turn: Turn, events: Iterator[Event]) -> Event:
        if turn.control.released:  # perhaps inside the last step, which has not heeded it
            self._adapt()
            turn.control.wait_while_released()  # here, so that whoever has the device meanwhile meets no cap of ours
        with self._stepping, turn.room.computing(self._lend):
            return next(events)

    @contextmanager
    def _lend(self, held_bytes: int, budget_bytes: int) -> Iterator[None]:
        """What is the whole process's, and a turn's while it computes."""
        with exact_arithmetic(self.device.torch), MemoryCap(self.device.torch, held_bytes).at(budget_bytes):
            yield

    def _adapt(self) -> None:
        """Let a change take effect now, unless a step is being computed: then its turn heeds it afterwards."""
        if self._stepping.acquire(blocking=False):
            try:
                if self._turn is not None:
                    self._turn.room.adapt()
                elif self._released:
                    self._machine.residency.release()
            finally:
                self._stepping.release()

    def _plan(
        self, workload: Workload, budget: Budget, over: Set[str] = frozenset(), begun: tuple[str, ...] = ()
    ) -> Plan:
        device = self.device.torch.type
        return plan_memory(self._footprint, budget, self.limits, workload, device=device, over=over, begun=begun)

    def _reading(self, inputs: ModelInputs, voice: Voice | None, *, is_given: bool) -> Reading:
        """How a prompt is read. One whose answer `is_given` is no part of a conversation, and leaves what is known."""
        return Reading(inputs) if is_given else self._recall.reading(inputs, talks=voice is not None)

    def _size(self, reading: Reading) -> PromptSize:
        """What a prompt takes: its tokens, which are all held, and the media that are yet to be encoded."""
        grids = tuple(visual.grid for visual in reading.visuals)
        frames = self._model.hearing.window_frames
        windows = sum(audio_windows(audio.mel.shape[-1], frames) for audio in reading.audios)
        return len(reading.inputs.input_ids), grids, windows

    def _workload(
        self, size: PromptSize, sampling: SamplingParams, speech: SpeechParams, voice: Voice | None
    ) -> Workload:
        turn = turn_of(*size, sampling, speech if voice else None, self.limits.kv)
        if voice is None:
            return turn
        is_known = Setting.of(voice.name, speech) in self._machine.conditionings
        frames = max(turn.voice_frames, *(other.speaker.ref_mel.shape[1] for other in self._voices.values()))
        return replace(turn, voice_frames=frames, is_conditioned=is_known)

    def _choose_voice(self, speech: SpeechParams | None) -> Voice | None:
        if speech is None or (speech is DEFAULT_SPEECH and not self._voices):
            return None
        if not self._voices:
            raise OptionError(f"{self.checkpoint.name} has no voices: it cannot speak", hint="speech=None, --no-speech")
        name = speech.voice or next(iter(self._voices))
        if name not in self._voices:
            raise OptionError(f"voice {name!r} is unknown", hint=f"one of: {', '.join(self._voices)}")
        return self._voices[name]

    def _free(self) -> None:
        self._recall.last = None
        self._machine.residency.release()
        self._model.close()
        self._reader.close()

    def _require_idle(self) -> None:
        if self._answering.locked():
            raise LowVRAMError(
                "this runtime is already making 1 answer", hint="finish or close its iterator, or open a second runtime"
            )

    def _require_present(self) -> None:
        if self._released:
            raise LowVRAMError("this runtime has released its device", hint="call resume() first")

    def _require_open(self) -> None:
        if self._closed:
            raise LowVRAMError("this runtime is closed", hint="open another one")


def _demo_or(model: str | Path) -> str | Path:
    if model != DEMO:
        return model
    from .demo import demo_folder

    return demo_folder()


def _read_voices(checkpoint: Checkpoint, vocab_size: int) -> dict[str, Voice]:
    """Voices in the order in which they are published, which puts the default one first."""
    voices = {
        name: Voice(name, int(stored["bos_token"]), Speaker(stored["cond"], stored["ref_mel"]))
        for name, stored in load_speakers(checkpoint.speakers_path).items()
    }
    for voice in voices.values():
        if not 0 <= voice.bos_token < vocab_size:
            raise CheckpointError(
                f"voice {voice.name} begins with token {voice.bos_token}, but the model has {vocab_size} tokens",
                path=str(checkpoint.speakers_path),
                hint="take spk_dict.pt from the same checkpoint as the weights",
            )
    return voices


def _stop_ids(checkpoint: Checkpoint, preprocessor: Preprocessor) -> frozenset[int]:
    """Every id that any of the published files calls the end of an answer."""
    thinker = checkpoint.config.get("thinker_config", {})
    places = (checkpoint.generation, thinker, thinker.get("text_config", {}))
    named = [place.get("eos_token_id") for place in places]
    ids = {i for value in named if value is not None for i in (value if isinstance(value, list) else [value])}
    return frozenset(ids | preprocessor.stop_ids)


def _machine_of(
    model: OmniModel, device: torch.device, meter: Meter | None, checkpoint: Checkpoint, preprocessor: Preprocessor
) -> Machine:
    return Machine(
        model=model,
        residency=Residency(model.components, model.transfer),
        trim=model.transfer.trim,
        free_bytes=partial(free_bytes, device),
        device=device,
        meter=meter or open_meter(device),
        stop_ids=_stop_ids(checkpoint, preprocessor),
        detokenize=preprocessor.detokenize,
    )
