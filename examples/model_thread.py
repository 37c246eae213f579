"""A runtime in a thread of its own: questions go in, and whatever happens comes out through one queue.

What a window of any toolkit needs, since nothing here makes the window's thread wait. `cancel`, `set_budget`, `release`
and `resume` are for that thread to call on the runtime itself, which `Opened` hands out.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lowvram import AudioChunk, Finished, LowVRAMError, Plan, Progress, SamplingParams, SpeechParams, TextDelta

if TYPE_CHECKING:
    from lowvram import OmniRuntime

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Opened:
    """The model is ready to be asked."""

    omni: OmniRuntime


@dataclass(frozen=True)
class Closed:
    """The thread is over; nothing follows."""


Report = Opened | Plan | Progress | TextDelta | AudioChunk | Finished | LowVRAMError | Closed
"""What comes out: an answer begins with its plan and ends with Finished, or with an error."""


class ModelThread(threading.Thread):
    """Opens a model, answers one question after another, and puts all that happens into `reports`.

    As a context manager it is started, and in the end closed and waited for.
    """

    def __init__(
        self,
        model: str,
        vram: str | None = None,
        *,
        sampling: SamplingParams | None = None,
        speech: SpeechParams | None = None,
    ) -> None:
        super().__init__(name="model")
        self.reports: SimpleQueue[Report] = SimpleQueue()
        self._model, self._vram = model, vram
        self._sampling, self._speech = sampling, speech
        self._questions: SimpleQueue[Messages | None] = SimpleQueue()
        self._omni: OmniRuntime | None = None
        self._is_closing = False

    def ask(self, messages: Messages) -> None:
        """Have a conversation answered after those asked before."""
        self._questions.put(messages)

    def close(self) -> None:
        """End at the next step, in the middle of a download or an answer, too; returns at once."""
        self._is_closing = True
        if self._omni:
            self._omni.close()
        self._questions.put(None)

    def run(self) -> None:
        try:
            # Here, so that the window is there before torch is.
            from lowvram import OmniRuntime

            # A second question about a file waits for nothing that the first has read.
            opened = OmniRuntime.open(self._model, vram=self._vram, remember="auto", on_download=self._show_download)
            with opened as self._omni:
                self.reports.put(Opened(self._omni))
                while not self._is_closing and (messages := self._questions.get()) is not None:
                    self._answer(self._omni, messages)
        except LowVRAMError as error:
            self.reports.put(error)
        finally:
            self.reports.put(Closed())

    def _answer(self, omni: OmniRuntime, messages: Messages) -> None:
        sampling, speech = self._sampling, self._speech if omni.voices else None
        try:
            # First the answer, which begins when it is asked for its first event: from this call on `cancel` counts.
            with closing(omni.generate(messages, sampling=sampling, speech=speech)) as events:
                self.reports.put(omni.plan(messages, sampling=sampling, speech=speech))
                for event in events:
                    self.reports.put(event)
        except LowVRAMError as error:
            self.reports.put(error)

    def _show_download(self, done: int, total: int | None) -> None:
        if self._is_closing:
            raise LowVRAMError("the download was ended", hint="what has arrived is kept")
        self.reports.put(Progress("download", done, total, "bytes"))

    def __enter__(self) -> ModelThread:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self.join()
