"""The gptqmodel backend: gptqmodel's Triton kernel on AWQ's own tensors in float16, where it is asked for by name.

Its other kernels for AWQ are compiled by nvcc or by a C++ compiler, want weights in a layout that only a card can make,
or come in versions that ask for a newer torch than ours; see docs/decisions/0010.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .borrowed import BorrowedBackend, undoing_side_effects


class GPTQModelBackend(BorrowedBackend):
    """Multiplies by `gptqmodel.quantization.awq.modules.triton.gemm.awq_gemm_triton` of gptqmodel 7.6 and 7.7.

    Sums are float32 in one order. Importing gptqmodel replaces functions of transformers, safetensors and Triton and
    starts threads, for as long as the process lives.
    """

    name = "gptqmodel"
    package = "gptqmodel"
    caveat = "importing it replaces functions of transformers, safetensors and Triton in this process"
    dtypes = (torch.float16,)

    def multiply(self, rows: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
        return self.multiply_packed()(rows, qweight, scales, qzeros, split_k_iters=1, fp32_accum=True)

    @staticmethod
    @cache
    def multiply_packed() -> Callable[..., Tensor]:
        """Import gptqmodel's function. Raises ImportError where gptqmodel or what it imports is missing."""
        with undoing_side_effects():
            from gptqmodel.quantization.awq.modules.triton.gemm import awq_gemm_triton
        return awq_gemm_triton
