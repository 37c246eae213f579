"""One decoder layer of the DiT, taken apart where blocks of frames see one another.

Projection and output work row by row. What needs neighbours is a `Border`: the frames that wait for the block ahead,
the keys and values that the next block looks back on.

Weights may be of lower precision than rows: products are taken in the weights' dtype, everything between in the rows'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flow import Weights
from .carry import Carry, Queue


class Heads(NamedTuple):
    """Queries, keys and values, each [G, heads, F, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


def layer_blocks(dit: Any, layers: Weights | None) -> Weights:
    """`layers`, or the DiT's own where they come with it."""
    return layers if layers is not None else [nullcontext(layer) for layer in dit.transformer_blocks]


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows` times a weight, taken in the weight's dtype and given in the rows'."""
    return F.linear(rows.to(weight.dtype), weight, bias).to(rows.dtype)


def project(layer: Any, modulation: Tensor, rows: Tensor, turn: Tensor) -> Heads:
    """Rows [G, F, H] and their rotary table [F, D] to heads, by a `DiTDecoderLayer`.

    `modulation` [2, H] is the attention's shift and scale.
    """
    attention, (shift, scale) = layer.attn, modulation
    rows = (layer.attn_norm.norm(rows) * (1 + scale) + shift).to(attention.to_q.weight.dtype)
    query, key, value = (
        projection(rows).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for projection in (attention.to_q, attention.to_k, attention.to_v)
    )
    return Heads(_rotate_first_head(query, turn), _rotate_first_head(key, turn), value)


def output(layer: Any, modulation: Tensor, rows: Tensor, attended: Tensor) -> Tensor:
    """What the layer makes of rows [G, F, H] that have attended [G, heads, F, D].

    `modulation` [4, H] is the attention's gate and the feed-forward's shift, scale and gate.
    """
    gate, shift, scale, ff_gate = modulation
    rows = rows + gate * layer.attn.to_out[0](attended.transpose(1, 2).flatten(2))
    between = (layer.ff_norm(rows) * (1 + scale) + shift).to(attended.dtype)
    return rows + ff_gate * layer.ff(between)


def attend(windows: Sequence[Heads]) -> Tensor:
    """The blocks of queries, each over its own window of keys, one after another: [G, heads, F, D].

    Windows of one size are attended together.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for index, window in enumerate(windows):
        alike.setdefault((window.query.shape[-2], window.key.shape[-2]), []).append(index)
    attended: dict[int, Tensor] = {}
    for indices in alike.values():
        query, key, value = (torch.cat([windows[index][part] for index in indices]) for part in range(3))
        together = F.scaled_dot_product_attention(query, key, value)
        attended |= zip(indices, together.chunk(len(indices)), strict=True)
    return torch.cat([attended[index] for index in range(len(windows))], -2)


class Border:
    """What one layer at one evaluation carries between pushes. `block` frames see each other."""

    def __init__(self, layer: Any, block: int, carry: Carry) -> None:
        self._block = block
        self._back: int = block * layer.look_backward_block
        self._ahead: int = block * layer.look_ahead_block
        self._waiting = Queue(carry)
        self._window = Queue(carry)
        self._past = carry.cell(0)

    def push(
        self, rows: Tensor, turn: Tensor, heads: Heads, *, last: bool, provisional: int
    ) -> tuple[Tensor, Tensor, list[Heads]]:
        """Frames in; rows, rotary table and windows of those whose window is complete out, all of them if `last`.

        So many `provisional` frames at the end leave no trace here: they will come again, better known.
        """
        self._waiting.put(rows, turn, heads.query)
        key, value = self._window.put(heads.key, heads.value)
        ready = self._waiting.frames if last else max(0, self._waiting.frames - self._ahead)
        rows, turn, query = self._waiting.take(ready)
        windows = list(self._windows(Heads(query, key, value)))
        behind = self._past.value + ready - provisional
        self._past.value = min(behind, self._back)
        self._window.take(behind - self._past.value)
        if provisional:
            self._window.drop_last(provisional)
        return rows, turn, windows

    def _windows(self, heads: Heads) -> Iterator[Heads]:
        """Each block of queries with what it sees; `_past` keys lie before the first query."""
        query, key, value = heads
        for start in range(0, query.shape[-2], self._block):
            own = self._past.value + start
            seen = slice(max(0, own - self._back), own + self._block + self._ahead)
            yield Heads(query[..., start : start + self._block, :], key[..., seen, :], value[..., seen, :])


def _rotate_first_head(heads: Tensor, turn: Tensor) -> Tensor:
    """RoPE on head 0 of [G, heads, F, D], pairs interleaved; the model was trained without it on the other heads."""
    cos, sin = turn.chunk(2, -1)
    even, odd = heads[:, :1, :, 0::2], heads[:, :1, :, 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return torch.cat((turned.to(heads.dtype), heads[:, 1:]), 1)
