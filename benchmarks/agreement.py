"""Two models' outputs, side by side -> how far apart they are, in plain numbers.

Pure arithmetic: distributions by their logits, answers by their tokens, sounds by their samples, and what a small
sample can tell at all. Who made the outputs, and from what, is not known here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

POSITIONS_AT_ONCE = 16
"""Of which logits exist at a time: in float64, 16 x 152,064 of them are 18.6 MiB a copy."""

QUANTILE_95 = 1.959964
"""Of the standard normal distribution, two-sided."""

STFT_SAMPLES, HOP_SAMPLES = 1024, 256
"""43 and 11 ms at 24 kHz."""

FLOOR = 1e-10
"""Power below the loudest bin, 100 dB, under which a bin counts as silent: else two silences would be far apart."""

Head = Callable[[Tensor], Tensor]
"""Final hidden states [n, H] -> logits [n, V]."""


@dataclass(frozen=True)
class Divergence:
    """Of the candidate's next-token distributions from the reference's, position by position: `kl` [n] float64 is the
    Kullback-Leibler divergence sum p log(p / q) in nats, p the reference's (Kullback and Leibler 1951), and `same_top`
    [n] bool says where both find the same token likeliest."""

    kl: Tensor
    same_top: Tensor

    def summary(self) -> dict[str, Any]:
        """For a table: positions, mean and 99th percentile (interpolated) of the divergence, share of equal tops."""
        return {
            "positions": len(self.kl),
            "kl_mean_nats": float(self.kl.mean()),
            "kl_p99_nats": float(np.quantile(self.kl.numpy(), 0.99)),
            "top1_agreement": float(self.same_top.double().mean()),
        }


def divergence(reference: Tensor, candidate: Tensor) -> Divergence:
    """From logits [n, V] of any float dtype, in float64. Where one vocabulary is padded further than the other, over
    the ids that both have."""
    ids = min(reference.shape[-1], candidate.shape[-1])
    p, q = (logits[:, :ids].double().log_softmax(-1) for logits in (reference, candidate))
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)  # rounding makes some equal distributions -1e-17 apart
    return Divergence(kl.cpu(), (p.argmax(-1) == q.argmax(-1)).cpu())


def divergence_of_rows(reference: Tensor, candidate: Tensor, heads: tuple[Head, Head]) -> Divergence:
    """The same from hidden states [n, H] each, through each model's own head, a few positions at a time."""
    rows = zip(reference.split(POSITIONS_AT_ONCE), candidate.split(POSITIONS_AT_ONCE), strict=True)
    return joined([divergence(heads[0](one), heads[1](other)) for one, other in rows])


def joined(parts: Sequence[Divergence]) -> Divergence:
    """All positions of several runs."""
    return Divergence(torch.cat([part.kl for part in parts]), torch.cat([part.same_top for part in parts]))


def agreed_tokens(reference: Sequence[int], candidate: Sequence[int]) -> int:
    """How many tokens two answers begin with alike, up to the first difference or the end of the shorter one."""
    pairs = zip(reference, candidate, strict=False)
    return next(
        (index for index, (one, other) in enumerate(pairs) if one != other), min(len(reference), len(candidate))
    )


def agreement_of_answers(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Any]:
    """Of greedy answers (reference, candidate) to the same prompts: how long they agree, and how many do to the end.

    A length is bounded by the answer's own, so the reference's median length stands beside it.
    """
    lengths = [agreed_tokens(*pair) for pair in pairs]
    return {
        "answers": len(pairs),
        "agreed_tokens_median": statistics.median(lengths),
        "agreed_tokens_min": min(lengths),
        "reference_tokens_median": statistics.median(len(reference) for reference, _ in pairs),
        "identical": sum(list(reference) == list(candidate) for reference, candidate in pairs),
    }


def relative_error(reference: np.ndarray, candidate: np.ndarray) -> float:
    """|candidate - reference| / |reference| over samples [S], Euclidean; silence from silence is 0 apart."""
    reference, candidate = _same_length(reference, candidate)
    difference, size = np.linalg.norm(candidate - reference), np.linalg.norm(reference)
    return float(difference / size) if size else (math.inf if difference else 0.0)


def log_spectral_distance(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Decibels between the short-time power spectra of two sounds [S]: per frame the root mean square over frequencies
    of 10 log10(P / Q), then the mean over frames (Gray and Markel 1976, "Distance measures for speech processing").

    Frames are Hann windows of `STFT_SAMPLES`, `HOP_SAMPLES` apart; power is floored at `FLOOR` of the louder sound's
    largest bin.
    """
    powers = [_power(samples) for samples in _same_length(reference, candidate)]
    floor = FLOOR * max(float(power.max()) for power in powers)
    if not floor:
        return 0.0
    p, q = (10 * power.clamp(min=floor).log10() for power in powers)
    return float((p - q).square().mean(0).sqrt().mean())


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share after Wilson (1927), which stays inside 0..1 and holds for few trials, too."""
    if not trials:
        return 0.0, 1.0
    share, spread = successes / trials, QUANTILE_95**2 / trials
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def _same_length(reference: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, the shorter one followed by silence."""
    samples = max(len(reference), len(candidate))
    padded = (np.pad(sound.astype(np.float64), (0, samples - len(sound))) for sound in (reference, candidate))
    one, other = padded
    return one, other


def _power(samples: np.ndarray) -> Tensor:
    """Samples [S] -> power [frequencies, frames] float64."""
    sound = torch.from_numpy(np.pad(samples, (0, max(0, STFT_SAMPLES - len(samples)))))
    window = torch.hann_window(STFT_SAMPLES, dtype=torch.float64)
    spectrum = torch.stft(sound, STFT_SAMPLES, HOP_SAMPLES, window=window, center=False, return_complex=True)
    return spectrum.abs().square()
