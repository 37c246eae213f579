"""The velocity of frames that come in order, at every evaluation of a solver, by the reference's DiT.

A frame's velocity reads its own block of 24 frames, one block back at the look-back layers and one ahead at the
look-ahead layer, and nothing else. So each layer of each evaluation keeps just that (`layers.Border`), and frames may
stand at different evaluations at once: those that are evaluated together share one walk over the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..flow import Weights
from .carry import Carry, Queue
from .conditioning import Conditioning
from .frames import Entrance, Frames
from .layers import Border, attend, layer_blocks, multiply, output, project


@dataclass(frozen=True)
class Arrival:
    """Frames that come to an evaluation. `last`: none will follow them. `provisional`: so many of them, at the end,
    will come again, better known."""

    evaluation: int
    frames: Frames
    last: bool
    provisional: int = 0


class _Rows(NamedTuple):
    """An arrival's frames between two layers: rows [G, F, H] and their rotary table [F, D]."""

    rows: Tensor
    turn: Tensor


class Evaluations:
    """One utterance at all evaluations of `conditioning.stages`.

    The DiT's modules are kept, its weights are not: they are read where they are when `advance` is called. `layers`
    brings those of the decoder layers where they are blocks of their own.
    """

    def __init__(
        self, dit: Any, entrance: Entrance, conditioning: Conditioning, carry: Carry, layers: Weights | None
    ) -> None:
        self._dit, self._layers = dit, layer_blocks(dit, layers)
        self._entrance, self._conditioning = entrance, conditioning
        self._waiting = [Queue(carry) for _ in conditioning.stages]
        self._borders = [
            [Border(layer, dit.block_size, carry) for layer in dit.transformer_blocks] for _ in conditioning.stages
        ]
        self._frames_computed = carry.cell(0)

    @property
    def count(self) -> int:
        return len(self._waiting)

    @property
    def frames_computed(self) -> int:
        """The work so far: frames times evaluations."""
        return self._frames_computed.value

    def advance(self, arrivals: Sequence[Arrival]) -> list[Frames]:
        """Evaluate the frames that arrive; returns, for each arrival, the next state of those that moved on.

        Each layer is entered once, and its arrivals pass it one after another: what it computes with is one arrival's.
        """
        moving = [self._enter(arrival) for arrival in arrivals]
        for index, block in enumerate(self._layers):
            arriving = [i for i, arrival in enumerate(arrivals) if arrival.last or len(moving[i].turn)]
            if not arriving:
                break
            with block as layer:
                for i in arriving:
                    moving[i] = self._pass(index, layer, arrivals[i], moving[i])
        return [self._leave(arrival, rows) for arrival, rows in zip(arrivals, moving, strict=True)]

    def _enter(self, arrival: Arrival) -> _Rows:
        frames = arrival.frames
        self._waiting[arrival.evaluation].put(*frames.tensors)
        self._frames_computed.value += len(frames)
        return _Rows(self._entrance.rows(frames.state[0], frames.code_rows), frames.turn)

    def _pass(self, index: int, layer: nn.Module, arrival: Arrival, moving: _Rows) -> _Rows:
        """One layer, for rows that arrive at it; returns those that it has finished."""
        modulation = self._conditioning.modulations[arrival.evaluation, index]
        heads = project(layer, modulation[:2], moving.rows, moving.turn)
        border = self._borders[arrival.evaluation][index]
        rows, turn, windows = border.push(*moving, heads, last=arrival.last, provisional=arrival.provisional)
        if windows:
            attended = attend(windows)
            del heads, windows  # as large as all that follows
            rows = output(layer, modulation[2:], rows, attended)
        return _Rows(rows, turn)

    def _leave(self, arrival: Arrival, moving: _Rows) -> Frames:
        """Rows to velocities to the solver's next state. The reference weighs the branches so: v + g (v - v_null).

        Classifier-free guidance, J. Ho and T. Salimans, https://arxiv.org/abs/2207.12598, equation 6.
        """
        scale, shift = self._conditioning.out_modulations[arrival.evaluation]
        rows = self._dit.norm_out.norm(moving.rows) * (1 + scale) + shift
        spoken, *null = multiply(rows, self._dit.proj_out.weight, self._dit.proj_out.bias).split(1)
        velocity = spoken + (spoken - null[0]) * self._conditioning.guidance if null else spoken
        frames = Frames.of(self._waiting[arrival.evaluation].take(velocity.shape[-2]))
        state = self._conditioning.stages[arrival.evaluation].advance(frames.state, velocity)
        return Frames(frames.turn, frames.code_rows, state)
