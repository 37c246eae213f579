"""AWQ's format written out bit by bit in numpy, sharing nothing with the package: the oracle of its tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's documented order: nibble i of a word, from the lowest bits up, holds this one of its eight columns."""


def random_stored(in_features: int, out_features: int, group_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(qweight, qzeros, scales) with every bit pattern possible."""
    rng = np.random.default_rng(seed)
    words = (in_features + in_features // group_size, out_features // 8)
    bits = torch.from_numpy(rng.integers(-(2**31), 2**31, size=words).astype(np.int32))
    scales = torch.from_numpy(rng.uniform(0.001, 0.02, (in_features // group_size, out_features)))
    return bits[:in_features].contiguous(), bits[in_features:].contiguous(), scales.half()


def unpacked(words: Tensor) -> np.ndarray:
    """int32 [R, W] -> values 0..15 [R, 8 W], one nibble at a time."""
    unsigned = words.numpy().view(np.uint32)
    values = np.zeros((unsigned.shape[0], unsigned.shape[1] * 8), dtype=np.int64)
    for nibble, column in enumerate(COLUMN_OF_NIBBLE):
        values[:, column::8] = (unsigned >> np.uint32(4 * nibble)) & np.uint32(15)
    return values


def weight_by_hand(stored: tuple[Tensor, Tensor, Tensor], group_size: int) -> Tensor:
    """The weight [N, K] in float64, exact."""
    qweight, qzeros, scales = stored
    q, z, s = unpacked(qweight), unpacked(qzeros), scales.double().numpy()
    group = np.arange(len(q)) // group_size
    return torch.from_numpy(((q - z[group]) * s[group]).T.copy())
