"""Codec tokens to mel frames as they come, by the reference's DiT: three ways through one solver.

`WavefrontDiT` and `SystolicDiT` give what solving all at once would: evaluation k runs k blocks (or 2k) behind the
codes, each frame passes each layer once per evaluation, and the state (15 MB at the published size for 9 guided
evaluations) does not grow. `CachedDiT` gives nearly that, sooner, by solving blocks it has not heard out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..flow import Weights
from .carry import Carry, Queue, Snapshot
from .conditioning import Conditioning
from .evaluations import Arrival, Evaluations
from .frames import Entrance, Frames, Source
from .windows import Chunks


class StreamingDiT(ABC):
    """One utterance through `Qwen2_5OmniToken2WavDiTModel`.

    Its weights are in place while it is made and while a method runs, and may be elsewhere in between: those of
    `text_embed`, `input_embed.proj`, `proj_out`, and `attn` and `ff` of the decoder layers, which `layers` brings where
    they are blocks of their own. Weights may be of half precision: `attn` and `ff` cheaply, the two projections not,
    which carry the mel's mean. The stream has the dtype and device of `conditioning`, and the noise is torch's for
    `seed`, as `frames.Noise` says.
    """

    def __init__(self, dit: nn.Module, conditioning: Conditioning, *, seed: int, layers: Weights | None = None) -> None:
        reference: Any = dit
        self._carry = Carry()
        entrance = Entrance(reference, conditioning)
        self._source = Source(reference, entrance, seed, self._carry)
        self._evaluations = Evaluations(reference, entrance, conditioning, self._carry, layers)
        self._block: int = reference.block_size

    @torch.no_grad()
    def push(self, codes: Iterable[int]) -> Tensor:
        """The next codes; returns the mel frames [1, M, F] that became final: whole blocks, or none."""
        self._source.put(codes)
        return self._solve(self._source.take(last=False), last=False)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """No more codes will come; returns the mel frames [1, M, F] that are left."""
        return self._solve(self._source.take(last=True), last=True)

    @property
    def frames_computed(self) -> int:
        """The work so far: frames times evaluations that went through the layers."""
        return self._evaluations.frames_computed

    @property
    def state_bytes(self) -> int:
        """What is held between pushes."""
        return self._carry.n_bytes

    def snapshot(self) -> Snapshot:
        """All that is held now, without a copy: for `restore`, where a push failed."""
        return self._carry.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Be as when the snapshot was taken."""
        self._carry.restore(snapshot)

    def _solve(self, frames: Frames, *, last: bool) -> Tensor:
        solved = self._advance(frames, last=last) if len(frames) or (last and self._source.frames_drawn) else []
        return torch.cat([frames.state[0][:, :0], *(done.state[0] for done in solved)], -2).mT

    @abstractmethod
    def _advance(self, frames: Frames, *, last: bool) -> list[Frames]:
        """Solve on with the next frames; returns those that are solved."""


class WavefrontDiT(StreamingDiT):
    """Exact, and as early as exact can be: an arrival goes through all evaluations in turn, and each of them holds one
    block back."""

    def _advance(self, frames: Frames, *, last: bool) -> list[Frames]:
        for evaluation in range(self._evaluations.count):
            (frames,) = self._evaluations.advance([Arrival(evaluation, frames, last)])
            if not (len(frames) or last):
                return []
        return [frames]


class SystolicDiT(StreamingDiT):
    """Exact, with one pass through the weights per arrival: all evaluations go through each layer together, each with
    what the one before gave at the last arrival. So the first frames come nearly twice as late as the wavefront's."""

    def __init__(self, dit: nn.Module, conditioning: Conditioning, *, seed: int, layers: Weights | None = None) -> None:
        super().__init__(dit, conditioning, seed=seed, layers=layers)
        self._before = [Queue(self._carry) for _ in conditioning.stages]

    def _advance(self, frames: Frames, *, last: bool) -> list[Frames]:
        self._before[0].put(*frames.tensors)
        if not last:
            return self._beat(first=0, last=False)
        # The end travels like frames do: one evaluation a beat.
        return [done for ending in range(len(self._before)) for done in self._beat(first=ending, last=True)]

    def _beat(self, *, first: int, last: bool) -> list[Frames]:
        """Every evaluation from `first` on takes what waits before it; none will follow at the `first` if `last`."""
        arrivals = [
            Arrival(evaluation, Frames.of(waiting.take_all()), last=last and evaluation == first)
            for evaluation, waiting in enumerate(self._before)
            if waiting.frames or (last and evaluation == first)
        ]
        solved = []
        for arrival, frames in zip(arrivals, self._evaluations.advance(arrivals), strict=True):
            if arrival.evaluation + 1 < len(self._before):
                self._before[arrival.evaluation + 1].store(*frames.tensors)
            else:
                solved.append(frames)
        return solved


class CachedDiT(StreamingDiT):
    """Nearly exact, and early: a chunk of blocks is solved at once, all evaluations, together with a look-ahead of
    blocks that will be solved again with the next chunk. What the chunk looks back on is the one before, as solved.

    The error is that of the look-ahead's own end, which creeps one block nearer at each evaluation.
    """

    def __init__(
        self, dit: nn.Module, conditioning: Conditioning, *, seed: int, chunks: Chunks, layers: Weights | None = None
    ) -> None:
        super().__init__(dit, conditioning, seed=seed, layers=layers)
        self._inputs = Queue(self._carry)
        self._chunk_frames = self._carry.cell(self._block * chunks.first_blocks)
        self._later_frames = self._block * chunks.blocks
        self._ahead_frames = self._block * chunks.ahead_blocks

    def _advance(self, frames: Frames, *, last: bool) -> list[Frames]:
        self._inputs.put(*frames.tensors)
        solved = []
        while self._inputs.frames >= self._chunk_frames.value + self._ahead_frames:
            solved.append(self._chunk(self._chunk_frames.value, self._ahead_frames))
            self._chunk_frames.value = self._later_frames
        if last:
            solved.append(self._chunk(self._inputs.frames, 0))
        return solved

    def _chunk(self, final: int, ahead: int) -> Frames:
        """The solution of the first `final` frames that wait, seen together with the `ahead` frames after them."""
        frames = Frames.of(self._inputs.first(final + ahead))
        for evaluation in range(self._evaluations.count):
            (frames,) = self._evaluations.advance([Arrival(evaluation, frames, last=True, provisional=ahead)])
        self._inputs.take(final)
        return frames.first(final)
