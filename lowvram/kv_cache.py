"""Preallocated key/value caches that know their bytes per token and hand out views of what they hold.

They have the one method that the modelling library's attention calls (`update`), allocate once, and never copy what is
already in them. Between two steps a cache can forget its newest positions, and follow the turn to another device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_CODE = 127


@dataclass(frozen=True)
class Int8Heads:
    """Keys or values [B, Hkv, total, D] as int8 `codes` with a float32 scale per position and head, [B, Hkv, total, 1].

    Stands where the modelling library passes a tensor through to `attend`, which reads it back in `dtype` piecewise.
    Keys are stored turned by the orthonormal `turn` [D, D]: queries turned alike give the same scores.
    """

    codes: Tensor
    scales: Tensor
    turn: Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def read(self, start: int, stop: int) -> Tensor:
        """The positions from `start` to before `stop` in `dtype`, [B, Hkv, stop - start, D], turned as they are."""
        return (self.codes[:, :, start:stop] * self.scales[:, :, start:stop]).to(self.dtype)


@dataclass(frozen=True)
class TailedHeads:
    """Keys or values as a `Stretch` hands them to `attend`: a `past` [B, Hkv, P, D] that all counts, and a `tail`
    [B, Hkv, n, D] of which `bias` [1, 1, 1, n], 0 or minus infinity, says what counts."""

    past: Tensor
    tail: Tensor
    bias: Tensor


Heads = Tensor | Int8Heads | TailedHeads
"""What a cache hands to attention for a layer's keys, and for its values."""

KEYS, VALUES = 0, 1

BIAS_COLUMNS = 16
"""Kernels read a bias this many elements at a time: its rows are made for a multiple of them."""


