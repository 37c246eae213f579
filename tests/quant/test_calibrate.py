from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_by_hand import GROUP_SIZE, STORAGE, clip_by_hand, rounded

from lowvram.quant.calibrate import (
    InputStatistics,
    candidate_scales,
    clipped,
    rounded_under,
    search_clip,
    weight_magnitudes,
)
from lowvram.quant.packing import fake_quantize, pack_awq, unpack_awq


def random_linear(seed: int, n: int = 24, k: int = 64, tokens: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [N, K] with a heavy tail, inputs [tokens, K] with loud channels)"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator)
    x[:, [2, 40]] *= 20
    return torch.randn(n, k, generator=generator) ** 3, x


def statistics_of(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], GROUP_SIZE, x.device)
    statistics.add(x)
    return statistics


def test_magnitudes_and_moments_are_means_over_all_rows_that_were_added():
    x = random_linear(0)[1]
    whole, cut = statistics_of(x), InputStatistics(64, GROUP_SIZE, x.device)
    for part in x.split(7):
        cut.add(part.unsqueeze(0))
    torch.testing.assert_close(whole.magnitudes, x.abs().mean(0))
    torch.testing.assert_close(whole.moments()[1], x[:, 32:].T @ x[:, 32:] / 50)
    torch.testing.assert_close(cut.moments(), whole.moments())
    torch.testing.assert_close(cut.magnitudes, whole.magnitudes)


def test_moments_of_divided_inputs_are_divided():
    x, scales = random_linear(1)[1], torch.rand(64) + 0.5
    torch.testing.assert_close(statistics_of(x).moments(scales), statistics_of(x / scales).moments())


def test_weight_magnitudes_count_each_group_relative_to_its_largest():
    weight = torch.cat([torch.full((2, 32), 5.0), torch.full((2, 32), 0.1)], dim=1)
    torch.testing.assert_close(weight_magnitudes([weight, weight], GROUP_SIZE), torch.ones(64), rtol=1e-4, atol=0)


def test_candidates_run_from_weights_alone_to_inputs_and_are_balanced_around_1():
    inputs, weights = torch.tensor([0.1, 1.0, 10.0]), torch.tensor([0.5, 0.25, 1.0])
    scales = candidate_scales(inputs, weights)
    assert scales.shape == (20, 3)
    torch.testing.assert_close(scales[0] / scales[0, 2], 1 / weights, rtol=1e-3, atol=0)
    torch.testing.assert_close(scales[10] / scales[10, 2], (inputs / weights / 10).sqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(scales.amax(1) * scales.amin(1), torch.ones(20))


def test_a_silent_channel_has_finite_scales():
    scales = candidate_scales(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.0]))
    assert scales.isfinite().all() and (scales > 0).all()


def test_weights_scaled_by_powers_of_two_round_as_if_they_were_not_if_a_group_shares_them():
    weight, scales = random_linear(2)[0], torch.tensor([4.0] * 32 + [0.5] * 32)
    assert torch.equal(rounded_under(weight, scales, STORAGE), fake_quantize(weight, GROUP_SIZE))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_clips_are_those_found_token_by_token(seed: int):
    weight, x = random_linear(seed)
    found, expected = search_clip(weight, statistics_of(x).moments(), STORAGE), clip_by_hand(weight, x)
    assert ((found / expected - 1).abs() < 1e-6).float().mean() > 0.95  # two ranges may cost the same but for rounding


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_clipping_helps_each_group_or_does_nothing(seed: int):
    weight, x = random_linear(seed)
    narrowed = clipped(weight, search_clip(weight, statistics_of(x).moments(), STORAGE), GROUP_SIZE)

    def cost(stored: torch.Tensor) -> torch.Tensor:
        change = (stored - weight).unflatten(1, (-1, GROUP_SIZE))
        return torch.einsum("tgi,ngi->tng", x.unflatten(1, (-1, GROUP_SIZE)), change).pow(2).mean(0)

    assert (cost(rounded(narrowed)) <= cost(rounded(weight)) * (1 + 1e-4) + 1e-6).all()
    assert cost(rounded(narrowed)).sum() < cost(rounded(weight)).sum()


def test_clips_do_not_depend_on_how_many_rows_are_searched_at_once(monkeypatch: pytest.MonkeyPatch):
    weight, x = random_linear(3)
    moments = statistics_of(x).moments()
    whole = search_clip(weight, moments, STORAGE)
    monkeypatch.setattr("lowvram.quant.calibrate.CLIP_SLICE_WEIGHTS", 5 * 64)
    torch.testing.assert_close(search_clip(weight, moments, STORAGE), whole)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), offset=st.sampled_from([-3.0, 0.0, 3.0]))
def test_a_weight_is_judged_exactly_as_it_is_stored(seed: int, offset: float):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)) + offset
    assert torch.equal(
        fake_quantize(weight, GROUP_SIZE), unpack_awq(*pack_awq(weight, GROUP_SIZE), GROUP_SIZE, torch.float32)
    )
