"""Prompt rows to text tokens: chunked prefill, then one decode step after another.

Nothing here grows with the prompt but the KV cache: logits exist for the last position only, and of the hidden states
only what the talker reads is kept, on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .flow import Attempt, PromptEmbeds, ThinkerStep, Weights, at_once
from .graphs import Step, Stepping, one_by_one
from .kv_cache import KVCache, Stretch
from .model import Decoder
from .sampling import Choice
from .weights import HostRows


@dataclass(frozen=True)
class Thinker:
    """The thinker's decoder: shape, layers, the final norm and the output head."""

    decoder: Decoder
    layers: Weights
    rest: AbstractContextManager[nn.Module]
    lm_head: AbstractContextManager[nn.Module]
    embed_tokens: HostRows
    attempt: Attempt = at_once
    stepping: Stepping = one_by_one


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
    chunk_tokens: Callable[[], int],
    talker_rows: Tensor | None,
    device: torch.device,
) -> Iterator[int | Prefilled]:
    """Read the prompt in chunks, each as large as is allowed then, yielding the tokens done and, last, a `Prefilled`.

    It begins after the positions that `cache` holds already, which are not all of the prompt's. `talker_rows` [T, H] on
    the host, if given, receives the talker's view of each row read: its embedding (zero for media, as the reference has
    it) plus the final hidden state.
    """
    total, done = len(prompt.embeds), cache.get_seq_length()

    def read_chunk() -> tuple[Tensor, Tensor | None]:
        """The last row's final hidden state [1, H] and, if the talker needs them, all rows' [n, H] on the host."""
        rows = slice(done, min(done + chunk_tokens(), total))
        hidden = _forward(thinker, device, prompt.embeds[rows], prompt.position_ids[:, rows], cache)
        # A view of the last row would hold the whole chunk.
        return hidden[-1:].clone(), None if talker_rows is None else hidden.to(talker_rows.device)

    while done < total:
        last, hidden = thinker.attempt(read_chunk, partial(cache.rewind, done))
        rows = slice(done, cache.get_seq_length())
        if talker_rows is not None and hidden is not None:
            text = prompt.embeds[rows].masked_fill(prompt.is_media[rows].unsqueeze(1), 0)
            talker_rows[rows] = text + hidden
        done = rows.stop
        yield done
    yield Prefilled(last, prompt.next_position)


@torch.inference_mode()
def decode(
    thinker: Thinker,
    prefilled: Prefilled,
    cache: KVCache,
    choose: Choice,
    *,
    stop_ids: frozenset[int],
    max_tokens: int,
) -> Iterator[ThinkerStep]:
    """Write the answer, one token a step, up to and including a stop token or the `max_tokens`-th.

    A step is yielded once its reply row is known, so the talker can follow at once; the last step has none.
    """
    hidden = prefilled.last
    step = thinker.stepping(partial(_forward, thinker, hidden.device), cache, hidden.device)
    for index in range(max_tokens):
        token_id = thinker.attempt(partial(_draw, thinker, hidden, choose))
        if token_id in stop_ids or index == max_tokens - 1:
            yield ThinkerStep(token_id, None)
            return
        embed = thinker.embed_tokens(torch.tensor([token_id], device="cpu"))
        read = partial(_read_token, step, embed, prefilled.next_position + index)
        hidden, on_host = thinker.attempt(read, partial(cache.rewind, cache.get_seq_length()))
        yield ThinkerStep(token_id, embed[0] + on_host[0])


def _draw(thinker: Thinker, hidden: Tensor, choose: Choice) -> int:
    with thinker.lm_head as head:
        return choose(head(hidden)[0])


def _read_token(step: Step[Tensor], embed: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """The final hidden state [1, H] of one more row [1, H], on the device and on the host."""
    hidden = step(embed, position)
    return hidden, hidden.to(embed.device)


def _forward(
    thinker: Thinker, device: torch.device, rows: Tensor, position_ids: Tensor, kv: KVCache | Stretch
) -> Tensor:
    """Final hidden states [n, H] of rows [n, H] at positions [3, n], which join the cache."""
    hidden = rows.to(device, non_blocking=True).unsqueeze(0)
    rotary = thinker.decoder.rotary(hidden, position_ids.to(device, non_blocking=True).unsqueeze(1))
    for block in thinker.layers:
        with block as layer:
            hidden = layer(hidden, position_embeddings=rotary, past_key_values=kv)
    with thinker.rest as rest:
        final: Tensor = rest.get_submodule("norm")(hidden)[0]
    return final
