"""The thinker's rows to codec tokens: 50 a second of speech, one per decode step.

Codec step i reads reply row i + 1 and nothing later, so the talker may follow the thinker token by token and says the
same as if it had waited. When the reply ends, an end row and then a pad row, repeated, carry it to its own end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat

import torch
from torch import Tensor, nn

from .flow import Attempt, PromptEmbeds, ThinkerStep, Weights, at_once
from .graphs import Step, Stepping, one_by_one
from .kv_cache import KVCache, Stretch
from .model import CodecIds, Speech
from .sampling import Sampler


@dataclass(frozen=True)
class Talker:
    """The talker: its tables and ids, its layers, and the rest (input projection, final norm, head)."""

    speech: Speech
    layers: Weights
    rest: AbstractContextManager[nn.Module]
    attempt: Attempt = at_once
    stepping: Stepping = one_by_one


@dataclass(frozen=True)
class TextRows:
    """Rows [H] of the thinker's table that frame a reply: the voice's beginning, the end, and the pad."""

    begin: Tensor
    end: Tensor
    pad: Tensor


@torch.inference_mode()
def talk(
    talker: Talker,
    prompt: PromptEmbeds,
    prompt_rows: Tensor,
    steps: Iterable[ThinkerStep],
    text_rows: TextRows,
    cache: KVCache,
    sampler: Sampler,
    *,
    chunk_tokens: Callable[[], int],
    max_codes: int,
    device: torch.device,
) -> Iterator[int]:
    """Speak the reply as codec ids, one per step, up to and not including the one that ends the speech.

    `prompt_rows` [T, H] are the talker's view of the prompt. A reply without words has no speech.
    """
    reply = (step.reply_row for step in steps if step.reply_row is not None)
    first = next(reply, None)
    if first is None or max_codes < 1:
        return
    hidden = _read_prompt(talker, prompt, prompt_rows, text_rows.begin, first, cache, chunk_tokens, device)
    code = talker.attempt(partial(_draw, talker, hidden, sampler))
    step = talker.stepping(partial(_read_and_choose, talker, sampler, device), cache, device)
    rows = chain(reply, (text_rows.end,), repeat(text_rows.pad))
    for index in range(max_codes):
        if code in (talker.speech.codec_ids.pad, talker.speech.codec_ids.end):
            return
        yield code
        if index == max_codes - 1:
            return
        row = talker.speech.codec_embed(torch.tensor([code], device="cpu")) + next(rows)
        read = partial(_next_code, step, row, prompt.next_position + 2 + index, sampler)
        code = talker.attempt(read, partial(cache.rewind, cache.get_seq_length()))


def seen_by_penalty(ids: CodecIds) -> Tensor:
    """Ids that the reference's repetition penalty counts from the start: its prompt is mask, then pad and start."""
    return torch.tensor([ids.mask, ids.pad, ids.start], device="cpu")


def _read_prompt(
    talker: Talker,
    prompt: PromptEmbeds,
    prompt_rows: Tensor,
    begin: Tensor,
    first: Tensor,
    cache: KVCache,
    chunk_tokens: Callable[[], int],
    device: torch.device,
) -> Tensor:
    """Read prompt, beginning and first reply row; return the hidden state that draws the first code."""
    ids = talker.speech.codec_ids
    pad, start = talker.speech.codec_embed(torch.tensor([ids.pad, ids.start], device="cpu"))
    frame = torch.stack([begin + pad, first + start])

    def read_chunk() -> None:
        rows = slice(done, min(done + chunk_tokens(), len(prompt_rows)))
        _forward(talker, device, prompt_rows[rows], prompt.position_ids[:, rows], cache)

    while (done := cache.get_seq_length()) < len(prompt_rows):
        talker.attempt(read_chunk, partial(cache.rewind, done))
    positions = torch.arange(2, device="cpu").expand(3, 2) + prompt.next_position
    return _read(talker, frame, positions, cache, device)


def _read(talker: Talker, rows: Tensor, position_ids: Tensor, cache: KVCache, device: torch.device) -> Tensor:
    """Hidden state [1, D] of the last of `rows` [n, H], which join the cache at positions [3, n]."""
    step = partial(_forward, talker, device, rows, position_ids, cache)
    return talker.attempt(step, partial(cache.rewind, cache.get_seq_length()))


def _next_code(step: Step[Tensor], row: Tensor, position: int, sampler: Sampler) -> int:
    """Read one more row [1, H] and draw the code after it."""
    sampler.prepare()
    return sampler.settle(step(row, position))


def _read_and_choose(
    talker: Talker, sampler: Sampler, device: torch.device, row: Tensor, position_ids: Tensor, kv: KVCache | Stretch
) -> Tensor:
    """What of a step can be captured: the code [1] after a row [1, H] at positions [3, 1]."""
    return sampler.choose(_logits(talker, _forward(talker, device, row, position_ids, kv)))


def _forward(talker: Talker, device: torch.device, rows: Tensor, position_ids: Tensor, kv: KVCache | Stretch) -> Tensor:
    """Hidden state [1, D] of the last of rows [n, H] at positions [3, n], all of which join the cache."""
    with talker.rest as rest:
        hidden = rest.get_submodule("thinker_to_talker_proj")(rows.to(device, non_blocking=True)).unsqueeze(0)
    rotary = talker.speech.decoder.rotary(hidden, position_ids.to(device, non_blocking=True).unsqueeze(1))
    for block in talker.layers:
        with block as layer:
            hidden = layer(hidden, position_embeddings=rotary, past_key_values=kv)
    return hidden[0, -1:].clone()  # a view would hold the whole chunk


def _draw(talker: Talker, hidden: Tensor, sampler: Sampler) -> int:
    return sampler(_logits(talker, hidden))


def _logits(talker: Talker, hidden: Tensor) -> Tensor:
    """Logits [V] after a hidden state [1, D]."""
    with talker.rest as rest:
        logits: Tensor = rest.get_submodule("codec_head")(rest.get_submodule("model.norm")(hidden))
    return logits[0]
