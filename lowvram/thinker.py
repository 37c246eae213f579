"""Prompt rows to text tokens: chunked prefill, then one decode step after another.

Nothing here grows with the prompt but the KV cache: logits exist for the last position only, and of the hidden states
only what the talker reads is kept, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .flow import PromptEmbeds, ThinkerStep, Weights
from .kv_cache import KVCache
from .model import Decoder
from .sampling import Sampler
from .weights import HostRows


@dataclass(frozen=True)
class Thinker:
    """The thinker's decoder: shape, layers, the final norm and the output head."""

    decoder: Decoder
    layers: Weights
    rest: AbstractContextManager[nn.Module]
    lm_head: AbstractContextManager[nn.Module]
    embed_tokens: HostRows


@dataclass(frozen=True)
class Prefilled:
    """The prompt, read: `last` [1, H] is the final hidden state of its last position, on the device."""

    last: Tensor
    next_position: int


@torch.inference_mode()
def prefill(
    thinker: Thinker,
    prompt: PromptEmbeds,
    cache: KVCache,
    *,
    chunk_tokens: int,
    talker_rows: Tensor | None,
    device: torch.device,
) -> Iterator[int | Prefilled]:
    """Read the prompt in chunks, yielding the tokens done after each and, last, a `Prefilled`.

    `talker_rows` [T, H] on the host, if given, receives the talker's view of each prompt row: its embedding (zero for
    media, as the reference has it) plus the final hidden state.
    """
    hidden = torch.empty(0, device="cpu")
    total = len(prompt.embeds)
    for start in range(0, total, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, total))
        embeds = prompt.embeds[rows].to(device).unsqueeze(0)
        hidden = _forward(thinker, embeds, prompt.position_ids[:, rows], cache)[0]
        if talker_rows is not None:
            text = prompt.embeds[rows].masked_fill(prompt.is_media[rows].unsqueeze(1), 0)
            talker_rows[rows] = text + hidden.to(talker_rows.device)
        yield rows.stop
    yield Prefilled(hidden[-1:].clone(), prompt.next_position)  # a view would hold the whole chunk


@torch.inference_mode()
def decode(
    thinker: Thinker,
    prefilled: Prefilled,
    cache: KVCache,
    sampler: Sampler,
    *,
    stop_ids: frozenset[int],
    max_tokens: int,
) -> Iterator[ThinkerStep]:
    """Write the answer, one token a step, up to and including a stop token or the `max_tokens`-th.

    A step is yielded once its reply row is known, so the talker can follow at once; the last step has none.
    """
    hidden = prefilled.last
    for index in range(max_tokens):
        with thinker.lm_head as head:
            token_id = sampler(head(hidden)[0])
        if token_id in stop_ids or index == max_tokens - 1:
            yield ThinkerStep(token_id, None)
            return
        embed = thinker.embed_tokens(torch.tensor([token_id], device="cpu"))
        position = torch.full((3, 1), prefilled.next_position + index, device="cpu")
        hidden = _forward(thinker, embed.to(hidden.device).unsqueeze(0), position, cache)[0]
        yield ThinkerStep(token_id, embed[0] + hidden[0].to(embed.device))


def _forward(thinker: Thinker, hidden: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
    """Final hidden states [1, n, H] of rows [1, n, H] at positions [3, n], which join the cache."""
    rotary = thinker.decoder.rotary(hidden, position_ids.to(hidden.device).unsqueeze(1))
    for block in thinker.layers:
        with block as layer:
            hidden = layer(hidden, position_embeddings=rotary, past_key_values=cache)
    with thinker.rest as rest:
        return rest.get_submodule("norm")(hidden)
