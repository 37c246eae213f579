"""The flow's ODE as a chain of velocity evaluations, so that a solver can be spread over a stream.

A solver is a tuple of stages. Each asks for the velocity at one time, at the first tensor of its state, and turns
(state, velocity) into the next stage's state. Stages work frame by frame and keep nothing, so different frames may
stand at different stages. Numbers are Python floats; tensors only pass through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..options import Solver

    State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Stage:
    """One evaluation: the velocity is asked at `time`, for the first tensor of the state.

    `advance(state, velocity)` gives the state of the next stage; after the last stage its only tensor is the solution.
    """

    time: float
    advance: Callable[[State, Tensor], State]


def time_grid(steps: int, sway: float = -1.0) -> tuple[float, ...]:
    """`steps` time points from 0 to 1, moved towards 0 by sway sampling: t + sway * (cos(pi/2 t) - 1 + t).

    Sway sampling is F5-TTS's (https://arxiv.org/abs/2410.06885, section 3.3), in `Qwen2_5OmniToken2WavDiTModel.sample`
    with sway -1, where it is t = 1 - cos(pi/2 u).
    """
    linear = (index / (steps - 1) for index in range(steps))
    return tuple(t + sway * (math.cos(math.pi / 2 * t) - 1 + t) for t in linear)


def solver_stages(name: Solver, times: tuple[float, ...]) -> tuple[Stage, ...]:
    """The evaluations that carry a state through `times`: one per interval for `euler` and `ab2`, four for `rk4`."""
    return _SOLVERS[name](times)


def _euler(times: tuple[float, ...]) -> tuple[Stage, ...]:
    """Euler's rule, x + h v, as Qwen's low-VRAM mode solves."""

    def stage(start: float, end: float) -> Stage:
        return Stage(start, lambda state, velocity: (state[0] + (end - start) * velocity,))

    return tuple(stage(start, end) for start, end in pairwise(times))


def _ab2(times: tuple[float, ...]) -> tuple[Stage, ...]:
    """The two-step Adams-Bashforth rule for steps of any size: second order at Euler's price, begun with Euler's step.

    E. Hairer, S. P. Nørsett, G. Wanner, "Solving Ordinary Differential Equations I", section III.5.
    """
    steps = [end - start for start, end in pairwise(times)]
    befores = (None, *steps[:-1])
    return tuple(
        _two_step(start, step, before, is_last=index == len(steps) - 1)
        for index, (start, step, before) in enumerate(zip(times, steps, befores, strict=False))
    )


def _two_step(start: float, step: float, before: float | None, *, is_last: bool) -> Stage:
    """A step of length `step` after one of length `before`; states carry the velocity of that one, if there was one."""

    def advance(state: State, velocity: Tensor) -> State:
        x, *earlier = state
        slope = velocity
        if before is not None:
            slope = velocity + step / (2 * before) * (velocity - earlier[0])
        x = x + step * slope
        return (x,) if is_last else (x, velocity)

    return Stage(start, advance)


def _rk4(times: tuple[float, ...]) -> tuple[Stage, ...]:
    """Kutta's 3/8 rule (1901), as transformers' `RungeKutta4ODESolver` and torchdiffeq's `rk4` solve."""
    return tuple(stage for start, end in pairwise(times) for stage in _three_eighths(start, end))


def _three_eighths(start: float, end: float) -> tuple[Stage, Stage, Stage, Stage]:
    """One interval; states carry the point to evaluate, the interval's first point x and the slopes still needed."""
    h = end - start

    def first(state: State, k1: Tensor) -> State:
        (x,) = state
        return x + h / 3 * k1, x, k1

    def second(state: State, k2: Tensor) -> State:
        _, x, k1 = state
        return x + h * (k2 - k1 / 3), x, k1, k2

    def third(state: State, k3: Tensor) -> State:
        _, x, k1, k2 = state
        return x + h * (k1 - k2 + k3), x, k1 + 3 * (k2 + k3)

    def fourth(state: State, k4: Tensor) -> State:
        _, x, slopes = state
        return (x + h / 8 * (slopes + k4),)

    return Stage(start, first), Stage(start + h / 3, second), Stage(start + 2 * h / 3, third), Stage(end, fourth)


_SOLVERS: dict[Solver, Callable[[tuple[float, ...]], tuple[Stage, ...]]] = {
    "euler": _euler,
    "ab2": _ab2,
    "rk4": _rk4,
}
