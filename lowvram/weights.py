"""Blocks: which stored tensors make up each piece of the model that moves as one, and in which layout.

A block knows its bytes before it exists. Its device copy is a single run of bytes; every parameter of its module is a
view of that run, at an offset that any kernel accepts. A packed linear's parameters are what its kernel reads, made
from what the checkpoint stores in their place on the way in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checkpoint import TensorEntry, find_tensor
from .errors import CheckpointError
from .offload.footprint import BLOCK_ALIGNMENT_BYTES
from .offload.transfer import TORCH_DTYPE, Transfer
from .quant.linear import PackedLinear


@dataclass(frozen=True)
class Place:
    """One parameter's place in a block's run of bytes. `skeleton` [shape] is the parameter without memory."""

    owner: nn.Module
    leaf: str
    skeleton: nn.Parameter
    dtype: torch.dtype
    offset: int

    @property
    def shape(self) -> torch.Size:
        return self.skeleton.shape

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Where the next parameter may begin."""
        return -(-(self.offset + self.n_bytes) // BLOCK_ALIGNMENT_BYTES) * BLOCK_ALIGNMENT_BYTES

    def view(self, run: Tensor) -> Tensor:
        return run[self.offset : self.offset + self.n_bytes].view(self.dtype).view(self.shape)


class WeightBlock:
    """`module`'s weights as one run of bytes, filled from the tensors stored under `prefix`.

    The module is a skeleton: its parameters hold no memory until `bind`. `paths` begin the names of those that are
    meant, where blocks share a module.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        prefix: str,
        tensors: Mapping[str, TensorEntry],
        transfer: Transfer,
        dtype: torch.dtype,
        *,
        paths: tuple[str, ...] = ("",),
    ) -> None:
        self.name = name
        self.module = module
        self._prefix = prefix
        self._tensors = tensors
        self._transfer = transfer
        self._paths = paths
        self.store_as(dtype)
        self.stored_names = frozenset(self._check_stored())

    def store_as(self, dtype: torch.dtype) -> None:
        """Lay the weights out in another float dtype; no copy of the block may exist meanwhile, here or on the host."""
        self.dtype = dtype
        self._places = dict(_lay_out(self.module, dtype, self._paths))
        self.n_bytes = max(place.end for place in self._places.values())

    def fill(self, run: Tensor) -> None:
        """Read the weights from their files into `run` [n_bytes] uint8, on the host at once, on the device in the copy
        lane. Raises CheckpointError when a file cannot be read; `run` is then partly filled."""
        linears = dict(_quantized_linears(self.module))
        for path, place in self._places.items():
            linear = _linear_of(path, linears)
            if linear is None or linear.keeps_stored_layout:
                self._transfer.load(self._entry(path), place.view(run))
        for path, linear in linears.items():
            if not linear.keeps_stored_layout:
                stored = [self._transfer.read(self._entry(path + leaf)) for leaf in linear.stored]
                packed = {leaf: self._places[path + leaf].view(run) for leaf in linear.packed_names}
                with self._transfer.streams.copying():  # beside computing: no scratch memory of `matmul` may be used
                    linear.pack(*stored, out=packed)

    def bind(self, run: Tensor) -> None:
        """Make the module's parameters views of `run`."""
        for place in self._places.values():
            place.owner._parameters[place.leaf] = nn.Parameter(place.view(run), requires_grad=False)

    def unbind(self) -> None:
        """Return the module to a skeleton without memory."""
        for place in self._places.values():
            place.owner._parameters[place.leaf] = place.skeleton

    def _check_stored(self) -> Iterator[str]:
        """Names of the stored tensors this block reads, each checked against the skeleton."""
        linears = dict(_quantized_linears(self.module))
        for path, place in self._places.items():
            if _linear_of(path, linears) is None:
                self._check(self._entry(path), tuple(place.shape))
                yield self._prefix + path
        for path, linear in linears.items():
            for leaf, spec in linear.stored.items():
                self._check(self._entry(path + leaf), spec.shape, None if spec.dtype.is_floating_point else spec.dtype)
                yield self._prefix + path + leaf

    def _entry(self, path: str) -> TensorEntry:
        return find_tensor(self._tensors, self._prefix + path)

    @staticmethod
    def _check(entry: TensorEntry, shape: tuple[int, ...], integer: torch.dtype | None = None) -> None:
        if entry.shape != shape:
            raise CheckpointError(
                f"tensor {entry.name} in {entry.path.name} has shape {list(entry.shape)}, but config.json makes it"
                f" {list(shape)}",
                path=str(entry.path),
                tensor=entry.name,
                hint="weights and config.json belong to different models",
            )
        stored = TORCH_DTYPE.get(entry.dtype)
        if stored is None or (stored != integer if integer else not stored.is_floating_point):
            raise CheckpointError(
                f"tensor {entry.name} in {entry.path.name} is stored as {entry.dtype}, which is not a"
                f" {f'{8 * integer.itemsize}-bit integer' if integer else 'floating-point'} type",
                path=str(entry.path),
                tensor=entry.name,
            )


class HostRows:
    """An embedding table that stays in its file: rows are read when their ids are looked up, until `close`."""

    def __init__(self, table: Tensor, dtype: torch.dtype) -> None:
        self._table = table
        self._rows, self.width = table.shape
        self.dtype = dtype

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows [n, H] in the compute dtype, on the host, for ids [n]."""
        return self._table[ids].to(self.dtype)

    def __len__(self) -> int:
        return self._rows

    def close(self) -> None:
        """Let go of the file."""
        self._table = torch.empty(0, self.width, device="cpu")


def _lay_out(module: nn.Module, dtype: torch.dtype, paths: tuple[str, ...]) -> Iterator[tuple[str, Place]]:
    """Each parameter's place, one after another on aligned offsets; float parameters in the compute dtype, packed
    ones in the dtype their backend chose. Parameters outside `paths` are another block's."""
    offset = 0
    for owner_path, owner in module.named_modules():
        packed = owner.packed_names if isinstance(owner, PackedLinear) else ()
        for leaf, parameter in owner._parameters.items():
            path = f"{owner_path}.{leaf}".lstrip(".")
            if parameter is None or not path.startswith(paths):
                continue
            place = Place(owner, leaf, parameter, parameter.dtype if leaf in packed else dtype, offset)
            yield path, place
            offset = place.end


def _quantized_linears(module: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """(path ending in a dot, linear) of every packed linear inside."""
    for path, child in module.named_modules():
        if isinstance(child, PackedLinear):
            yield f"{path}." if path else "", child


def _linear_of(path: str, linears: Mapping[str, PackedLinear]) -> PackedLinear | None:
    """The packed linear whose packed parameter this is, if it is one (its bias is stored as published)."""
    owner, _, leaf = path.rpartition(".")
    linear = linears.get(f"{owner}." if owner else "")
    return linear if linear is not None and leaf in linear.packed_names else None
