"""Headers of a 16-bit checkpoint -> the files of the quantized one: every tensor's name, shape and place.

What stays as it is comes first, in the order in which it is stored; then each layer is a file of its own, so that a
finished layer is a finished file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..checkpoint import TensorHeader
from ..checkpoint_writer import divide, header_of, shard_bytes, shard_name
from ..quant.packing import stored_layout
from ..quant.recipe import LINEARS

Tensors = Mapping[str, TensorHeader]


@dataclass(frozen=True)
class Layout:
    """File name -> tensors by name: of what is `copied`, and of each of the `layers`."""

    copied: Mapping[str, Tensors]
    layers: Mapping[str, Tensors]

    @property
    def shards(self) -> dict[str, Tensors]:
        """All files, in the order of their numbers."""
        return {**self.copied, **self.layers}

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


def plan_layout(tensors: Tensors, layers: Sequence[Collection[str]], group_size: int) -> Layout:
    """The files for `tensors`, of which each of the `layers` has the named ones.

    Raises UnsupportedQuantError for a linear that cannot be stored in such groups.
    """
    in_layers = frozenset(name for names in layers for name in names)
    copied = divide({name: header for name, header in tensors.items() if name not in in_layers})
    quantized = [
        dict(_in_four_bits({n: tensors[n] for n in sorted(names)}, layer_prefix(i), group_size))
        for i, names in enumerate(layers)
    ]
    total = len(copied) + len(quantized)
    files = [shard_name(number, total) for number in range(1, total + 1)]
    return Layout(
        dict(zip(files, copied, strict=False)),
        dict(zip(files[len(copied) :], quantized, strict=True)),
    )


def _in_four_bits(tensors: Tensors, prefix: str, group_size: int) -> Iterator[tuple[str, TensorHeader]]:
    for name, header in tensors.items():
        linear = name.removeprefix(prefix).removesuffix(".weight")
        if linear not in LINEARS:
            yield name, header
            continue
        n, k = header.shape
        for leaf, spec in stored_layout(k, n, group_size).items():
            yield f"{prefix}{linear}.{leaf}", header_of(torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
