"""What moves: weights that go to the device and leave it as one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Block(Protocol):
    """Weights that move as one, for `module`, as `n_bytes` contiguous bytes in the layout their kernels read."""

    @property
    def name(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def module(self) -> nn.Module: ...

    def fill(self, run: Tensor) -> None:
        """Write the weights into `run` [n_bytes] uint8, on the host at once, on the device in the copy lane."""

    def bind(self, run: Tensor) -> None:
        """Make the module's parameters views of `run` [n_bytes or more] uint8."""

    def unbind(self) -> None:
        """Forget the run: the module's parameters hold no memory afterwards."""


def empty_run(n_bytes: int, device: torch.device) -> Tensor:
    """Memory for weights [n_bytes] uint8, that may be written in any of torch's modes: some steps are computed in
    inference mode and some are not, and what was made in that mode can be written to in no other."""
    with torch.inference_mode(False):
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)
