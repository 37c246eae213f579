"""The product with 8-bit weights: several backends for it and the choice among them, made once per device."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from .int8 import SlicesBackend
from .int8_cpu import Int8CpuBackend
from .int8_cuda import Int8CudaBackend
from .matmul import Backend
from .reference import ReferenceBackend

log = logging.getLogger(__name__)


class Int8Backend(Protocol):
    """Multiplies by 8-bit weights as they are stored; threads may share one."""

    name: str

    def __init__(self) -> None: ...

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot compute in `dtype` on `device`, tried out on this machine; empty when it can."""

    def matmul(self, x: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
        """x [..., K] times the weight that `weight_packed` and `weight_scale` stand for: [..., N], a new tensor in x's
        dtype, the same bits every time."""


INT8_BACKENDS: tuple[type[Int8Backend], ...] = (Int8CpuBackend, Int8CudaBackend, SlicesBackend)
"""Best first; the last one serves everywhere."""


READABLE_TOO = "in the readable way, as 4-bit weights are"
"""Why slices serve where a better backend could: nobody wants a fast kernel for one width and a readable one for the
other."""


def choose_int8(device: torch.device, dtype: torch.dtype, four_bits: Backend) -> Int8Backend:
    """The best backend that computes in `dtype` on `device`; slices, where `four_bits` are left to the reference
    backend, by choice or for want of another."""
    if isinstance(four_bits, ReferenceBackend):
        return _told(SlicesBackend(), device, READABLE_TOO)
    passed_over: list[str] = []
    for backend in INT8_BACKENDS:
        with torch.device("cpu"):  # an application may have set another default, with which a trial would fail
            obstacle = backend.obstacle(device, dtype)
        if not obstacle:
            return _told(backend(), device, "; ".join(passed_over) or "the fastest here")
        passed_over.append(f"{backend.name} was passed over: {obstacle}")
    raise AssertionError("the last backend serves everywhere")


def _told(backend: Int8Backend, device: torch.device, reason: str) -> Int8Backend:
    log.info("8-bit weights on %s: kernel %s, %s", device, backend.name, reason)
    return backend
