"""Logits to a token id: penalty, suppression, temperature, top-k, top-p, draw. The one seam where a value leaves the
device.

The order and the meaning of each filter are those of the modelling library's `generate` (transformers 5.23,
`generation/logits_process.py`), so that greedy and filtered distributions are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .options import SamplingParams

COLDEST = torch.finfo(torch.float32).tiny
"""Below it a temperature would be 0 in float32, above its inverse infinite; the draw is the same already at these."""


Choice = Callable[[Tensor], int]
"""What turns logits [V] into the next id: a `Sampler`, or a `Recitation`."""


class Recitation:
    """Stands where a sampler does, for a reply that is known beforehand: gives its ids in order, whatever is likely."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids = iter(ids)

    def __call__(self, logits: Tensor) -> int:
        return next(self._ids)


class Sampler:
    """Draws one token id at a time and remembers which ids the repetition penalty has seen.

    `suppressed` ids are never drawn. The random stream belongs to this object: a seed gives the same draws on the
    same device whatever else the process does.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        device: torch.device,
        seed: int,
        suppressed: Iterable[int] = (),
        seen: Tensor | None = None,
    ) -> None:
        self._params = params
        self._generator = torch.Generator(device).manual_seed(seed)
        self._suppressed = torch.tensor(list(suppressed), dtype=torch.long, device=device)
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        if seen is not None:
            self._seen[seen.to(device)] = True

    def __call__(self, logits: Tensor) -> int:
        """Draw the next id from logits [V] of any float dtype. A draw that fails is as if it had not been tried."""
        before = self._generator.get_state()
        try:
            scores = self._filtered(logits.float())
            token = scores.argmax() if self._params.greedy else self._draw(scores)
            token_id = int(token)
            self._seen[token] = True
        except RuntimeError:
            self._generator.set_state(before)
            raise
        return token_id

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities [V] float32 from which `__call__` draws (one-hot when greedy)."""
        scores = self._filtered(logits.float())
        if self._params.greedy:
            return torch.zeros_like(scores).index_fill_(0, scores.argmax(), 1.0)
        return self._warped(scores).softmax(-1)

    def _filtered(self, scores: Tensor) -> Tensor:
        penalty = self._params.repetition_penalty
        if penalty != 1.0:
            penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(self._seen, penalized, scores)
        if len(self._suppressed):
            scores = scores.index_fill(0, self._suppressed, -torch.inf)
        return scores

    def _warped(self, scores: Tensor) -> Tensor:
        params = self._params
        # From the maximum down, so that no temperature makes an infinite score of a likely id.
        scores = (scores - scores.max()) / min(max(params.temperature, COLDEST), 1 / COLDEST)
        if 0 < params.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -torch.inf)
        if params.top_p < 1.0:
            ascending, order = scores.sort()
            tail = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p
            tail[-1] = False  # the likeliest id always stays
            scores = scores.masked_fill(tail.scatter(0, order, tail), -torch.inf)
        return scores

    def _draw(self, scores: Tensor) -> Tensor:
        return torch.multinomial(self._warped(scores).softmax(-1), 1, generator=self._generator)[0]
