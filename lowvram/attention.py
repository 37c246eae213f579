"""Exact attention without masks: for chunked prefill, for decode, and for the encoders' windows.

An explicit mask of chunk x past keys rules the memory-bounded kernels out and makes memory grow with the prompt. No
mask is needed: a decode step sees every key, a first chunk is plainly causal, and a later chunk is its whole past plus
a causal triangle on itself, merged by the log-sum-exp of their scores. Nor need grouped key heads be repeated over the
past: where nothing is hidden, the queries of a group are just more rows. The modelling library takes the function
through its public registry, under `NAME`.

Shapes: q [B, Hq, n, D]; k, v [B, Hkv, past + n, D] with Hq a multiple of Hkv; log-sum-exp [B, H, n].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AttentionInterface

NAME = "lowvram"


def register() -> None:
    """Offer `attend` to the modelling library as attention implementation `NAME`; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention_interface)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None) -> Tensor:
    """Attention of `q`, the newest positions, over all of `k` and `v`; `causal` hides later keys from earlier queries.

    Returns [B, Hq, n, D]. Equal to softmax attention under a lower-right causal mask.
    """
    n, past = q.shape[2], k.shape[2] - q.shape[2]
    if not causal or n == 1:
        rows = _as_rows(q, k.shape[1])
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).view_as(q)
    if past == 0:
        k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    out, lse = _own_chunk(q, k[:, :, past:], v[:, :, past:], scale)
    rows = _as_rows(q, k.shape[1])
    seen, lse_seen = _with_lse(rows, k[:, :, :past], v[:, :, :past], causal=False, scale=scale)
    return _merge(out, lse, seen.reshape(q.shape), lse_seen.reshape(lse.shape))


def _own_chunk(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
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


def _with_lse(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention with as many key heads as query heads, and its log-sum-exp, by the device's memory-bounded kernel.

    On CUDA that is flash attention, or the memory-efficient kernel where there is none: Windows wheels of torch,
    cards before Ampere, float32. The latter pads its log-sum-exp to a multiple of 32 rows.
    """
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if q.device.type != "cuda":
        return explicit_attention(q, k, v, causal=causal, scale=scale)
    if can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, causal, False)):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The slow twin of `attend`, with the log-sum-exp: explicit mask, explicit softmax, heads repeated.

    For devices without kernels of their own, for tests, and for reading.
    """
    groups, n, total = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        hidden = torch.ones(n, total, dtype=torch.bool, device=q.device).triu(total - n + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The modelling library's calling convention: heads second in, positions second out, no weights returned."""
    assert attention_mask is None, "this runtime never builds attention masks"
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    return attend(query, key, value, causal=causal, scale=scaling).transpose(1, 2), None
