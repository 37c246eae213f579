"""A device short of memory: weights that are there only while they are used, and operators that find no room."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class PassingBlock:
    """A block of weights that comes as a new run of bytes at each use, and leaves. `is_mine` picks its parameters.

    `left_behind` counts the uses after which something else still held the run.
    """

    def __init__(self, module: nn.Module, is_mine: Callable[[str], bool] = lambda name: True) -> None:
        self._module = module
        self._stored = {name: weight.detach() for name, weight in module.named_parameters() if is_mine(name)}
        self.uses = self.left_behind = 0
        self._drop()

    def __enter__(self) -> nn.Module:
        run = torch.cat([weight.flatten() for weight in self._stored.values()])
        self._run = weakref.ref(run.untyped_storage())
        sizes = [weight.numel() for weight in self._stored.values()]
        for (name, weight), part in zip(self._stored.items(), run.split(sizes), strict=True):
            self._bind(name, part.view(weight.shape))
        self.uses += 1
        return self._module

    def __exit__(self, *_: object) -> None:
        self._drop()
        self.left_behind += self._run() is not None

    def _drop(self) -> None:
        for name, weight in self._stored.items():
            self._bind(name, torch.empty_like(weight, device="meta"))

    def _bind(self, name: str, weight: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        self._module.get_submodule(owner)._parameters[leaf] = nn.Parameter(weight, requires_grad=False)


def passing(module: nn.Module) -> PassingBlock:
    """All of a copy of `module`."""
    return PassingBlock(copy.deepcopy(module))


class NoRoom(TorchDispatchMode):
    """While entered, the operator after `operators` others finds no memory left."""

    def __init__(self, operators: int) -> None:
        super().__init__()
        self._left = operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._left -= 1
        if self._left < 0:
            raise torch.OutOfMemoryError(f"no room for {func}")
        return func(*args, **(kwargs or {}))
