"""Exact attention without masks: for chunked prefill, for decode, and for the encoders' windows.

An explicit mask of chunk x past keys rules the memory-bounded kernels out and makes memory grow with the prompt. No
mask is needed: a decode step sees every key, a first chunk is plainly causal, and a later chunk is its whole past plus
a causal triangle on itself, merged by the log-sum-exp of their scores. Nor need grouped key heads be repeated over the
past: where nothing is hidden, the queries of a group are just more rows. The modelling library takes the function
through its public registry, under `NAME`.

A past that is kept in 8 bits is read back slice by slice and merged in the same way. So is the tail of a captured step:
its shape is the same at every position, so the few keys that are still to come are hidden by a bias, and only there.
Windows of one length are a batch.

Shapes: q [B, Hq, n, D]; k, v [B, Hkv, past + n, D] with Hq a multiple of Hkv; log-sum-exp [B, H, n].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AttentionInterface

from .kv_cache import Heads, Int8Heads, TailedHeads

NAME = "lowvram"

SLICE_POSITIONS = 2048
"""Positions of an 8-bit past that are in the compute dtype at once: 4 MiB of a 7B's keys and values in 16 bit."""

Part = tuple[Tensor, Tensor]
"""Attention over some of the keys, and its log-sum-exp."""


def register() -> None:
    """Offer `attend` to the modelling library as attention implementation `NAME`; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention_interface)


def attend(q: Tensor, k: Heads, v: Heads, *, causal: bool, scale: float | None = None) -> Tensor:
    """Attention of `q`, the newest positions, over all of `k` and `v`; `causal` hides later keys from earlier queries.

    Returns [B, Hq, n, D]. Equal to softmax attention under a lower-right causal mask.
    """
    if isinstance(k, Int8Heads):
        assert isinstance(v, Int8Heads)
        return _attend_in_slices(q, k, v, causal=causal, scale=scale)
    if isinstance(k, TailedHeads):
        assert isinstance(v, TailedHeads) and q.shape[2] == 1
        return _attend_to_tail(q, k, v, scale=scale)
    assert isinstance(v, Tensor)
    n, past = q.shape[2], k.shape[2] - q.shape[2]
    if not causal or n == 1:
        return _fused(_as_rows(q, k.shape[1]), k, v, causal=False, scale=scale).reshape(q.shape)
    if past == 0:
        k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
        return _fused(q, k, v, causal=True, scale=scale)
    out, lse = _own_chunk(q, k[:, :, past:], v[:, :, past:], scale)
    rows = _as_rows(q, k.shape[1])
    seen, lse_seen = _with_lse(rows, k[:, :, :past], v[:, :, :past], causal=False, scale=scale)
    return _merge(out, lse, seen.reshape(q.shape), lse_seen.reshape(lse.shape))


def attend_in_windows(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, scale: float | None = None) -> Tensor:
    """Attention of each position over its window; windows of these `lengths` lie one after another. B is 1."""
    outs, start = [], 0
    for length, equals in groupby(lengths):
        count = len(list(equals))
        q_run, k_run, v_run = (
            heads[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)
            for heads in (q, k, v)
        )
        outs.append(attend(q_run, k_run, v_run, causal=False, scale=scale).transpose(0, 1).flatten(1, 2))
        start += count * length
    assert start == q.shape[2], f"windows of {start} positions in all for {q.shape[2]}"
    return (torch.cat(outs, 1) if len(outs) > 1 else outs[0]).unsqueeze(0)


def _attend_in_slices(q: Tensor, k: Int8Heads, v: Int8Heads, *, causal: bool, scale: float | None) -> Tensor:
    """`attend` on keys and values in 8 bits: at most `SLICE_POSITIONS` of either are read back at once."""
    if k.turn is not None:
        exact = torch.promote_types(q.dtype, k.turn.dtype)
        q = (q.to(exact) @ k.turn.to(exact)).to(q.dtype)
    n, past = q.shape[2], k.shape[2] - q.shape[2]
    if not causal or n == 1:
        return _join(q, k, v, None, k.shape[2], scale)
    outs = []
    for start in range(0, n, SLICE_POSITIONS):
        chunk = q[:, :, start : start + SLICE_POSITIONS]
        seen, total = past + start, past + start + chunk.shape[2]
        own = _own_chunk(chunk, k.read(seen, total), v.read(seen, total), scale)
        outs.append(_join(chunk, k, v, own, seen, scale))
    return torch.cat(outs, 2) if len(outs) > 1 else outs[0]


def _join(q: Tensor, k: Int8Heads, v: Int8Heads, part: Part | None, seen: int, scale: float | None) -> Tensor:
    """Attention of all of `q` over the first `seen` keys, and over those that `part` has seen already."""
    rows = _as_rows(q, k.shape[1])
    for start in range(0, seen, SLICE_POSITIONS):
        stop = min(start + SLICE_POSITIONS, seen)
        part = _union(part, _with_lse(rows, k.read(start, stop), v.read(start, stop), causal=False, scale=scale))
    assert part is not None, "there is at least one key"
    return part[0].reshape(q.shape).to(q.dtype)


def _attend_to_tail(q: Tensor, k: TailedHeads, v: TailedHeads, *, scale: float | None) -> Tensor:
    """One query per head over a whole past and what a bias leaves of the tail."""
    rows = _as_rows(q, k.tail.shape[1])
    out, lse = _with_lse(rows, k.tail, v.tail, causal=False, scale=scale, bias=k.bias)
    if k.past.shape[2]:
        out = _merge(out, lse, *_with_lse(rows, k.past, v.past, causal=False, scale=scale))
    return out.reshape(q.shape)


def _union(part: Part | None, more: Part) -> Part:
    """Two parts as one, shaped as the second and, since there may be many, in the precision of log-sum-exps."""
    out, lse = more
    if part is None:
        return out.to(lse.dtype), lse
    known, lse_known = part[0].reshape(out.shape).to(lse.dtype), part[1].reshape(lse.shape)
    return _merge(known, lse_known, out, lse), torch.logaddexp(lse_known, lse)


def _own_chunk(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Part:
    """The chunk on itself. Causal rows cannot be folded, so its few keys are repeated, and gone again afterwards."""
    k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
    return _with_lse(q, k, v, causal=True, scale=scale)


def _as_rows(q: Tensor, kv_heads: int) -> Tensor:
    """Queries [B, Hq, n, D] as [B, Hkv, Hq/Hkv * n, D]: those that share a key head, one after another."""
    return q.reshape(q.shape[0], kv_heads, -1, q.shape[-1])


def _merge(out: Tensor, lse: Tensor, seen: Tensor, lse_seen: Tensor) -> Tensor:
    """Softmax over a union of key sets: the average of the parts, weighted by exp(lse_part - lse_union)."""
    weight = torch.sigmoid(lse_seen - lse).unsqueeze(-1)
    return torch.lerp(out.to(weight.dtype), seen.to(weight.dtype), weight).to(out.dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> Tensor:
    """Attention with as many key heads as query heads, by the device's memory-bounded kernel.

    Torch's own choice could fall on the one that spells out all scores: it does on `meta`, where no trace of memory
    should count them, and on CUDA where an application has switched the others off.
    """
    if q.device.type in ("cuda", "meta"):
        return _with_lse(q, k, v, causal=causal, scale=scale)[0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def _with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None, bias: Tensor | None = None
) -> Part:
    """Attention with as many key heads as query heads, and its log-sum-exp, by the device's memory-bounded kernel.

    On CUDA that is flash attention, or the memory-efficient kernel where there is none (Windows wheels of torch, cards
    before Ampere, float32) and for a `bias`, which flash attention does not know. It pads its log-sum-exp to a multiple
    of 32 rows. A `meta` tensor stands for one on a CUDA device with flash attention.
    """
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if q.device.type not in ("cuda", "meta"):
        return explicit_attention(q, k, v, causal=causal, scale=scale, bias=bias)
    if bias is None and (q.is_meta or can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, causal, False))):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    else:
        bias = bias if bias is None else bias.expand(*q.shape[:3], -1)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None, bias: Tensor | None = None
) -> Part:
    """The slow twin of `attend`, with the log-sum-exp: explicit mask, explicit softmax, heads repeated.

    For devices without kernels of their own, for tests, and for reading.
    """
    groups, n, total = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if causal:
        hidden = torch.ones(n, total, dtype=torch.bool, device=q.device).triu(total - n + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Heads,
    value: Heads,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    windows: Sequence[int] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The modelling library's calling convention: heads second in, positions second out, no weights returned.

    Its encoders' layers hand on what else they are called with: the lengths of `windows`, which they would take one by
    one from their own argument.
    """
    assert attention_mask is None, "this runtime never builds attention masks"
    if windows is not None:
        assert isinstance(key, Tensor) and isinstance(value, Tensor)
        return attend_in_windows(query, key, value, windows, scale=scaling).transpose(1, 2), None
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    return attend(query, key, value, causal=causal, scale=scaling).transpose(1, 2), None
