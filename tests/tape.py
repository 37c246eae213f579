"""Captures a step without a card: notes its operators, and does exactly these again on exactly the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


class Tape:
    """A recorder as a CUDA graph is one: shapes, numbers of the host and addresses are those of the capture, for good.

    `captures` counts. Unlike a card it computes while it captures, which a step must not mind.
    """

    def __init__(self) -> None:
        self.captures = 0

    def capture(self, step: Callable[[], T]) -> Callable[[], T]:
        self.captures += 1
        with Operators() as operators:
            result = step()

        def again() -> T:
            operators.repeat()
            return result

        return again


class Operators(TorchDispatchMode):
    """The operators of what is computed inside, each with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def names(self) -> list[str]:
        return [func.overloadpacket.__name__ for func, *_ in self.calls]

    def repeat(self) -> None:
        """Compute all of it again: what was changed in place is changed again, what was made is made where it was."""
        for func, args, kwargs, result in self.calls:
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif made := [tensor for tensor in tensors(result) if not _is_view(tensor, (args, kwargs))]:
                for place, again in zip(made, tensors(func(*args, **kwargs)), strict=True):
                    assert place.shape == again.shape, func
                    place.copy_(again)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dictionaries."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from tensors(branch)


def _is_view(tensor: Tensor, given: Any) -> bool:
    places = {other.untyped_storage()._cdata for other in tensors(given)}
    return tensor.untyped_storage()._cdata in places
