"""Exact attention without masks: for chunked prefill, for decode, and for the encoders' windows.

An explicit mask of chunk x past keys rules out the flash kernels and makes memory grow with the prompt. No mask is
needed: a decode step sees every key, a first chunk is plainly causal, and a later chunk is its whole past plus a
causal triangle on itself. The modelling library takes the function through its public registry, under `NAME`.

Shapes: q [B, Hq, n, D]; k, v [B, Hkv, past + n, D] with Hq a multiple of Hkv (grouped heads stay as they are).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
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
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    if past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return (past_and_chunk if q.device.type == "cpu" else lower_right)(q, k, v, scale)


def lower_right(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention of a later chunk: torch picks a flash kernel with bottom-right causality, and builds no mask."""
    bias = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)


def past_and_chunk(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The same on a CPU: flash attention on the past and on the chunk, merged by the log-sum-exp of their scores.

    There torch would turn `causal_lower_right` into a dense mask; its flash operator returns what a merge needs:
    softmax over a union of key sets is the average of the parts, weighted by exp(lse_part - lse_union).
    """
    past = k.shape[2] - q.shape[2]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    seen, lse_seen = flash(q, k[:, :, :past], v[:, :, :past], 0.0, False, scale=scale)
    own, lse_own = flash(q, k[:, :, past:], v[:, :, past:], 0.0, True, scale=scale)
    weight_seen = torch.sigmoid(lse_seen - lse_own).unsqueeze(-1)
    return torch.lerp(own.to(weight_seen.dtype), seen.to(weight_seen.dtype), weight_seen).to(q.dtype)


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


def masked_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None) -> Tensor:
    """The slow twin of `attend`: explicit mask, explicit softmax, heads repeated. For tests and for reading."""
    groups, n, total = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        hidden = torch.ones(n, total, dtype=torch.bool, device=q.device).triu(total - n + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v
