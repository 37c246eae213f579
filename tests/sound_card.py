"""A loudspeaker for tests: it plays when it is told to."""

from __future__ import annotations

import numpy as np

from lowvram.playback import Fill

BLOCK = 480


class SoundCard:
    """A sound card that takes a block whenever somebody waits, and keeps what it was given to play."""

    def __init__(self) -> None:
        self.heard: list[np.ndarray] = []
        self.calls: list[str] = []
        self.active = False
        self.breaks_after_blocks: int | None = None
        self.waits = 0

    def start(self, fill: Fill) -> SoundCard:
        self._fill, self.active = fill, True
        return self

    def tick(self, _seconds: float = 0.0) -> None:
        self.waits += 1
        if len(self.heard) == self.breaks_after_blocks:
            self.active = False
        if self.active:
            block = np.full(BLOCK, np.nan, np.float32)
            self._fill(block)
            self.heard.append(block)

    def stop(self) -> None:
        self.calls.append("stop")

    def abort(self) -> None:
        self.calls.append("abort")

    def close(self) -> None:
        self.calls.append("close")

    @property
    def sound(self) -> np.ndarray:
        return np.concatenate(self.heard)
