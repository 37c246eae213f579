from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from transformers import AttentionInterface

from lowvram import attention
from lowvram.attention import SLICE_POSITIONS, _with_lse, attend, attend_in_windows, explicit_attention
from lowvram.kv_cache import Int8Heads, Int8KVCache, TailedHeads
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


@pytest.mark.parametrize(("n", "total"), [(512, 512), (512, 4096), (1, 4096)])
def test_a_trace_counts_no_scores(n: int, total: int):
    """On `meta` the memory-bounded kernel stands in: its work space is less than half of what 16-bit scores take."""
    with LiveBytes("meta") as meter:
        q = torch.empty(1, 4, n, 64, dtype=torch.bfloat16, device="meta")
        k, v = torch.empty(2, 1, 2, total, 64, dtype=torch.bfloat16, device="meta")
        given_bytes = meter.live_bytes
        out = attend(q, k, v, causal=True)
    assert (out.shape, out.device.type) == (q.shape, "meta")
    scores_bytes = 2 * q.shape[1] * n * total
    assert meter.peak_bytes - given_bytes < scores_bytes / 2


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


def in_8_bits(k: torch.Tensor, v: torch.Tensor) -> tuple[Int8Heads, Int8Heads]:
    """Keys and values as an 8-bit cache hands them out."""
    _, kv_heads, total, width = k.shape
    cache = Int8KVCache(1, kv_heads, width, total, dtype=k.dtype, device=k.device)
    keys, values = cache.update(k, v, 0)
    assert isinstance(keys, Int8Heads) and isinstance(values, Int8Heads)
    return keys, values


def read_back(heads: Int8Heads) -> torch.Tensor:
    read = heads.read(0, heads.shape[2])
    return read if heads.turn is None else read @ heads.turn.mT.to(read.dtype)


