"""A linear layer whose weight is 4-bit: what `nn.Linear` is to a decoder layer, for a linear stored in 4 bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .formats import FORMATS
from .matmul import Backend
from .packing import TensorSpec
from .scheme import Packing


class AWQLinear(nn.Module):
    """x [..., in_features] -> [..., out_features] by `backend`, with an optional bias.

    A skeleton: its parameters (those of the backend's layout, and `bias` in `dtype`) lie on `meta`, require no
    gradient, and wait to be replaced by tensors on the device. `stored` is what the checkpoint holds in their place, by
    leaf name; `keeps_stored_layout` says that they are the same. Raises UnsupportedQuantError for sizes that the
    packing cannot store.
    """

    bias: nn.Parameter | None

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
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.backend = backend
        self.packing = packing
        self.stored: Mapping[str, TensorSpec] = FORMATS[packing].layout(in_features, out_features, group_size)
        layout = backend.layout(in_features, out_features, group_size, dtype)
        self.packed_names = tuple(layout)
        self.keeps_stored_layout = dict(layout) == self.stored
        for name, spec in layout.items():
            self.register_parameter(name, _skeleton(spec))
        self.register_parameter("bias", _skeleton(TensorSpec((out_features,), dtype)) if bias else None)

    def pack(self, *stored: Tensor, out: Mapping[str, Tensor]) -> None:
        """Fill `out` (tensors for `packed_names`) from the tensors of `stored`, in its order.

        Raises UnsupportedQuantError for numbers that AWQ's tensors cannot hold; see `matmul.Backend.pack`.
        """
        self.backend.pack(*FORMATS[self.packing].to_awq(*stored, group_size=self.group_size), self.group_size, out)

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: getattr(self, name) for name in self.packed_names}
        product = self.backend.matmul(x, weights, self.group_size)
        return product if self.bias is None else product.add_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}, backend={self.backend.name}"


def _skeleton(spec: TensorSpec) -> nn.Parameter:
    return nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype, device="meta"), requires_grad=False)
