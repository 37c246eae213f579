"""The velocity of frames that come in order, at every evaluation of a solver, by the reference's DiT.

A frame's velocity reads its own block of 24 frames, one block back at the look-back layers and one ahead at the
look-ahead layer, and nothing else. So each layer of each evaluation keeps just that (`layers.Border`), and frames may
stand at different evaluations at once: those that are evaluated together pass each layer together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..flow import Weights
from .carry import Carry, Queue
from .conditioning import Conditioning
from .frames import Entrance, Frames
from .layers import Border, Heads, attend, layer_blocks, multiply, output, project


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
        """Evaluate the frames that arrive; returns, for each arrival, the next state of those that moved on."""
        for arrival in arrivals:
            self._waiting[arrival.evaluation].put(*arrival.frames.tensors)
            self._frames_computed.value += len(arrival.frames)
        velocities = self._velocities(arrivals)
        return [self._move(arrival.evaluation, v) for arrival, v in zip(arrivals, velocities, strict=True)]

    def _velocities(self, arrivals: Sequence[Arrival]) -> list[Tensor]:
        """Velocities [1, F, M] of the frames whose windows are complete, by arrival."""
        moving = self._enter(arrivals)
        for index, block in enumerate(self._layers):
            if not any(arrival.last or len(rows.turn) for arrival, rows in zip(arrivals, moving, strict=True)):
                break
            with block as layer:
                moving = self._pass(index, layer, arrivals, moving)
        return self._leave(arrivals, moving)

    def _enter(self, arrivals: Sequence[Arrival]) -> list[_Rows]:
        points = _join([arrival.frames.state[0] for arrival in arrivals])
        code_rows = _join([arrival.frames.code_rows for arrival in arrivals])
        turns = [arrival.frames.turn for arrival in arrivals]
        return _part(self._entrance.rows(points, code_rows), turns)

    def _pass(self, index: int, layer: nn.Module, arrivals: Sequence[Arrival], moving: list[_Rows]) -> list[_Rows]:
        """One layer, for those that arrive at it; returns those that it has finished."""
        modulations = [self._conditioning.modulations[arrival.evaluation, index] for arrival in arrivals]
        turns = [rows.turn for rows in moving]
        heads = project(layer, _per_row([m[:2] for m in modulations], turns), _join_rows(moving), _join(turns))
        finished, windows = self._cross(index, arrivals, moving, _part_heads(heads, turns))
        if not windows:
            return finished
        attended = attend(windows)
        del heads, windows  # as large as all that follows
        turns = [rows.turn for rows in finished]
        return _part(
            output(layer, _per_row([m[2:] for m in modulations], turns), _join_rows(finished), attended), turns
        )

    def _cross(
        self, index: int, arrivals: Sequence[Arrival], moving: list[_Rows], heads: list[Heads]
    ) -> tuple[list[_Rows], list[Heads]]:
        """Each arrival into the layer's border at its evaluation; returns those that leave it, and their windows."""
        finished, windows = [], []
        for arrival, (rows, turn), own in zip(arrivals, moving, heads, strict=True):
            border = self._borders[arrival.evaluation][index]
            rows, turn, seen = border.push(rows, turn, own, last=arrival.last, provisional=arrival.provisional)
            finished.append(_Rows(rows, turn))
            windows += seen
        return finished, windows

    def _leave(self, arrivals: Sequence[Arrival], moving: list[_Rows]) -> list[Tensor]:
        """Rows to velocities, the branches weighed as the reference does: v + g (v - v_null).

        Classifier-free guidance, J. Ho and T. Salimans, https://arxiv.org/abs/2207.12598, equation 6.
        """
        turns = [rows.turn for rows in moving]
        scale, shift = _per_row([self._conditioning.out_modulations[a.evaluation] for a in arrivals], turns)
        rows = self._dit.norm_out.norm(_join_rows(moving)) * (1 + scale) + shift
        spoken, *null = multiply(rows, self._dit.proj_out.weight, self._dit.proj_out.bias).split(1)
        velocity = spoken + (spoken - null[0]) * self._conditioning.guidance if null else spoken
        return [rows.rows for rows in _part(velocity, turns)]

    def _move(self, evaluation: int, velocity: Tensor) -> Frames:
        frames = Frames.of(self._waiting[evaluation].take(velocity.shape[-2]))
        state = self._conditioning.stages[evaluation].advance(frames.state, velocity)
        return Frames(frames.turn, frames.code_rows, state)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Side by side along time, -2."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), -2)


def _join_rows(moving: Sequence[_Rows]) -> Tensor:
    return _join([rows.rows for rows in moving])


def _part(rows: Tensor, turns: Sequence[Tensor]) -> list[_Rows]:
    """What `_join` put side by side, taken apart again."""
    parts = rows.split([len(turn) for turn in turns], -2)
    return [_Rows(part, turn) for part, turn in zip(parts, turns, strict=True)]


def _part_heads(heads: Heads, turns: Sequence[Tensor]) -> list[Heads]:
    counts = [len(turn) for turn in turns]
    return [Heads(*parts) for parts in zip(*(part.split(counts, -2) for part in heads), strict=True)]


def _per_row(modulations: Sequence[Tensor], turns: Sequence[Tensor]) -> Tensor:
    """Modulations [n, H] of each arrival as they apply to joined rows: [n, F, H], or [n, H] where there is one."""
    if len(modulations) == 1:
        return modulations[0]
    spread = [values[:, None].expand(-1, len(turn), -1) for values, turn in zip(modulations, turns, strict=True)]
    return torch.cat(spread, 1)