@pytest.mark.parametrize(
    ("n", "past"),
    [
        (1, 0),
        (1, 9),
        (7, 0),
        (5, 3),
        (1, 2047),
        (1, 2048),
        (3, 2048),
        (3, 2049),
        (2, 4500),
        (2048, 5),
        (2049, 5),
        (4100, 0),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_8_bit_slices_are_attended_to_as_if_read_back_whole(n: int, past: int, causal: bool):
    q, k, v = heads(n, past + n, hq=2, hkv=1)
    k, v = in_8_bits(k, v)
    torch.testing.assert_close(
        attend(q, k, v, causal=causal), masked(q, read_back(k), read_back(v), causal=causal), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("chunk", [1, 7, 40, 100])
def test_8_bits_give_the_same_however_a_prompt_is_cut(chunk: int):
    q, k, v = heads(100, 100)
    cache = Int8KVCache(1, 2, 8, 100, dtype=q.dtype, device=q.device)
    outs = [
        attend(piece, *cache.update(*kv, 0), causal=True)
        for piece, *kv in zip(q.split(chunk, 2), k.split(chunk, 2), v.split(chunk, 2), strict=True)
    ]
    torch.testing.assert_close(torch.cat(outs, 2), attend(q, *in_8_bits(k, v), causal=True), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("outlier", "tolerance"), [(1, 0.015), (10, 0.02), (30, 0.03)])
def test_8_bits_keep_attention_within_what_their_rounding_explains(outlier: float, tolerance: float):
    """The relative error of the output, also for keys of which two channels in 128 are far larger than the rest.

    Rounding in steps of a/127, a the largest of a head, is an error of a / (254 sqrt 3) per element. Of values from a
    normal distribution a is 2.8 standard deviations: 0.0064. Turned keys have the standard deviation that makes their
    length, sqrt((126 + 2 outlier^2) / 128): 1, 1.6 and 3.9 times that of plain ones, and move scores by
    |q| / sqrt 128 times 0.0064 as often, with |q| / sqrt 128 = 1. In all sqrt(1 + 1), sqrt(1 + 1.6^2) and
    sqrt(1 + 3.9^2) times 0.0064, that is 0.009, 0.012 and 0.026. Unturned keys would give 0.09 at the last.
    """
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 4, 64, 128), torch.randn(2, 1, 2, 3000, 128)
    k[..., [5, 70]] *= outlier
    q[..., [5, 70]] /= outlier
    exact = masked(q, k, v, causal=True)
    error = attend(q, *in_8_bits(k, v), causal=True) - exact
    assert error.norm() / exact.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("past", "seen", "tail"), [(0, 1, 1), (0, 3, 8), (1, 1, 8), (300, 8, 8), (300, 200, 256)])
def test_a_tail_is_attended_to_as_far_as_its_bias_lets(dtype: torch.dtype, past: int, seen: int, tail: int):
    """Two parts rounded to the compute dtype are averaged: within one rounding of attention over all at once."""
    q, k, v = heads(1, past + tail, torch.float64, hq=6, hkv=2)
    bias = torch.zeros(1, 1, 1, tail, dtype=dtype)
    bias[..., seen:] = -torch.inf
    parts = ([part.to(dtype) for part in (whole[:, :, :past], whole[:, :, past:])] for whole in (k, v))
    tailed = [TailedHeads(*part, bias) for part in parts]
    exact = masked(q, k[:, :, : past + seen], v[:, :, : past + seen], causal=False)
    out = attend(q.to(dtype), *tailed, causal=True)
    assert (out.dtype, out.shape) == (dtype, q.shape)
    torch.testing.assert_close(out.double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=0)


class Watched(Int8Heads):
    """Heads that note how many positions are read back at a time."""

    spans: ClassVar[list[int]] = []

    def read(self, start: int, stop: int) -> torch.Tensor:
        self.spans.append(stop - start)
        return super().read(start, stop)


@pytest.mark.parametrize(("n", "past"), [(1, 5000), (3, 5000), (5000, 0), (5000, 3000)])
def test_never_are_more_than_2048_positions_read_back_at_once(n: int, past: int):
    q, k, v = heads(n, past + n, torch.float32, hq=1, hkv=1)
    keys, values = (Watched(**vars(quantized)) for quantized in in_8_bits(k, v))
    Watched.spans.clear()
    attend(q, keys, values, causal=True)
    assert max(Watched.spans) == 2048


def test_slices_are_gone_when_the_next_is_read_back():
    def peak_bytes(total: int) -> int:
        q, k, v = heads(4, total, torch.float32)
        keys, values = in_8_bits(k, v)
        with LiveBytes() as meter:
            attend(q, keys, values, causal=True)
        return meter.peak_bytes

    one_slice_bytes = 2 * 2 * SLICE_POSITIONS * 8 * 4  # keys and values of two heads
    assert peak_bytes(6 * SLICE_POSITIONS) == peak_bytes(3 * SLICE_POSITIONS) < 1.05 * one_slice_bytes


@pytest.mark.parametrize("lengths", [(5, 5, 5, 2, 5, 5, 2), (3,), (1, 2, 3), (4, 4)], ids=str)
def test_windows_taken_together_are_each_attended_to_alone(lengths: tuple[int, ...]):
    q, k, v = (torch.randn(1, 2, sum(lengths), 8, dtype=torch.float64) for _ in range(3))
    alone = [
        explicit_attention(*window, causal=False, scale=0.3)[0]
        for window in zip(*(heads.split(lengths, 2) for heads in (q, k, v)), strict=True)
    ]
    assert torch.allclose(attend_in_windows(q, k, v, lengths, scale=0.3), torch.cat(alone, 2), rtol=0, atol=1e-14)


def test_windows_of_one_length_are_one_batch(monkeypatch: pytest.MonkeyPatch):
    batches: list[int] = []
    attend_once = attention.attend

    def counted(q: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        batches.append(len(q))
        return attend_once(q, *others, **options)

    monkeypatch.setattr(attention, "attend", counted)
    q, k, v = (torch.randn(1, 2, 22, 8) for _ in range(3))
    attend_in_windows(q, k, v, (5, 5, 5, 2, 5))
    assert batches == [3, 1, 1]


def test_the_library_finds_it_by_name():
    attention.register()
    assert attention.NAME in AttentionInterface().valid_keys()
