"""Another project's kernel -> a backend of ours, for whoever asks for it by name: what such backends share.

AutoAWQ and gptqmodel carry the same Triton kernel for AWQ's words, which began in vLLM. Where weights lie and what they
cost stays ours, and so do many rows, odd groups and the trial that the kernel has to pass first.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from subprocess import CalledProcessError

import torch
from torch import Tensor

from .reference import OnAWQTensors, ReferenceBackend
from .trial import BROKEN, complaint, dtype_obstacle, require_dtype
from .triton_backend import FEW_ROWS, self_test

GROUP_SIZES = (32, 64, 128)
"""Those that both projects say the kernel was made for."""


class BorrowedBackend(OnAWQTensors, ABC):
    """Multiplies few rows by another project's kernel; see `matmul.Backend`. What that was not made for is left to the
    reference backend, which reads the same tensors."""

    name: str
    package: str
    """What Python imports; `name` is that of our extra."""

    caveat: str
    """What whoever asks for it should know, in a few words: part of `reason`, and told by `lowvram doctor`."""

    dtypes: tuple[torch.dtype, ...]

    def __init__(self, reason: str = "") -> None:
        self.reason = "; ".join(filter(None, (reason, self.caveat)))
        self._reference = ReferenceBackend()

    @classmethod
    def obstacle(cls, device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot serve here, or nothing: it must import, compile for this card and multiply rightly."""
        if device.type == "cpu":
            return "it runs on a graphics card, not on the CPU"
        if obstacle := dtype_obstacle(dtype, cls.dtypes):
            return obstacle
        try:
            from triton.errors import TritonError

            cls.multiply_packed()
        except BROKEN as missing:
            return f"{cls.name} cannot be imported ({missing}): pip install 'lowvram[{cls.name}]'"
        try:
            return complaint("its kernel", self_test(cls().matmul, device, dtype))
        except (TritonError, CalledProcessError, *BROKEN) as failure:
            return f"its kernel fails on this machine: {failure}"  # another version may take other arguments

    def matmul(self, x: Tensor, weights: Mapping[str, Tensor], group_size: int) -> Tensor:
        """x [..., K] -> [..., N], a new tensor."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if group_size not in GROUP_SIZES or not 0 < len(rows) <= FEW_ROWS:
            return self._reference.matmul(x, weights, group_size)
        require_dtype(self.name, x, self.dtypes)
        out = self.multiply(rows, weights["qweight"], weights["qzeros"], weights["scales"])
        return out.view(*x.shape[:-1], out.shape[1])

    @staticmethod
    @abstractmethod
    def multiply_packed() -> object:
        """Import the package's function, once."""

    @abstractmethod
    def multiply(self, rows: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
        """rows [M, K], contiguous, times the packed weight: [M, N], new, in the rows' dtype."""


@contextmanager
def undoing_side_effects() -> Iterator[None]:
    """Import a package in here to keep its hands off the process: variables of the environment, filters of warnings and
    the root logger are as they were afterwards, and what it prints goes to stderr.

    Functions of other libraries that it replaces, and threads that it starts, stay.
    """
    variables, root = dict(os.environ), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            yield
    finally:
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
        root.handlers[:] = handlers
        root.setLevel(level)
