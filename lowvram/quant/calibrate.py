"""What flows into linears -> scales and clips under which few bits lose least: activation-aware weight quantization.

After Lin et al. 2023, "AWQ" (arXiv 2306.00978), written from its formulas with the settings of AutoAWQ 0.2.9, whose
checkpoints are the published ones. A linear's input channels are scaled up where activations are large, which makes
their weights' rounding errors small, and whatever makes its input is scaled down by as much. Then the range of each
group of weights is narrowed as far as that pays.

N outputs, K inputs, G inputs per group; weights [N, K] and all arithmetic in float32, sums in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .storage import Storage

GRID_POINTS = 20
"""Ratios 0, 0.05, ... 0.95 between scaling by the weights alone and by the activations alone."""

CLIP_STEPS = 20
NARROWEST = 0.5
"""Ranges 1, 0.95, ... 0.55 of a group's own are tried."""

CLIP_SLICE_WEIGHTS = 2**22
"""Weights whose clips are searched at once: 16 MiB for each of the half dozen tensors involved."""


class InputStatistics:
    """What is known of a linear's input [.., K] after any number of chunks: all that the searches need of it.

    The error of narrowed weights over all tokens is a quadratic form in their change, so the second moments of each
    group stand for the tokens themselves. AutoAWQ sums over a sample of 512 to 1023 tokens instead; with no more
    tokens than that, both are the same.
    """

    def __init__(self, in_features: int, group_size: int, device: torch.device) -> None:
        self._tokens = 0
        self._group_size = group_size
        self._magnitudes = torch.zeros(in_features, dtype=torch.float64, device=device)
        groups = in_features // group_size
        self._products = torch.zeros(groups, group_size, group_size, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Note more rows [.., K]."""
        rows = x.flatten(0, -2).float()
        self._tokens += len(rows)
        self._magnitudes += rows.abs().sum(0, dtype=torch.float64)
        grouped = rows.unflatten(1, (-1, self._group_size)).transpose(0, 1)
        self._products += grouped.transpose(1, 2) @ grouped

    @property
    def magnitudes(self) -> Tensor:
        """Mean of |x| by channel, [K] float32."""
        return (self._magnitudes / self._tokens).float()

    def moments(self, scales: Tensor | None = None) -> Tensor:
        """Mean of x x^T by group, [K/G, G, G] float32, of inputs divided by `scales` [K]."""
        moments = self._products / self._tokens
        if scales is not None:
            by_group = scales.double().view(-1, self._group_size)
            moments /= by_group.unsqueeze(1) * by_group.unsqueeze(2)
        return moments.float()


def weight_magnitudes(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Mean of |w| by input channel [K] over all outputs of `weights`, each group relative to its own largest."""
    sums = torch.zeros(weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    for weight in weights:
        groups = weight.abs().unflatten(1, (-1, group_size))
        relative = groups / (groups.amax(-1, keepdim=True) + 1e-6)
        sums += relative.flatten(1).sum(0, dtype=torch.float64)
    return (sums / sum(len(weight) for weight in weights)).float()


def candidate_scales(input_magnitudes: Tensor, magnitudes: Tensor) -> Tensor:
    """Scales [20, K] to choose from: x^r / w^(1-r) for each ratio r of the grid, their extremes balanced around 1."""
    candidates = []
    for ratio in (point / GRID_POINTS for point in range(GRID_POINTS)):
        scales = input_magnitudes.pow(ratio) / (magnitudes.pow(1 - ratio) + 1e-4)
        scales = scales.clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        candidates.append(torch.where(scales.isfinite(), scales, 1.0))
    return torch.stack(candidates)


def rounded_under(weight: Tensor, scales: Tensor, storage: Storage) -> Tensor:
    """What a linear computes with once `weight` is stored times `scales` [K] and its input divided by them."""
    return storage.nearest(weight * scales).div_(scales)


def search_clip(weight: Tensor, moments: Tensor, storage: Storage) -> Tensor:
    """The largest magnitudes [N, K/G] to leave to each group of `weight`: those that change its share of the output
    least, in the mean over inputs of such `moments` [K/G, G, G], once the weight is rounded."""
    rows = max(1, CLIP_SLICE_WEIGHTS // weight.shape[1])
    return torch.cat([_search_rows(part, moments, storage) for part in weight.split(rows)])


def clipped(weight: Tensor, largest: Tensor, group_size: int) -> Tensor:
    """`weight` with no group beyond its `largest` [N, K/G] magnitude."""
    bounds = largest.unsqueeze(-1)
    return weight.unflatten(1, (-1, group_size)).clamp(-bounds, bounds).flatten(1)


def _search_rows(weight: Tensor, moments: Tensor, storage: Storage) -> Tensor:
    group_size = storage.group_size
    own = weight.unflatten(1, (-1, group_size)).abs().amax(-1)
    best, least = own, torch.full_like(own, torch.inf)
    for step in range(round(NARROWEST * CLIP_STEPS)):
        largest = own * (1 - step / CLIP_STEPS)
        change = storage.nearest(clipped(weight, largest, group_size)).sub_(weight)
        error = _mean_square_outputs(change, moments, group_size)
        best, least = torch.where(error < least, largest, best), torch.minimum(error, least)
    return best


def _mean_square_outputs(weight: Tensor, moments: Tensor, group_size: int) -> Tensor:
    """Mean square [N, K/G] of what each group adds to its output: w^T E[x x^T] w."""
    groups = weight.unflatten(1, (-1, group_size)).transpose(0, 1)
    return (groups @ moments).mul_(groups).sum(-1).t()
