"""Linear layers whose weights are packed: what `nn.Linear` is to a layer, for a linear stored in 4 or 8 bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .formats import FORMATS
from .int8 import int8_layout
from .int8_matmul import Int8Backend
from .matmul import Backend
from .packing import TensorSpec
from .scheme import Packing

Specs = Mapping[str, TensorSpec]


class PackedLinear(nn.Module, ABC):
    """x [..., in_features] -> [..., out_features], multiplied by `backend`, with an optional bias.

    A skeleton: its parameters (those of `layout`, and `bias` in `dtype`) lie on `meta`, require no gradient, and wait
    to be replaced by tensors on the device. `stored` is what the checkpoint holds in their place, by leaf name;
    `keeps_stored_layout` says that all of `layout` is among it.
    """

    backend: Backend | Int8Backend
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group_size: int,
        backend: Backend | Int8Backend,
        dtype: torch.dtype,
        stored: Specs,
        layout: Specs,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.backend = backend
        self.stored = stored
        self.packed_names = tuple(layout)
        self.keeps_stored_layout = layout.items() <= stored.items()
        for name, spec in layout.items():
            self.register_parameter(name, _skeleton(spec))
        self.register_parameter("bias", _skeleton(TensorSpec((out_features,), dtype)) if bias else None)

    def pack(self, *stored: Tensor, out: Mapping[str, Tensor]) -> None:
        """Fill `out` (tensors for `packed_names`) from the tensors of `stored`, in its order. Not called, and so not
        there, where `keeps_stored_layout`: what is stored is read into place."""
        raise AssertionError("what is stored is read into place")

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """x [..., in_features] times the weight, without the bias: a new tensor."""

    def forward(self, x: Tensor) -> Tensor:
        product = self.multiply(x)
        return product if self.bias is None else product.add_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}, backend={self.backend.name}"


class AWQLinear(PackedLinear):
    """A linear of 4 bits, multiplied by `backend`.

    Raises UnsupportedQuantError for sizes that the packing cannot store.
    """

    backend: Backend

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group_size: int,
        backend: Backend,
        dtype: torch.dtype,
        packing: Packing = "awq",
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias=bias,
            group_size=group_size,
            backend=backend,
            dtype=dtype,
            stored=FORMATS[packing].layout(in_features, out_features, group_size),
            layout=backend.layout(in_features, out_features, group_size, dtype),
        )
        self.packing = packing

    def pack(self, *stored: Tensor, out: Mapping[str, Tensor]) -> None:
        """See `PackedLinear.pack`.

        Raises UnsupportedQuantError for numbers that AWQ's tensors cannot hold; see `matmul.Backend.pack`.
        """
        self.backend.pack(*FORMATS[self.packing].to_awq(*stored, group_size=self.group_size), self.group_size, out)

    def multiply(self, x: Tensor) -> Tensor:
        weights = {name: getattr(self, name) for name in self.packed_names}
        return self.backend.matmul(x, weights, self.group_size)


class Int8Linear(PackedLinear):
    """A linear of 8 bits, multiplied by `backend`.

    Raises UnsupportedQuantError for sizes that cannot be stored so.
    """

    backend: Int8Backend
    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group_size: int,
        backend: Int8Backend,
        dtype: torch.dtype,
    ) -> None:
        stored = int8_layout(in_features, out_features, group_size)
        super().__init__(
            in_features,
            out_features,
            bias=bias,
            group_size=group_size,
            backend=backend,
            dtype=dtype,
            stored=stored,
            layout={leaf: stored[leaf] for leaf in ("weight_packed", "weight_scale")},
        )

    def multiply(self, x: Tensor) -> Tensor:
        return self.backend.matmul(x, self.weight_packed, self.weight_scale, self.group_size)


def _skeleton(spec: TensorSpec) -> nn.Parameter:
    return nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype, device="meta"), requires_grad=False)
