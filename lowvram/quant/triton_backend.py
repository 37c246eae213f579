"""The triton backend: AWQ's own tensors multiplied by a Triton kernel, for whoever asks for it by name.

It serves where the int4-cuda backend cannot: on AMD cards, or where NVIDIA's cuda.core is missing. Triton comes with
CUDA builds of torch for Linux and needs a C compiler to start a kernel. The kernel is checked by Triton's interpreter
and compiled for every architecture, but has not run on a card yet, so nothing chooses it by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from subprocess import CalledProcessError

import torch
from torch import Tensor

from .packing import pack_awq, unpack_awq
from .reference import OnAWQTensors, ReferenceBackend

FEW_ROWS = 128
"""Up to here rows are multiplied from the packed words. Every 16 of them take a pass over half a byte per weight;
unpacking moves 4.5 bytes. By this arithmetic, not by measurement."""

RUN = 32
"""What the kernel takes at a time; group sizes are multiples of it."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

SELF_TEST_TOLERANCE = 0.01
"""Above the error that bfloat16 explains, and far below what a misread nibble makes."""


class TritonBackend(OnAWQTensors):
    """Multiplies by `triton_kernel`; see `matmul.Backend`. Many rows, and groups that are no multiple of 32, are left
    to the reference backend, which reads the same tensors."""

    name = "triton"

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        self._reference = ReferenceBackend()

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot serve here, or nothing: it must compile for this card and compute a small linear rightly."""
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it runs on a graphics card, not on the CPU"
        if dtype not in DTYPES:
            return f"it computes in float16, bfloat16 and float32, not in {str(dtype).removeprefix('torch.')}"
        try:
            from triton.errors import TritonError

            from . import triton_kernel  # noqa: F401 (here, so that what is missing is known by its own error)
        except ImportError as missing:
            return f"triton cannot be imported ({missing}): pip install triton"
        try:
            error = self_test(TritonBackend().matmul, device, dtype)
        except (TritonError, RuntimeError, OSError, CalledProcessError) as failure:
            return f"its kernel fails on this machine: {failure}"
        return "" if error < SELF_TEST_TOLERANCE else f"its kernel is wrong on this machine, by {error:.1%}"

    def matmul(self, x: Tensor, weights: Mapping[str, Tensor], group_size: int) -> Tensor:
        """x [..., K] -> [..., N], a new tensor."""
        from .triton_kernel import multiply

        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if group_size % RUN or not 0 < len(rows) <= FEW_ROWS:
            return self._reference.matmul(x, weights, group_size)
        out = multiply(rows, weights["qweight"], weights["qzeros"], weights["scales"], group_size)
        return out.view(*x.shape[:-1], out.shape[1])


def self_test(
    matmul: Callable[[Tensor, Mapping[str, Tensor], int], Tensor], device: torch.device, dtype: torch.dtype
) -> float:
    """The largest relative error of a product with AWQ's own tensors in a small linear of several groups and tiles, for
    one row and for more than one tile of them."""
    generator = torch.Generator().manual_seed(0)
    in_features, out_features, group_size = 8 * RUN, 72, 2 * RUN
    stored = pack_awq(torch.randn(out_features, in_features, generator=generator), group_size)
    weights = dict(zip(("qweight", "qzeros", "scales"), (tensor.to(device) for tensor in stored), strict=True))
    x = torch.randn(33, in_features, generator=generator).to(dtype)
    exact = x.float() @ unpack_awq(*stored, group_size, torch.float32).t()
    products = [matmul(x[:rows].to(device), weights, group_size).cpu() for rows in (1, len(x))]
    errors = torch.stack([(y - exact[: len(y)]).norm() / exact[: len(y)].norm() for y in products])
    return float(errors.max())  # NaN, if any is
