"""Which code multiplies by 4-bit weights: what a backend offers, and the choice among them, made once per device.

A backend decides in which layout packed weights lie on the device, fills it from AWQ's tensors, and multiplies.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..errors import BackendError
from .autoawq_backend import AutoAWQBackend
from .borrowed import BorrowedBackend
from .cuda import CudaBackend
from .gptqmodel_backend import GPTQModelBackend
from .int4_cpu import Int4CpuBackend
from .packing import TensorSpec
from .reference import ReferenceBackend
from .triton_backend import TritonBackend

log = logging.getLogger(__name__)


class Backend(Protocol):
    """Multiplies by 4-bit weights. `reason` says why it was chosen; threads may share one."""

    name: str
    reason: str

    def __init__(self, reason: str = "") -> None: ...

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot compute in `dtype` on `device`, tried out on this machine; empty when it can."""

    def layout(
        self, in_features: int, out_features: int, group_size: int, dtype: torch.dtype
    ) -> Mapping[str, TensorSpec]:
        """What lies on the device for one linear, by parameter name.

        Raises UnsupportedQuantError for a linear that AWQ cannot store.
        """

    def pack(self, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, out: Mapping[str, Tensor]) -> None:
        """Fill `out`, tensors as `layout` describes them on any device, from AWQ's (see `packing`).

        Raises UnsupportedQuantError when those do not belong together.
        """

    def matmul(self, x: Tensor, weights: Mapping[str, Tensor], group_size: int) -> Tensor:
        """x [..., K] times the packed weight: [..., N], a new tensor in x's dtype, the same bits every time."""


BACKENDS: tuple[type[Backend], ...] = (Int4CpuBackend, CudaBackend, ReferenceBackend)
"""Best first; the last one serves everywhere."""

BY_NAME: tuple[type[Backend], ...] = (TritonBackend,)
"""Those that serve when they are asked for, and are never chosen otherwise."""

BORROWED: tuple[type[BorrowedBackend], ...] = (AutoAWQBackend, GPTQModelBackend)
"""The same by other projects' kernels, where those are installed. None of them is needed: what they read, our own
backends read."""


def choose_backend(device: torch.device, dtype: torch.dtype, name: str | None = None) -> Backend:
    """The backend called `name`, or else the best one that computes in `dtype` on `device`.

    Raises BackendError for a name that is unknown or cannot serve there.
    """
    with torch.device("cpu"):  # an application may have set another default, with which a trial would fail
        chosen = _best(device, dtype) if name is None else _asked_for(name, device, dtype)
    log.info("4-bit weights on %s: kernel %s, %s", device, chosen.name, chosen.reason)
    return chosen


def _best(device: torch.device, dtype: torch.dtype) -> Backend:
    passed_over: list[str] = []
    for backend in BACKENDS:
        obstacle = backend.obstacle(device, dtype)
        if not obstacle:
            return backend("; ".join(passed_over) or "the fastest here")
        passed_over.append(f"{backend.name} was passed over: {obstacle}")
    raise AssertionError("the last backend serves everywhere")


def _asked_for(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    known: dict[str, type[Backend]] = {backend.name: backend for backend in (*BACKENDS, *BY_NAME, *BORROWED)}
    if name not in known:
        raise BackendError(
            f"there is no kernel {name!r}", backend=name, reason="unknown name", hint=f"one of: {', '.join(known)}"
        )
    obstacle = known[name].obstacle(device, dtype)
    if obstacle:
        raise BackendError(
            f"kernel {name} cannot be used: {obstacle}",
            backend=name,
            reason=obstacle,
            hint="leave the choice open, or choose another device or dtype",
        )
    return known[name]("asked for by name")
