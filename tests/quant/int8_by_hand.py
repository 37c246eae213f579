"""8-bit linears to test with: stored tensors with random bytes, and the weight that they mean, a byte at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def random_stored(in_features: int, out_features: int, group_size: int) -> tuple[Tensor, Tensor]:
    """`weight_packed` and `weight_scale` with every byte possible."""
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (out_features, in_features // 4)).astype(np.int32)
    scales = rng.uniform(0.001, 0.02, (out_features, in_features // group_size)).astype(np.float16)
    return torch.from_numpy(words), torch.from_numpy(scales)


def weight_by_hand(packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """[N, K] in float64, exact: one byte of a word at a time, the lowest first."""
    words = packed.numpy().view(np.uint32)
    q = np.stack([words >> np.uint32(8 * i) & np.uint32(255) for i in range(4)], axis=-1).reshape(len(words), -1)
    group = np.arange(q.shape[1]) // group_size
    return torch.from_numpy((q.astype(np.float64) - 128) * scales.double().numpy()[:, group])
