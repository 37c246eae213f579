"""The autoawq backend: AutoAWQ's Triton kernel on AWQ's own tensors, where it is asked for by name.

The kernel adds up in the type of its scales. In float16, as AutoAWQ calls it, eight parts of a sum meet in no fixed
order and err by 8e-4 at 3584 inputs; with scales widened to float32 and one part, sums are float32 in one order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .borrowed import BorrowedBackend, undoing_side_effects


class AutoAWQBackend(BorrowedBackend):
    """Multiplies by `awq.modules.triton.gemm.awq_gemm_triton` of AutoAWQ 0.2.9.

    Cards with TF32 cut weights to its 11 bits: a relative error of 4.0e-4 in float16, where the other kernels stay
    below 3.5e-4, and of 1.7e-3 in bfloat16, as theirs (calculated for cut bits, not measured on a card).
    """

    name = "autoawq"
    package = "awq"
    caveat = "cards with TF32 cut its weights to 11 bits, a relative error of 4e-4 in float16"
    dtypes = (torch.float16, torch.bfloat16)

    def multiply(self, rows: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
        multiply_packed = self.multiply_packed()
        return multiply_packed(rows.float(), qweight, scales.float(), qzeros, split_k_iters=1).to(rows.dtype)

    @staticmethod
    @cache
    def multiply_packed() -> Callable[..., Tensor]:
        """Import AutoAWQ's function. Raises ImportError where AutoAWQ or what it imports is missing."""
        with undoing_side_effects():
            from awq.modules.triton.gemm import awq_gemm_triton
        return awq_gemm_triton
