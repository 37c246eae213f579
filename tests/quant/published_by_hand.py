"""GPTQ's and compressed-tensors' 4-bit formats written out bit by bit in numpy, sharing nothing with the package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Numbers:
    """A linear as numbers: q [N, K], z [N, G] and s [N, G] with w = (q - z) * s in groups of `group_size` inputs."""

    q: np.ndarray
    z: np.ndarray
    s: np.ndarray
    group_size: int

    @property
    def weight(self) -> Tensor:
        """[N, K] in float64, exact."""
        group = np.arange(self.q.shape[1]) // self.group_size
        return torch.from_numpy((self.q - self.z[:, group]) * self.s[:, group].astype(np.float64))


def random_numbers(
    in_features: int, out_features: int, group_size: int, *, zeros: range = range(16), seed: int = 0
) -> Numbers:
    """Every number possible, zero points among `zeros`."""
    rng = np.random.default_rng(seed)
    groups = (out_features, in_features // group_size)
    return Numbers(
        q=rng.integers(0, 16, (out_features, in_features)),
        z=rng.integers(zeros.start, zeros.stop, groups),
        s=rng.uniform(0.001, 0.02, groups).astype(np.float16),
        group_size=group_size,
    )


def in_words(values: np.ndarray, axis: int) -> Tensor:
    """Values 0..15, eight along `axis` to an int32 word, the first in the lowest four bits."""
    rows = np.moveaxis(values, axis, 0)
    words = np.zeros((len(rows) // 8, *rows.shape[1:]), dtype=np.uint32)
    for i, row in enumerate(rows):
        words[i // 8] |= row.astype(np.uint32) << np.uint32(4 * (i % 8))
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, 0, axis)).view(np.int32))


def as_gptq(numbers: Numbers, *, version: int = 1) -> dict[str, Tensor]:
    """qweight [K/8, N], qzeros [G, N/8], scales [G, N], g_idx [K]; version 1 stores every zero point less one."""
    return {
        "qweight": in_words(numbers.q.T, axis=0),
        "qzeros": in_words(numbers.z.T - (version == 1), axis=1),
        "scales": torch.from_numpy(np.ascontiguousarray(numbers.s.T)),
        "g_idx": torch.arange(numbers.q.shape[1], dtype=torch.int32) // numbers.group_size,
    }


def as_compressed(numbers: Numbers, *, symmetric: bool) -> dict[str, Tensor]:
    """weight_packed [N, K/8], weight_scale [N, G], weight_shape [2] and, if asymmetric, weight_zero_point [N/8, G]."""
    stored = {
        "weight_packed": in_words(numbers.q, axis=1),
        "weight_scale": torch.from_numpy(numbers.s.copy()),
        "weight_shape": torch.tensor(numbers.q.shape),
    }
    return stored if symmetric else stored | {"weight_zero_point": in_words(numbers.z, axis=0)}
