from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from agreement import (
    POSITIONS_AT_ONCE,
    agreed_tokens,
    agreement_of_answers,
    divergence,
    divergence_of_rows,
    log_spectral_distance,
    relative_error,
    wilson_interval,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

SAMPLES = 9000


def random_logits(positions: int, ids: int, seed: int) -> Tensor:
    return 4 * torch.randn(positions, ids, generator=torch.Generator().manual_seed(seed))


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, SAMPLES).astype(np.float32)


def test_equal_logits_are_exactly_0_apart_and_agree_everywhere():
    logits = random_logits(40, 300, seed=0)
    found = divergence(logits, logits.clone())
    assert found.kl.max() == 0 and found.same_top.all()


def test_a_divergence_is_the_definition_s_sum_over_all_ids():
    reference, candidate = random_logits(5, 300, seed=0), random_logits(5, 300, seed=1)
    p, q = (np.exp(logits.numpy().astype(np.float64)) for logits in (reference, candidate))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    found = divergence(reference, candidate)
    assert found.kl.numpy() == pytest.approx((p * np.log(p / q)).sum(1), rel=1e-9)
    assert found.same_top.tolist() == [a == b for a, b in zip(p.argmax(1), q.argmax(1), strict=True)]


def test_a_divergence_counts_from_the_reference_s_side():
    sure, torn = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert float(divergence(sure, torn).kl) == pytest.approx(math.log(2), rel=1e-6)
    assert float(divergence(torn, sure).kl) == pytest.approx(10 - math.log(2), rel=1e-6)


def test_a_constant_added_to_all_logits_changes_no_distribution():
    logits = random_logits(4, 50, seed=0)
    assert divergence(logits, logits + 3).kl.max() < 1e-12


def test_ids_that_only_one_vocabulary_has_are_left_out():
    padded, shorter = random_logits(3, 60, seed=0), random_logits(3, 50, seed=1)
    assert torch.equal(divergence(padded, shorter).kl, divergence(padded[:, :50], shorter).kl)
    assert torch.equal(divergence(shorter, padded).kl, divergence(shorter, padded[:, :50]).kl)


def test_slices_through_two_heads_give_what_whole_logits_give():
    generator = torch.Generator().manual_seed(0)
    positions = 2 * POSITIONS_AT_ONCE + 3
    rows = [torch.randn(positions, width, generator=generator) for width in (24, 16)]
    heads = nn.Linear(24, 200, bias=False), nn.Linear(16, 200, bias=False)
    with torch.inference_mode():
        found = divergence_of_rows(*rows, heads)
        whole = divergence(*(head(hidden) for head, hidden in zip(heads, rows, strict=True)))
    assert len(found.kl) == positions
    assert torch.allclose(found.kl, whole.kl, rtol=1e-6) and torch.equal(found.same_top, whole.same_top)


def test_a_summary_has_the_mean_the_99th_percentile_and_the_share_of_equal_tops():
    reference = torch.zeros(101, 2)
    candidate = torch.stack([torch.linspace(0, 2, 101), torch.zeros(101)], dim=1)
    found = divergence(reference, candidate)
    summary = found.summary()
    assert summary["positions"] == 101
    assert summary["kl_mean_nats"] == pytest.approx(float(found.kl.sum()) / 101)
    assert summary["kl_p99_nats"] == pytest.approx(float(found.kl[99]))
    assert summary["top1_agreement"] == 1.0


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_answers_agree_for_what_they_begin_with_alike(beginning: list[int], one: list[int], other: list[int]):
    agreed = agreed_tokens(beginning + one, beginning + other)
    assert len(beginning) <= agreed <= len(beginning) + min(len(one), len(other))
    assert (beginning + one)[:agreed] == (beginning + other)[:agreed]
    assert [*beginning, *one, -1][agreed] != [*beginning, *other, -2][agreed]


def test_an_answer_that_stops_sooner_is_not_identical():
    found = agreement_of_answers([((1, 2, 3), (1, 2)), ((1, 2), (1, 2)), ((5,), (6,))])
    assert (found["agreed_tokens_median"], found["agreed_tokens_min"], found["identical"]) == (2, 0, 1)
    assert found["reference_tokens_median"] == 2


def test_equal_sounds_are_0_apart():
    sound = noise(0)
    assert relative_error(sound, sound) == 0.0
    assert log_spectral_distance(sound, sound) == 0.0


def test_a_sound_half_as_loud_is_a_half_and_6_decibels_apart():
    sound = noise(0)
    assert relative_error(sound, sound / 2) == pytest.approx(0.5, rel=1e-6)
    assert log_spectral_distance(sound, sound / 2) == pytest.approx(20 * math.log10(2), rel=1e-4)


def test_spectra_do_not_hear_a_sign_that_samples_do():
    sound = noise(0)
    assert relative_error(sound, -sound) == pytest.approx(2.0)
    assert log_spectral_distance(sound, -sound) == pytest.approx(0.0, abs=1e-9)


def test_a_shorter_sound_is_followed_by_silence():
    sound = noise(0)
    assert relative_error(sound, sound[: SAMPLES // 2]) == pytest.approx(math.sqrt(0.5), rel=0.05)
    assert log_spectral_distance(sound, sound[: SAMPLES // 2]) > 20


def test_silences_are_0_apart_and_a_sound_where_silence_was_is_not():
    silence, sound = np.zeros(SAMPLES, np.float32), noise(0)
    assert relative_error(silence, silence) == 0.0 and log_spectral_distance(silence, silence) == 0.0
    assert relative_error(silence, sound) == math.inf
    assert log_spectral_distance(silence[:0], silence[:0]) == 0.0


def test_wilson_s_interval_is_the_published_one():
    low, high = wilson_interval(8, 10)  # by hand: 0.4902 to 0.9433
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@given(st.integers(0, 200), st.integers(0, 200))
def test_an_interval_holds_its_share_and_stays_a_share(right: int, wrong: int):
    low, high = wilson_interval(right, right + wrong)
    assert 0 <= low <= high <= 1
    assert right + wrong == 0 or low - 1e-12 <= right / (right + wrong) <= high + 1e-12
