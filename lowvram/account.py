"""What one answer came to so far, and the events that tell of it.

Text, codes and sound are made inside a chain of stages that pull from one another; what is told of them waits here
until a step of the chain is over (`take`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from .events import AudioChunk, Event, Finished, FinishReason, Progress, TextDelta
from .pacing import Playback
from .token2wav.windows import CODES_PER_SECOND, SAMPLE_RATE_HZ


class Account:
    """Kept by one turn. `Finished` says what its `timings` are: seconds by `clock`, since `started_s` or spent."""

    def __init__(self, started_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.text_ids: list[int] = []
        self.codec_ids: list[int] = []
        self.text_ends: FinishReason = "cancelled"
        self.codes_end: FinishReason = "cancelled"
        self._started_s = started_s
        self._clock = clock
        self._untold: deque[Event] = deque()
        self._text: list[str] = []
        self._samples = 0
        self._sound_is_whole = False
        self._playback = Playback()
        self._timings: dict[str, float] = {}

    def take(self) -> Iterator[Event]:
        """Hand out what was not told yet, also what comes meanwhile."""
        while self._untold:
            yield self._untold.popleft()

    def show(self, text: str) -> None:
        """Text that is safe to show, perhaps none."""
        if text:
            self._mark_first("ttft")
            self._text.append(text)
            self._untold.append(TextDelta(text))

    def say(self, code: int, *, is_heard: bool) -> None:
        """A codec id; unless sound follows at once, nobody would hear of it but for a word each second."""
        self.codec_ids.append(code)
        if not is_heard and len(self.codec_ids) % CODES_PER_SECOND == 0:
            self._untold.append(Progress("talk", len(self.codec_ids), None, "codes"))

    def sound(self, samples: np.ndarray) -> None:
        """[S] samples that follow those before."""
        self._mark_first("audio_ttfp")
        self._playback.hear(len(samples) / SAMPLE_RATE_HZ, self._clock())
        self._tell_of(samples)

    def end_sound(self) -> None:
        """All codes have sounded."""
        self._sound_is_whole = True
        self._tell_of(np.zeros(0, np.float32), is_last=True)

    @property
    def can_spare_time(self) -> bool:
        """Whether the listener would not notice a text token (`pacing`)."""
        return self._playback.can_spare(self._clock())

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to a sum."""
        began_s = self._clock()
        try:
            yield
        finally:
            self._timings[name] = self._timings.get(name, 0.0) + self._clock() - began_s

    def mark(self, name: str) -> None:
        """Note how long ago the turn began."""
        self._timings[name] = self._clock() - self._started_s

    def finished(
        self, *, prompt_tokens: int, recalled_tokens: int, speaks: bool, memory: Mapping[str, object]
    ) -> Finished:
        """The sum of it, now."""
        self.mark("total")
        spoken: FinishReason = self.codes_end if self._sound_is_whole else "cancelled"
        return Finished(
            text="".join(self._text),
            text_ids=tuple(self.text_ids),
            codec_ids=tuple(self.codec_ids),
            prompt_tokens=prompt_tokens,
            recalled_tokens=recalled_tokens,
            finish_reason=self.text_ends,
            speech_finish_reason=spoken if speaks else None,
            audio_s=self._samples / SAMPLE_RATE_HZ,
            sample_rate_hz=SAMPLE_RATE_HZ,
            audio_rtf=self._rtf(),
            audio_underrun_s=self._playback.underrun_s,
            timings=dict(self._timings),
            memory=memory,
        )

    def _tell_of(self, samples: np.ndarray, is_last: bool = False) -> None:
        self._untold.append(AudioChunk(samples, SAMPLE_RATE_HZ, self._samples / SAMPLE_RATE_HZ, is_last))
        self._samples += len(samples)
        self.mark("speech")

    def _mark_first(self, name: str) -> None:
        if name not in self._timings:
            self.mark(name)

    def _rtf(self) -> float | None:
        """Seconds from the first code to the last sample per second of sound."""
        if not self._samples:
            return None
        return (self._timings["speech"] - self._timings["talk"]) * SAMPLE_RATE_HZ / self._samples
