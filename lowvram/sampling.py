"""Logits to a token id: penalty, suppression, temperature, top-k, top-p, draw. The one seam where a value leaves the
device.

A draw has three parts: random numbers are made ready, an id is chosen, and the host reads it, which is the only time it
waits. The second may be part of a captured step.

The order and the meaning of each filter are those of the modelling library's `generate` (transformers 5.23,
`generation/logits_process.py`), so that greedy and filtered distributions are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .errors import CheckpointError
from .options import SamplingParams

COLDEST = torch.finfo(torch.float32).tiny
"""Below it a temperature would be 0 in float32, above its inverse infinite; the draw is the same already at these."""

NOT_AN_ID = -1
"""What a device chooses from logits that are not finite: the host is told with the id, and waits for nothing more."""

SUSPECTS: Mapping[str, str] = {
    "thinker": "thinker.model or thinker.lm_head, or where there are media thinker.audio_tower or thinker.visual",
    "talker": "talker or, since it says what that wrote, thinker",
}
"""Beginnings of the names of tensors that may have made a stage's logits what they are."""

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
    same device whatever else the process does. `stage` is whose logits they are, for the error of those that are not
    finite.
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
        stage: str = "thinker",
    ) -> None:
        self._params = params
        self._stage = stage
        self._generator = torch.Generator(device).manual_seed(seed)
        self._suppressed = torch.tensor(list(suppressed), dtype=torch.long, device=device)
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        if seen is not None:
            self._seen[seen.to(device)] = True
        self._noise: Tensor | None = None
        """[V] float32, of the exponential distribution: made with the first draw, renewed in place for each."""
        self._noise_is_fresh = False

    def __call__(self, logits: Tensor) -> int:
        """Draw the next id from logits [V] of any float dtype. A draw that fails is as if it had not been tried.

        Raises CheckpointError for logits that are not finite.
        """
        self.prepare()
        return self.settle(self.choose(logits))

    def prepare(self) -> None:
        """Have the random numbers of the next draw ready; those of one that failed are not spent."""
        if self._params.greedy or self._noise_is_fresh:
            return
        if self._noise is None:
            self._noise = torch.empty_like(self._seen, dtype=torch.float32)
        fresh = torch.empty(len(self._seen), dtype=torch.float32, device=self._generator.device)
        self._noise.copy_(fresh.exponential_(generator=self._generator))
        self._noise_is_fresh = True

    def choose(self, logits: Tensor) -> Tensor:
        """The next id, [1] int64 where the logits [V] are: nothing is waited for and nothing remembered."""
        best, token = self._ranked(logits).max(0, keepdim=True)
        # A NaN among logits is their maximum, whatever the others are; and NaN or infinity times 0 is not 0.
        return token.masked_fill_(best.mul(0) != 0, NOT_AN_ID)

    def settle(self, token: Tensor) -> int:
        """Read what was chosen, and remember it. Raises CheckpointError where it was chosen from what is not finite."""
        token_id = int(token)
        if token_id == NOT_AN_ID:
            raise _not_finite(self._stage)
        self._seen.index_fill_(0, token, True)
        self._noise_is_fresh = False
        return token_id

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities [V] float32 from which a draw is made. A greedy choice is no draw: it takes the best score."""
        return self._warped(self._filtered(logits.float())).softmax(-1)

    def _ranked(self, logits: Tensor) -> Tensor:
        """Scores [V] float32, the highest of which is what is drawn."""
        if self._params.greedy:
            return self._filtered(logits.float())
        assert self._noise is not None, "a draw is prepared first"
        # As torch.multinomial does with the same numbers, but for its checks, which launch more than the draw does.
        return self.distribution(logits) / self._noise

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
            tail[-1].fill_(False)  # the likeliest id always stays
            scores = scores.masked_fill(tail.scatter(0, order, tail), -torch.inf)
        return scores


def _not_finite(stage: str) -> CheckpointError:
    return CheckpointError(
        f"the {stage} cannot choose a token: the highest of its logits is NaN or infinite",
        tensor=f"{stage}.",
        hint=f"1 or more weights of {SUSPECTS[stage]} are damaged: download the model again;"
        " or its numbers are beyond float16: try --dtype bfloat16 or float32",
    )