class KVCache:
    """Keys and values of `n_layers` layers for `max_tokens` positions: each [1, Hkv, max_tokens, D], in `dtype`."""

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
        self._dtype = dtype
        self._filled = [0] * n_layers
        self._stores = [
            torch.empty(n_layers, 2, 1, kv_heads, max_tokens, width, dtype=stored, device=device)
            for width, stored in self._layout(head_dim, dtype)
        ]
        self.bytes_per_token = sum(
            2 * n_layers * kv_heads * width * stored.itemsize for width, stored in self._layout(head_dim, dtype)
        )

    @staticmethod
    def _layout(head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        """Width and dtype of everything that is stored for a position and head, twice: for its key and its value."""
        return ((head_dim, dtype),)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object) -> tuple[Heads, Heads]:
        """Append one layer's keys and values [1, Hkv, n, D]; return all that the layer holds, without a copy."""
        start = self._filled[layer_idx]
        stop = start + key.shape[2]
        assert stop <= self.max_tokens, f"{stop} positions in a cache of {self.max_tokens}"
        for part, heads in ((KEYS, key), (VALUES, value)):
            self._write(part, heads, [store[layer_idx, part, :, :, start:stop] for store in self._stores])
        self._filled[layer_idx] = stop
        keys, values = (
            self._view(part, [store[layer_idx, part, :, :, :stop] for store in self._stores]) for part in (KEYS, VALUES)
        )
        return keys, values

    def _write(self, part: int, heads: Tensor, places: list[Tensor]) -> None:
        places[0].copy_(heads)

    def _view(self, part: int, stored: list[Tensor]) -> Heads:
        return stored[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held by a layer (the modelling library's name for it)."""
        return self._filled[layer_idx]

    @property
    def device(self) -> torch.device:
        """Where it is now."""
        return self._stores[0].device

    @property
    def n_bytes(self) -> int:
        """Bytes allocated for positions, filled or not, wherever it is."""
        return sum(store.nbytes for store in self._stores)

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on, in every layer: a step that failed midway has filled only some."""
        assert length >= 0, length
        self._filled = [min(filled, length) for filled in self._filled]

    def first(self, n_tokens: int) -> tuple[Tensor, ...]:
        """A copy on the host of the first `n_tokens` positions, which all layers hold, for `resume`."""
        shapes = [(*store.shape[:-2], n_tokens, store.shape[-1]) for store in self._stores]
        kept = tuple(
            torch.empty(shape, dtype=store.dtype, device="cpu")
            for shape, store in zip(shapes, self._stores, strict=True)
        )
        for source, target in zip(self._stores, kept, strict=True):
            _copy_positions(source, target, n_tokens)
        return kept

    def resume(self, kept: tuple[Tensor, ...], n_tokens: int) -> None:
        """Begin with the first `n_tokens` positions of what `first` gave of a cache like this one."""
        for source, target in zip(kept, self._stores, strict=True):
            _copy_positions(source, target, n_tokens)
        self._filled = [n_tokens] * len(self._filled)

    def stretch(self, n_tokens: int) -> Stretch:
        """The next `n_tokens` positions, or as many as there are, for decode steps of one shape. Not for 8 bits."""
        (store,) = self._stores
        start = self.get_seq_length()
        return Stretch(store, start, min(start + n_tokens, self.max_tokens))

    def goes_on_in(self, stretch: Stretch) -> bool:
        """Whether the next position is one of a stretch of this cache, at the place where it is now."""
        return stretch.store is self._stores[0] and stretch.start <= self.get_seq_length() < stretch.stop

    def advance(self) -> None:
        """Count one position more in every layer: a step has written it through a `Stretch`."""
        self._filled = [filled + 1 for filled in self._filled]

    def move(self, device: torch.device) -> None:
        """Continue on another device. Only what is filled travels; views handed out before stay where they were."""
        self._stores = [self._moved(store, device) for store in self._stores]

    def _moved(self, store: Tensor, device: torch.device) -> Tensor:
        if store.device == device:
            return store
        moved = torch.empty_like(store, device=device)
        _copy_positions(store, moved, max(self._filled))
        return moved


def _copy_positions(source: Tensor, target: Tensor, n_tokens: int) -> None:
    """The first positions of one store [n_layers, 2, 1, Hkv, T, W] into another, of another T."""
    # Head by head, since torch stages a copy with gaps in new memory, of which a device that is left has none.
    for heads, place in zip(source.flatten(0, 3), target.flatten(0, 3), strict=True):
        place[:n_tokens].copy_(heads[:n_tokens])


class Stretch:
    """Positions of a cache, from `start` to before `stop`, for decode steps that are captured once and repeated.

    Stands in the cache's place while such a step is computed. Shapes are those of the whole stretch, and which of its
    positions comes next is read from a tensor on the device, so that nothing of one step is in what is captured.
    `store` [n_layers, 2, 1, Hkv, max_tokens, D] holds the positions before `start`.
    """

    def __init__(self, store: Tensor, start: int, stop: int) -> None:
        assert start < stop, f"no position is left after {start}"
        self.store, self.start, self.stop = store, start, stop
        self._past, self._tail = store[..., :start, :], store[..., start:stop, :]
        self._tail.zero_()  # what a bias hides is multiplied by 0 all the same, and fresh memory may hold a NaN
        width = -(-(stop - start) // BIAS_COLUMNS) * BIAS_COLUMNS
        self._columns = torch.arange(width, device=store.device)
        self._open = torch.zeros(1, 1, 1, width, dtype=store.dtype, device=store.device)

    def begin(self, slot: Tensor) -> None:
        """Write position `start + slot`, slot [1] int64 on the device, in the step that follows, and see none after."""
        self._slot = slot
        self._bias = self._open.masked_fill(self._columns > slot, -torch.inf)[..., : self.stop - self.start]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object) -> tuple[TailedHeads, TailedHeads]:
        """Write one layer's key and value [1, Hkv, 1, D] of the step's position; return all that the step may see."""
        past, tail = self._past[layer_idx], self._tail[layer_idx]
        for part, heads in ((KEYS, key), (VALUES, value)):
            tail[part].index_copy_(2, self._slot, heads)
        keys, values = (TailedHeads(past[part], tail[part], self._bias) for part in (KEYS, VALUES))
        return keys, values


class Int8KVCache(KVCache):
    """A cache in about half the bytes: an approximation, chosen by name.

    Each position and head is rounded to nearest, key and value apart, in 1/127 of its own largest magnitude: no
    element is off by more than 1/254 of that. Keys of this model family have a few channels far larger than the rest,
    so they are turned first (`spreading_turn`), which spreads those over all. Attention reads even the newest positions
    back from here, so that the rounding is the same however a prompt is cut into chunks.
    """

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
        super().__init__(n_layers, kv_heads, head_dim, max_tokens, dtype=dtype, device=device)
        self._turn = spreading_turn(head_dim).to(device)

    @staticmethod
    def _layout(head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        return ((head_dim, torch.int8), (1, torch.float32))

    def _write(self, part: int, heads: Tensor, places: list[Tensor]) -> None:
        codes, scales = places
        exact = heads.float() @ self._turn if part == KEYS else heads.float()
        largest = exact.abs().amax(-1, keepdim=True)
        scales.copy_((largest / LARGEST_CODE).clamp_min(torch.finfo(torch.float32).tiny))  # not 0, for heads of zeros
        codes.copy_((exact / scales).round_())

    def _view(self, part: int, stored: list[Tensor]) -> Heads:
        codes, scales = stored
        return Int8Heads(codes, scales, self._turn if part == KEYS else None, self._dtype)

    def move(self, device: torch.device) -> None:
        super().move(device)
        self._turn = self._turn.to(device)


def spreading_turn(head_dim: int) -> Tensor:
    """An orthonormal float32 matrix [D, D] on the host that spreads each channel evenly: a Hadamard matrix.

    Where D is no power of two, each block of channels of the largest that divides it is spread within itself.
    """
    with torch.device("cpu"):
        block = torch.ones(1, 1, dtype=torch.float32)
        while len(block) < head_dim & -head_dim:
            block = torch.kron(block, torch.tensor([[1, 1], [1, -1]]))
        return torch.block_diag(*[block] * (head_dim // len(block))) / len(block) ** 0.5
