"""How quantizing may store a linear's weight: how it is rounded, and the tensors that are left of it.

4 bits have a zero point for each group of inputs, as with AWQ. 8 bits are symmetric: zero points would gain little
there, and other readers' kernels have none. AWQ's tensors hold 4 bits only; those of compressed-tensors
(`pack-quantized`) hold either, also side by side in one checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from .formats import asymmetric_layout, to_compressed
from .int8 import int8_layout, pack_int8, round_to_int8
from .packing import TensorSpec, fake_quantize, pack_awq, stored_layout

SHAPE = "weight_shape"
"""compressed-tensors' record of a weight's [N, K], which tells nothing that other tensors do not."""


class Storage(Protocol):
    """How a weight [N, K] is rounded and stored, with one scale for `group_size` inputs."""

    bits: ClassVar[int]
    symmetric: ClassVar[bool]
    rows_dim: ClassVar[int]
    """The dimension of the stored tensors along which they are cut where the weight is cut by outputs."""

    @property
    def group_size(self) -> int: ...

    def layout(self, in_features: int, out_features: int) -> dict[str, TensorSpec]:
        """What is stored, by leaf name. Raises UnsupportedQuantError for a weight that cannot be stored so."""

    def nearest(self, weight: Tensor) -> Tensor:
        """`weight` as it will be once stored, in float32."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """What is stored of `weight`, or of some rows of it, eight or a multiple of that; all but `SHAPE`."""


@dataclass(frozen=True)
class AWQStorage:
    """4 bits in AWQ's tensors (`gemm`)."""

    group_size: int
    bits: ClassVar[int] = 4
    symmetric: ClassVar[bool] = False
    rows_dim: ClassVar[int] = 1

    def layout(self, in_features: int, out_features: int) -> dict[str, TensorSpec]:
        return stored_layout(in_features, out_features, self.group_size)

    def nearest(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.group_size)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return dict(zip(("qweight", "qzeros", "scales"), pack_awq(weight, self.group_size), strict=True))


@dataclass(frozen=True)
class Int4Storage:
    """The same numbers in compressed-tensors' tensors."""

    group_size: int
    bits: ClassVar[int] = 4
    symmetric: ClassVar[bool] = False
    rows_dim: ClassVar[int] = 0

    def layout(self, in_features: int, out_features: int) -> dict[str, TensorSpec]:
        return asymmetric_layout(in_features, out_features, self.group_size)

    def nearest(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.group_size)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        tensors = to_compressed(*pack_awq(weight, self.group_size))
        return dict(zip(("weight_packed", "weight_zero_point", "weight_scale"), tensors, strict=True))


@dataclass(frozen=True)
class Int8Storage:
    """8 bits in compressed-tensors' tensors."""

    group_size: int
    bits: ClassVar[int] = 8
    symmetric: ClassVar[bool] = True
    rows_dim: ClassVar[int] = 0

    def layout(self, in_features: int, out_features: int) -> dict[str, TensorSpec]:
        return int8_layout(in_features, out_features, self.group_size)

    def nearest(self, weight: Tensor) -> Tensor:
        return round_to_int8(weight, self.group_size)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return dict(zip(("weight_packed", "weight_scale"), pack_int8(weight, self.group_size), strict=True))


def compressed(bits: int, group_size: int) -> Storage:
    """compressed-tensors' storage of that width."""
    return Int4Storage(group_size) if bits == 4 else Int8Storage(group_size)
