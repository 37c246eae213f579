"""OmniRuntime: open a checkpoint, plan a turn, generate an answer, cancel it, close.

Data flows media -> prompt -> rows -> thinker -> talker -> token2wav -> events (`turn.py`); control flows budget ->
footprint -> plan -> residency. Here they are made and handed to each other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from .checkpoint import DEFAULT_MODEL, DEMO, Checkpoint, TensorReader, load_speakers, open_checkpoint
from .device import Device, choose_dtype, open_device
from .errors import LowVRAMError, OptionError
from .events import Event
from .model import OmniModel, build_model
from .offload.budget import Budget
from .offload.footprint import Footprint, read_footprint
from .offload.meter import Meter, open_meter
from .offload.plan import Plan, plan_memory
from .offload.plan import Turn as Workload
from .offload.residency import Residency
from .options import Limits, MediaParams, SamplingParams, SpeechParams
from .preprocess import Preprocessor, PromptShape
from .quant.matmul import choose_backend
from .token2wav.ode import solver_stages, time_grid
from .token2wav.stream import Speaker
from .token2wav.windows import chunk_codes
from .turn import Machine, Request, Turn, Voice

Messages = Sequence[Mapping[str, Any]]
DEFAULT_SPEECH = SpeechParams()
"""Speak if the checkpoint can, with its first voice."""


class OmniRuntime:
    """A checkpoint ready to answer inside a budget: one answer at a time, any number one after another.

    Make one with `open`; use it as a context manager or `close` it. Opening reads headers, not weights. The host
    application is left alone: no global settings, no signal handlers, no threads.
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
        self._answering = threading.Lock()
        self._cancel = threading.Event()
        self._closed = False

    @classmethod
    def open(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        vram: str | int | None = None,
        device: str | Device = "auto",
        dtype: str = "auto",
        kernel: str | None = None,
        revision: str | None = None,
        limits: Limits | None = None,
        meter: Meter | None = None,
        on_download: Callable[[int, int | None], None] | None = None,
    ) -> OmniRuntime:
        """Open a checkpoint: a hub id, a folder, or `demo`.

        `vram` is the budget ("8GiB"; None takes what is free on the device, a CPU's RAM included). `meter` notes
        memory by phase; by default a GPU's allocator does. Raises CheckpointError, BackendError, OptionError.
        """
        asked = Budget.of(vram)
        opened = device if isinstance(device, Device) else open_device(device)
        checkpoint = open_checkpoint(_demo_or(model), revision=revision, on_progress=on_download)
        compute = choose_dtype(dtype, opened.torch, _stored_dtype(checkpoint))
        backend = choose_backend(opened.torch, compute, kernel)
        with ExitStack() as opening:
            reader = opening.enter_context(TensorReader())
            built = build_model(checkpoint, reader, device=opened.torch, dtype=compute, backend=backend)
            preprocessor = Preprocessor(checkpoint.folder, checkpoint.config)
            voices = _read_voices(checkpoint) if built.speech else {}
            footprint = read_footprint(checkpoint.tensors, checkpoint.config, width_bytes=compute.itemsize)
            budget = _granted(asked, opened)
            opening.pop_all()  # all is well: the reader stays open until `close`
        machine = Machine(
            model=built,
            residency=Residency(built.components, opened.torch, built.transfer.trim),
            device=opened.torch,
            meter=meter or open_meter(opened.torch),
            stop_ids=_stop_ids(checkpoint, preprocessor),
            detokenize=preprocessor.detokenize,
        )
        return cls(
            checkpoint, reader, built, machine, voices, preprocessor, footprint, budget, limits or Limits(), opened
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
        voice = self._choose_voice(speech)
        shape = self.measure(messages or [{"role": "user", "content": "?"}], media=media)
        return self._plan(shape, sampling or SamplingParams(), speech if voice else None)

    def generate(
        self,
        messages: Messages,
        *,
        sampling: SamplingParams | None = None,
        speech: SpeechParams | None = DEFAULT_SPEECH,
        media: MediaParams | None = None,
    ) -> Generator[Event, None, None]:
        """Answer a conversation: yields Progress, TextDelta, AudioChunk as they happen and one Finished at the end.

        `messages` follow the chat format of transformers and OpenAI. `speech` None answers in text alone. Closing the
        iterator cancels; `cancel` does so from another thread, and the turn then still ends with a Finished. Options
        are checked here, at the call; media and budget when the first event is asked for.
        """
        self._require_open()
        self._require_idle()
        voice = self._choose_voice(speech)
        self._cancel = threading.Event()  # each turn its own, so that cancelling before its first event counts
        return self._generate(messages, sampling or SamplingParams(), speech or DEFAULT_SPEECH, voice, media)

    def cancel(self) -> None:
        """End the answer in the making at its next step, from any thread; without one, nothing happens."""
        self._cancel.set()

    def close(self) -> None:
        """Free the device and close the checkpoint's files, from any thread; closing twice is fine.

        An answer in the making is cancelled, and frees the device when it ends.
        """
        self._closed = True
        self._cancel.set()
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

    def _generate(
        self,
        messages: Messages,
        sampling: SamplingParams,
        speech: SpeechParams,
        voice: Voice | None,
        media: MediaParams | None,
    ) -> Generator[Event, None, None]:
        self._require_open()
        if not self._answering.acquire(blocking=False):
            self._require_idle()
        cancel = self._cancel
        try:
            started_s = time.perf_counter()
            with self.preprocessor.open(messages, media or MediaParams(), self.limits) as prompt:
                plan = self._plan(prompt.shape, sampling, speech if voice else None)
                request = Request(prompt.inputs, plan, sampling, speech, voice)
                yield from Turn(self._machine, request, cancel.is_set, started_s).run()
        finally:
            self._answering.release()
            if self._closed:
                self.close()

    def _plan(self, shape: PromptShape, sampling: SamplingParams, speech: SpeechParams | None) -> Plan:
        workload = Workload(
            prompt_tokens=shape.prompt_tokens,
            visual_patches=shape.largest_visual_patches,
            visuals=sum(times for times, _, _ in shape.grids),
            audio_windows=shape.audio_windows,
            text_tokens=sampling.max_tokens,
        )
        if speech:
            workload = replace(
                workload,
                codes=speech.sampling.max_tokens,
                speech_chunk_codes=chunk_codes(speech.chunk_s),
                ode_evaluations=len(solver_stages(speech.solver, time_grid(speech.steps))),
            )
        return plan_memory(self._footprint, self.budget, self.limits, workload, device=self.device.torch.type)

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
        self._machine.residency.release()
        self._model.close()
        self._reader.close()

    def _require_idle(self) -> None:
        if self._answering.locked():
            raise LowVRAMError(
                "this runtime is already making 1 answer", hint="finish or close its iterator, or open a second runtime"
            )

    def _require_open(self) -> None:
        if self._closed:
            raise LowVRAMError("this runtime is closed", hint="open another one")


def _demo_or(model: str | Path) -> str | Path:
    if model != DEMO:
        return model
    from .demo import demo_folder

    return demo_folder()


def _stored_dtype(checkpoint: Checkpoint) -> str | None:
    """The dtype a checkpoint was published in, in either spelling of its key."""
    for config in (checkpoint.config, checkpoint.config.get("thinker_config", {})):
        name = config.get("dtype") or config.get("torch_dtype")
        if name:
            return str(name)
    return None


def _read_voices(checkpoint: Checkpoint) -> dict[str, Voice]:
    """Voices in the order in which they are published, which puts the default one first."""
    return {
        name: Voice(name, int(stored["bos_token"]), Speaker(stored["cond"], stored["ref_mel"]))
        for name, stored in load_speakers(checkpoint.speakers_path).items()
    }


def _stop_ids(checkpoint: Checkpoint, preprocessor: Preprocessor) -> frozenset[int]:
    """Every id that any of the published files calls the end of an answer."""
    thinker = checkpoint.config.get("thinker_config", {})
    places = (checkpoint.generation, thinker, thinker.get("text_config", {}))
    named = [place.get("eos_token_id") for place in places]
    ids = {i for value in named if value is not None for i in (value if isinstance(value, list) else [value])}
    return frozenset(ids | preprocessor.stop_ids)


def _granted(asked: Budget, device: Device) -> Budget:
    """The budget asked for, but never more than is free: a plan must hold now, not on an empty machine."""
    return Budget(min(asked.vram_bytes or device.free_bytes, device.free_bytes))
