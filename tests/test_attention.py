from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from lowvram import attention
from lowvram.attention import _with_lse, attend, explicit_attention
from lowvram.offload.meter import LiveBytes


def heads(
    n: int, total: int, dtype: torch.dtype = torch.float64, hq: int = 4, hkv: int = 2
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(n * 1000 + total)
    q = torch.randn(1, hq, n, 8, dtype=dtype)
    k, v = torch.randn(2, 1, hkv, total, 8, dtype=dtype)
    return q, k, v


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    return explicit_attention(q, k, v, **options)[0]


@pytest.mark.parametrize(("n", "past"), [(1, 0), (7, 0), (1, 9), (2, 1), (5, 3), (64, 200), (200, 64)])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_explicitly_masked(n: int, past: int, causal: bool):
    q, k, v = heads(n, past + n)
    torch.testing.assert_close(attend(q, k, v, causal=causal), masked(q, k, v, causal=causal))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_precision_of_the_merge_is_that_of_the_dtype(dtype: torch.dtype, tolerance: float):
    q, k, v = heads(33, 100, dtype)
    exact = masked(q.double(), k.double(), v.double(), causal=True)
    assert (attend(q, k, v, causal=True).double() - exact).abs().max() <= tolerance


def test_the_log_sum_exp_of_both_twins_agree():
    q, k, v = heads(6, 6, hq=2)
    _, expected = explicit_attention(q, k, v, causal=True)
    _, lse = _with_lse(q, k, v, causal=True, scale=None)
    torch.testing.assert_close(lse, expected)


def test_the_past_is_never_copied_for_grouped_heads():
    """What is allocated beyond the result depends on the chunk, not on the past."""

    def peak_bytes(past: int) -> int:
        q, k, v = heads(4, past + 4, torch.float32)
        with LiveBytes() as meter:
            attend(q, k, v, causal=True)
        return meter.peak_bytes

    assert peak_bytes(4000) == peak_bytes(40)


def test_scale_is_applied():
    q, k, v = heads(5, 12)
    torch.testing.assert_close(attend(q, k, v, causal=True, scale=0.3), masked(q, k, v, causal=True, scale=0.3))


def test_cache_views_with_gaps_between_heads_are_read_rightly():
    q, k, v = heads(3, 10)
    store = torch.full((2, 1, 2, 50, 8), float("nan"), dtype=torch.float64)
    store[0, :, :, :10], store[1, :, :, :10] = k, v
    torch.testing.assert_close(
        attend(q, store[0, :, :, :10], store[1, :, :, :10], causal=True), masked(q, k, v, causal=True)
    )


def test_extreme_scores_do_not_overflow_the_merge():
    q, k, v = heads(4, 12, torch.float32)
    out = attend(q * 1e4, k, v, causal=True)
    torch.testing.assert_close(out, masked(q * 1e4, k, v, causal=True))


def test_the_library_finds_it_by_name():
    attention.register()
    assert attention.NAME in AttentionInterface().valid_keys()
