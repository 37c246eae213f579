"""Solvers as chains of evaluations, against the reference's solver and against pencil and paper."""

import math

import pytest
import torch
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import RungeKutta4ODESolver

from lowvram.token2wav.ode import solver_stages, time_grid


def solve(name, velocity, x, times):
    state = (x,)
    for stage in solver_stages(name, times):
        state = stage.advance(state, velocity(stage.time, state[0]))
    (x,) = state
    return x


def test_the_grid_is_the_references() -> None:
    t = torch.linspace(0, 1, 10, dtype=torch.float64)
    expected = t - (torch.cos(torch.pi / 2 * t) - 1 + t)
    assert time_grid(10) == pytest.approx(expected.tolist(), abs=1e-15)


def test_sway_zero_is_an_even_grid() -> None:
    assert time_grid(5, sway=0.0) == (0.0, 0.25, 0.5, 0.75, 1.0)


def test_the_smallest_grid_goes_from_0_to_1() -> None:
    assert time_grid(2) == pytest.approx((0.0, 1.0), abs=1e-15)


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 9), ("ab2", 9), ("rk4", 36)])
def test_ten_points_take_the_stated_evaluations(name, evaluations) -> None:
    assert len(solver_stages(name, time_grid(10))) == evaluations


def test_euler_by_hand() -> None:
    assert solve("euler", lambda t, x: t + x, 1.0, (0.0, 0.5, 1.0)) == (1.0 + 0.5 * 1.0) + 0.5 * (0.5 + 1.5)


def test_ab2_by_hand() -> None:
    """dx/dt = t from 0 by Euler's step to 0.5 (which leaves x at 0), then along the line through both slopes: exact."""
    assert solve("ab2", lambda t, x: t, 0.0, (0.0, 0.5, 1.0)) == 0.0 + 0.5 * (0.5 + 0.5 / 1.0 * (0.5 - 0.0))


@pytest.mark.parametrize("third", [0.6, 0.75, 2.0])
def test_ab2_integrates_a_line_exactly_whatever_its_steps(third) -> None:
    """After its first step, which sees no slope before it."""
    begun = solve("ab2", lambda t, x: 3 * t + 1, 0.0, (0.0, 0.5))
    exact = begun + 1.5 * (third**2 - 0.5**2) + (third - 0.5)
    assert solve("ab2", lambda t, x: 3 * t + 1, 0.0, (0.0, 0.5, third)) == pytest.approx(exact, abs=1e-14)


def test_one_step_of_ab2_is_eulers() -> None:
    assert solve("ab2", lambda t, x: t + x, 1.0, (0.0, 1.0)) == solve("euler", lambda t, x: t + x, 1.0, (0.0, 1.0))


def test_rk4_is_the_references_solver() -> None:
    def velocity(t, x):
        return torch.sin(3 * x) + t * x

    x = torch.randn(1, 7, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.tensor(time_grid(10), dtype=torch.float64)
    expected = RungeKutta4ODESolver(function=velocity, initial_value=x).integrate(times)[-1]
    torch.testing.assert_close(solve("rk4", velocity, x, time_grid(10)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sway", [0.0, -1.0])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ab2", 2), ("rk4", 4)])
def test_halving_the_step_shows_the_order(name, order, sway) -> None:
    def error(steps: int) -> float:
        return abs(solve(name, lambda t, x: x, 1.0, time_grid(steps, sway)) - math.e)

    assert math.log2(error(41) / error(81)) == pytest.approx(order, abs=0.1)
