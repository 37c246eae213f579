"""Skeletons and the names of stored tensors -> skeletons with a packed linear wherever one is stored.

The published list of modules left alone names none that the modelling library's tree has, and groups of
compressed-tensors are named by patterns: which linear is packed, and how wide, its stored tensors tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import nn

from .formats import FORMATS
from .int8 import BYTES_PER_WORD, MARKER, SlicesBackend
from .int8_matmul import Int8Backend, choose_int8
from .linear import AWQLinear, Int8Linear, PackedLinear
from .matmul import Backend
from .scheme import AWQScheme, Int8Scheme, Scheme


class Stored(Protocol):
    """A tensor as a checkpoint's header describes it."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Fitter:
    """Fits packed linears of the kinds in `scheme` where `stored` (by published name) has them.

    4 bits are multiplied by `backend`, and 8 by what `choose_int8` finds to go with it.
    """

    def __init__(
        self,
        stored: Mapping[str, Stored],
        scheme: Scheme,
        backend: Backend,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._stored = stored
        self._scheme = scheme
        self._backend = backend
        self._dtype = dtype
        self._int8 = _int8_backend(scheme, backend, device, dtype)

    @property
    def kernel(self) -> str:
        """What multiplies by the packed weights of this checkpoint; torch where there are none."""
        used = (self._backend if isinstance(kind, AWQScheme) else self._int8 for kind in self._scheme)
        return " and ".join(backend.name for backend in used) or "torch"

    def fit(self, modules: nn.Module, prefix: str) -> None:
        """Put packed linears into `modules`, whose tensors are stored under `prefix`. Raises UnsupportedQuantError for
        one that cannot be stored as the scheme says."""
        for path, linear in list(modules.named_modules()):
            if isinstance(linear, nn.Linear) and self.stores(f"{prefix}{path}."):
                modules.set_submodule(path, self.fitted(linear, f"{prefix}{path}."))

    def stores(self, prefix: str) -> bool:
        """Whether the linear whose tensors begin with `prefix` is packed."""
        return any(True for _ in self._kinds(prefix))

    def fitted(self, linear: nn.Linear, prefix: str) -> PackedLinear:
        """The packed linear in the place of `linear`, with a bias where one is stored (GPTQ tools add zeros)."""
        kind = self._kind(linear, prefix)
        sizes = linear.in_features, linear.out_features
        bias = linear.bias is not None or f"{prefix}bias" in self._stored
        if isinstance(kind, Int8Scheme):
            return Int8Linear(*sizes, bias=bias, group_size=kind.group_size, backend=self._int8, dtype=self._dtype)
        return AWQLinear(
            *sizes,
            bias=bias,
            group_size=kind.group_size,
            backend=self._backend,
            dtype=self._dtype,
            packing=kind.packing,
        )

    def _kind(self, linear: nn.Linear, prefix: str) -> AWQScheme | Int8Scheme:
        """Where two kinds go by the same name, the words of a row say how many of its numbers are in each."""
        kinds = {type(kind): kind for kind in self._kinds(prefix)}
        if len(kinds) > 1:
            words = self._stored[prefix + MARKER].shape[-1]
            return kinds[Int8Scheme if words * BYTES_PER_WORD == linear.in_features else AWQScheme]
        return next(iter(kinds.values()))

    def _kinds(self, prefix: str) -> Iterator[AWQScheme | Int8Scheme]:
        for kind in self._scheme:
            marker = FORMATS[kind.packing].marker if isinstance(kind, AWQScheme) else MARKER
            if prefix + marker in self._stored:
                yield kind


def _int8_backend(scheme: Scheme, backend: Backend, device: torch.device, dtype: torch.dtype) -> Int8Backend:
    """Nothing is tried out, or compiled, for a checkpoint without 8 bits."""
    has_int8 = any(isinstance(kind, Int8Scheme) for kind in scheme)
    return choose_int8(device, dtype, backend) if has_int8 else SlicesBackend()
