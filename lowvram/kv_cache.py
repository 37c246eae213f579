"""A preallocated key/value cache that knows its bytes per token and hands out views of what it holds.

It has the one method that the modelling library's attention calls (`update`), allocates once, and never copies what is
already in it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `n_layers` layers for up to `max_tokens` positions, each [1, Hkv, max_tokens, D]."""

    def __init__(
        self,
        n_layers: int,
        kv_heads: int,
        head_dim: int,
        max_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_tokens = max_tokens
        self.bytes_per_token = 2 * n_layers * kv_heads * head_dim * dtype.itemsize
        self._store = torch.empty(n_layers, 2, 1, kv_heads, max_tokens, head_dim, dtype=dtype, device=device)
        self._filled = [0] * n_layers

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Append one layer's keys and values [1, Hkv, n, D]; return views of all that layer holds."""
        start = self._filled[layer_idx]
        stop = start + key.shape[2]
        assert stop <= self.max_tokens, f"{stop} positions in a cache of {self.max_tokens}"
        keys, values = self._store[layer_idx]
        keys[:, :, start:stop] = key
        values[:, :, start:stop] = value
        self._filled[layer_idx] = stop
        return keys[:, :, :stop], values[:, :, :stop]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held by a layer (the modelling library's name for it)."""
        return self._filled[layer_idx]

    @property
    def n_bytes(self) -> int:
        """Device bytes allocated, filled or not."""
        return self._store.nbytes
