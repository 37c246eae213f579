"""Final hidden states of several models on the same tokens -> how far their next words agree.

The output head is read a slice of its rows at a time, so that neither it nor the logits of a whole vocabulary need be
in memory: sums over the vocabulary are carried along, as a streamed softmax does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import Agreement

SLICE_LOGITS = 2**23
"""Logits at once, of all models and tokens together: 64 MiB in float64."""


@dataclass(frozen=True)
class ByToken:
    """Of every model but the first with the first, on the host: `kl` [M - 1, n] float64 in nats, and `same_top`
    [M - 1, n] bool, whether both find the same next token likeliest."""

    kl: Tensor
    same_top: Tensor


class HeadComparison:
    """Compares models by their final hidden states [M, n, H] float32 (after the norm), the first being the standard.

    `add` all rows of the output head, in order; then ask how they agree `by_token`.
    """

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden
        models_and_tokens = hidden.shape[:2]
        self._lse = torch.full(models_and_tokens, -torch.inf, dtype=torch.float64, device=hidden.device)
        self._difference = torch.zeros_like(self._lse)
        self._largest = torch.full_like(self._lse, -torch.inf)
        self._likeliest = torch.zeros(models_and_tokens, dtype=torch.int64, device=hidden.device)
        self._seen = 0

    @property
    def slice_rows(self) -> int:
        """How many rows to add at a time."""
        return max(1, SLICE_LOGITS // self._lse.numel())

    def add(self, rows: Tensor, others: Tensor | None = None) -> None:
        """The head's next rows [v, H] float32; every model but the first has `others` instead, if they are given."""
        logits = self._logits(rows, rows if others is None else others)
        before = self._lse[0]
        self._lse = torch.logaddexp(self._lse, logits.logsumexp(-1))
        probability = (logits[0] - self._lse[0].unsqueeze(-1)).exp_()
        # The mean of differences in logits under the first model's probabilities, as far as those are known.
        self._difference *= (before - self._lse[0]).exp()
        self._difference += (probability * (logits[0] - logits)).sum(-1)
        largest, index = logits.max(-1)
        self._likeliest = torch.where(largest > self._largest, index + self._seen, self._likeliest)
        self._largest = torch.maximum(largest, self._largest)
        self._seen += len(rows)

    def _logits(self, rows: Tensor, others: Tensor) -> Tensor:
        """[M, n, v] float64."""
        if others is rows:
            return (self._hidden @ rows.t()).double()
        return torch.cat((self._hidden[:1] @ rows.t(), self._hidden[1:] @ others.t())).double()

    def by_token(self) -> ByToken:
        """What there is to say once the whole head has been added."""
        kl = (self._difference - self._lse[0] + self._lse).clamp(min=0)
        return ByToken(kl[1:].cpu(), (self._likeliest == self._likeliest[0])[1:].cpu())


def agreements(parts: Sequence[ByToken]) -> list[Agreement]:
    """Of every model but the first with the first, over the tokens of all `parts`."""
    kl = torch.cat([part.kl for part in parts], dim=1).mean(1).tolist()
    top1 = torch.cat([part.same_top for part in parts], dim=1).double().mean(1).tolist()
    return [Agreement(*pair) for pair in zip(kl, top1, strict=True)]
