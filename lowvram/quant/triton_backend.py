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

from .reference import OnAWQTensors, ReferenceBackend
from .trial import BROKEN, awq_error, complaint, dtype_obstacle, require_dtype

FEW_ROWS = 128
"""Up to here rows are multiplied from the packed words. Every 16 of them take a pass over half a byte per weight;
unpacking moves 4.5 bytes. By this arithmetic, not by measurement."""

RUN = 32
"""What the kernel takes at a time; group sizes are multiples of it."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
        if obstacle := dtype_obstacle(dtype, DTYPES):
            return obstacle
        try:
            from triton.errors import TritonError

            from . import triton_kernel  # noqa: F401 (here, so that what is missing is known by its own error)
        except BROKEN as missing:
            return f"triton cannot be imported ({missing}): pip install triton"
        try:
            return complaint("its kernel", self_test(TritonBackend().matmul, device, dtype))
        except (TritonError, CalledProcessError, *BROKEN) as failure:
            return f"its kernel fails on this machine: {failure}"

    def matmul(self, x: Tensor, weights: Mapping[str, Tensor], group_size: int) -> Tensor:
        """x [..., K] -> [..., N], a new tensor."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if group_size % RUN or not 0 < len(rows) <= FEW_ROWS:
            return self._reference.matmul(x, weights, group_size)
        require_dtype(self.name, x, DTYPES)
        from .triton_kernel import multiply

        out = multiply(rows, weights["qweight"], weights["qzeros"], weights["scales"], group_size, RUN)
        return out.view(*x.shape[:-1], out.shape[1])


def self_test(
    matmul: Callable[[Tensor, Mapping[str, Tensor], int], Tensor], device: torch.device, dtype: torch.dtype
) -> float:
    """The largest relative error of a small linear of several groups and tiles, for one row and for more than one tile
    of them."""
    return awq_error(matmul, device, dtype, (8 * RUN, 72, 2 * RUN), rows=(1, 33))
