"""What a stream carries from one push to the next, in cells whose values are replaced and never changed in place.

So everything it remembers at one moment is a shallow copy away, and a push that failed half-way can be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Snapshot = tuple[Any, ...]


class Cell(Generic[T]):
    """One value that outlives a push."""

    def __init__(self, value: T) -> None:
        self.value = value


class Carry:
    """All the cells of one stream."""

    def __init__(self) -> None:
        self._cells: list[Cell[Any]] = []

    def cell(self, value: T) -> Cell[T]:
        """A new cell, with its first value."""
        cell = Cell(value)
        self._cells.append(cell)
        return cell

    def snapshot(self) -> Snapshot:
        """What is remembered now. Costs a list of references, and keeps alive the tensors they are to."""
        return tuple(cell.value for cell in self._cells)

    def restore(self, snapshot: Snapshot) -> None:
        """Remember what was remembered then, and nothing since."""
        for cell, value in zip(self._cells, snapshot, strict=True):
            cell.value = value

    @property
    def n_bytes(self) -> int:
        """Memory of the tensors carried, whole storages counted once."""
        storages = (tensor.untyped_storage() for cell in self._cells for tensor in _tensors(cell.value))
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class Queue:
    """Frames that wait in `carry`: tensors that share their time axis, -2."""

    def __init__(self, carry: Carry) -> None:
        self._held: Cell[tuple[Tensor, ...]] = carry.cell(())

    @property
    def frames(self) -> int:
        return self._held.value[0].shape[-2] if self._held.value else 0

    def put(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Append frames; returns all that wait now. Views are held as they are until frames are taken."""
        if self.frames:
            tensors = tuple(torch.cat(pair, -2) for pair in zip(self._held.value, tensors, strict=True))
        self._held.value = tensors
        return tensors

    def store(self, *tensors: Tensor) -> None:
        """Append frames that will wait until a later push."""
        self.put(*tensors)
        self._keep(slice(None))

    def first(self, frames: int) -> tuple[Tensor, ...]:
        """The first `frames` frames, which go on waiting."""
        return tuple(tensor[..., :frames, :] for tensor in self._held.value)

    def take(self, frames: int) -> tuple[Tensor, ...]:
        """Remove the first `frames` frames and return them."""
        taken = self.first(frames)
        self._keep(slice(frames, None))
        return taken

    def take_all(self) -> tuple[Tensor, ...]:
        return self.take(self.frames)

    def drop_last(self, frames: int) -> None:
        """Remove the last `frames` frames."""
        self._keep(slice(0, self.frames - frames))

    def _keep(self, frames: slice) -> None:
        self._held.value = tuple(_own(tensor[..., frames, :]) for tensor in self._held.value)


def _own(tensor: Tensor) -> Tensor:
    """The same values with no memory but their own: a view would keep what was taken."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
