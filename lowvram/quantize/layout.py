"""Headers of a 16-bit checkpoint -> the files of the quantized one: every tensor's name, shape and place.

What stays as it is comes first, in the order in which it is stored; then each layer is a file of its own, and each
part that is quantized besides, so that a finished one is a finished file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from ..checkpoint import TensorHeader
from ..checkpoint_writer import divide, header_of, shard_bytes, shard_name
from ..quant.recipe import LINEARS
from ..quant.storage import Storage
from .parts import Part

Tensors = Mapping[str, TensorHeader]


@dataclass(frozen=True)
class Layout:
    """File name -> tensors by name: of what is `copied`, of each of the `layers`, and of each of the `parts`."""

    copied: Mapping[str, Tensors]
    layers: Mapping[str, Tensors]
    parts: Mapping[str, Tensors]

    @property
    def shards(self) -> dict[str, Tensors]:
        """All files, in the order of their numbers."""
        return {**self.copied, **self.layers, **self.parts}

    @property
    def file_bytes(self) -> int:
        """Of all files together."""
        return sum(map(shard_bytes, self.shards.values()))

    @property
    def copied_bytes(self) -> int:
        """Of all tensors that stay as they are."""
        return sum(header.n_bytes for tensors in self.copied.values() for header in tensors.values())


def layer_prefix(index: int) -> str:
    """What published names of a thinker layer's tensors begin with."""
    return f"thinker.model.layers.{index}."


def plan_layout(
    tensors: Tensors, layers: Sequence[Collection[str]], storage: Storage, parts: Sequence[Part] = ()
) -> Layout:
    """The files for `tensors`, of which each of the `layers` has the named ones, to be stored as `storage` says.

    Raises UnsupportedQuantError for a linear of a layer that cannot be stored so.
    """
    elsewhere = {name for names in layers for name in names} | {name for part in parts for name in part.replaced}
    copied = divide({name: header for name, header in tensors.items() if name not in elsewhere})
    quantized = [
        dict(_quantized({n: tensors[n] for n in sorted(names)}, layer_prefix(i), storage))
        for i, names in enumerate(layers)
    ]
    besides = [part.tensors(tensors) for part in parts]
    total = len(copied) + len(quantized) + len(besides)
    numbers = count(1)
    return Layout(
        *({shard_name(next(numbers), total): shard for shard in kind} for kind in (copied, quantized, besides))
    )


def _quantized(tensors: Tensors, prefix: str, storage: Storage) -> Iterator[tuple[str, TensorHeader]]:
    for name, header in tensors.items():
        linear = name.removeprefix(prefix).removesuffix(".weight")
        if linear not in LINEARS:
            yield name, header
            continue
        n, k = header.shape
        for leaf, spec in storage.layout(k, n).items():
            yield f"{prefix}{linear}.{leaf}", header_of(torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
