"""A simulated accelerator: a torch device that computes with real numbers, has a capacity, and counts its bytes.

Its tensors wrap CPU tensors, so every operator gives the CPU's own bits; what is simulated is the memory. A storage
counts from the operator that makes it until its last view is gone, to the byte; scratch memory inside an operator is
not seen. Operators that mix devices fail as on CUDA, and allocations fail on request.

The device is torch's `lazy`: a type with a device guard and without kernels, so that a card can move in for a test and
leave nothing behind. PrivateUse1, the official door, opens once per process and for good, and `torch.accelerator` and
pinned memory are its own from then on, in every other test too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("lazy:0")
HOST = torch.device("cpu")
BRANCHES = frozenset((list, tuple, dict))

COPIES = ("aten::copy_", "aten::_copy_from")
"""Operators between devices; `_to_copy` is one too, but has a single tensor."""

INDEXED = ("aten::index", "aten::index_put", "aten::index_put_")
"""Operators that take indices from the host, as on CUDA."""


class Card:
    """The simulated card's memory: `capacity_bytes`, and the bytes of all storages alive on it, now and at most.

    `allocations` counts attempts, `refusals` those of them that ran out of memory.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self.allocations = 0
        self.refusals = 0
        self._actions: dict[int, Callable[[], object]] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._lock = RLock()  # storages die in whichever thread lets go of them

    def at(self, nth: int, action: Callable[[], object]) -> None:
        """Do this in the middle of a computation: just before the `nth` allocation from now (the next is 1)."""
        self._actions[self.allocations + nth] = action

    def fail(self, nth: int) -> None:
        """Let the `nth` allocation from now run out of memory, and only that one."""
        self.at(nth, lambda: self._refuse(0))

    def shrink(self, nth: int, capacity_bytes: int) -> None:
        """Let another program take memory just before the `nth` allocation from now: so much is left in all."""
        self.at(nth, lambda: setattr(self, "capacity_bytes", capacity_bytes))

    def restore(self, capacity_bytes: int) -> None:
        """Have this capacity, and forget what has not happened yet."""
        self._actions.clear()
        self.capacity_bytes = capacity_bytes

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it dies, if it is new; raises torch.OutOfMemoryError if it does not fit."""
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._storages or not n_bytes:
            return
        self.allocations += 1
        self._actions.pop(self.allocations, lambda: None)()
        if self.live_bytes + n_bytes > self.capacity_bytes:
            self._refuse(n_bytes)

        def free(_: object) -> None:
            with self._lock:
                del self._storages[key]
                self.live_bytes -= n_bytes

        with self._lock:
            self._storages[key] = weakref.ref(storage, free)
            self.live_bytes += n_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _refuse(self, n_bytes: int) -> None:
        self.refusals += 1
        raise torch.OutOfMemoryError(
            f"simulated card: allocation {self.allocations} asks for {n_bytes} bytes,"
            f" {self.live_bytes} of {self.capacity_bytes} are in use"
        )


class CardTensor(Tensor):
    """A tensor on a card: `raw` is the CPU tensor that holds its values."""

    raw: Tensor
    card: Card

    @staticmethod
    def __new__(cls, raw: Tensor, card: Card) -> CardTensor:
        card.hold(raw.untyped_storage())
        with torch._C._InferenceMode(False):  # a view made inside of that mode may have a base from outside
            made: CardTensor = torch.Tensor._make_wrapper_subclass(
                cls, raw.shape, raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=DEVICE
            )
        made.raw, made.card = raw, card
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _compute(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CardTensor({self.raw!r})"


@contextmanager
def simulated_card(capacity_bytes: int) -> Iterator[Card]:
    """A card at `DEVICE`, in all threads, while entered; its tensors may outlive it. There can be one at a time."""
    card = Card(capacity_bytes)
    with _only_one(), torch.library._scoped_library("aten", "IMPL") as library:
        for name in ("empty.memory_format", "empty_strided"):
            library.impl(name, _maker(name, card), "Lazy")
        library.impl("_copy_from", _copy_from, "Lazy")
        library.impl("scaled_dot_product_attention", _fused_attention, "AutogradLazy")
        yield card


_slot = Lock()


@contextmanager
def _only_one() -> Iterator[None]:
    assert _slot.acquire(blocking=False), "there is a simulated card already"
    try:
        yield
    finally:
        _slot.release()


def _maker(name: str, card: Card) -> Callable[..., Tensor]:
    packet, _, overload = name.partition(".")
    func = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return lambda *args, **kwargs: _compute(func, args, kwargs, card)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What a copy comes down to where torch itself makes it, as in `torch.tensor(values, device=...)`."""
    _raw(target).copy_(_raw(source))
    return target


def _fused_attention(*args: Any, **kwargs: Any) -> Any:
    """Attention as one kernel, as real devices have it; torch would take it apart on a device it does not know."""
    return _compute(torch.ops.aten.scaled_dot_product_attention.default, args, kwargs)


def _compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], card: Card | None = None) -> Any:
    """Run an operator on the CPU tensors inside; what it makes is the card's, unless it was to go elsewhere.

    `card` is that of the tensors, where there are any.
    """
    tensors: list[Tensor] = []
    targets: list[str] = []

    def to_host(leaf: Any) -> Any:
        kind = type(leaf)
        if kind is CardTensor:
            tensors.append(leaf)
            return leaf.raw
        if kind is torch.device:
            targets.append(leaf.type)
            return HOST if leaf.type == DEVICE.type else leaf
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        return leaf

    host_args, host_kwargs = _map(to_host, args), _map(to_host, kwargs)
    _refuse_mixture(func, tensors)
    result = func(*host_args, **host_kwargs)
    if targets and targets[0] != DEVICE.type:
        return result.clone() if targets[0] == "cpu" else result  # a copy to the host never shares the card's memory
    there = {id(_raw(tensor)): tensor for tensor in tensors}
    card = card or next(tensor.card for tensor in tensors if isinstance(tensor, CardTensor))
    return _map(lambda leaf: _to_card(leaf, there, card), result)


def _refuse_mixture(func: Any, tensors: Sequence[Tensor]) -> None:
    strangers = [tensor for tensor in tensors if type(tensor) is not CardTensor and tensor.dim()]
    if not strangers or len(strangers) == len(tensors):
        return
    name = func.overloadpacket._qualified_op_name
    if name not in COPIES and not (name in INDEXED and isinstance(tensors[0], CardTensor)):
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found {DEVICE} and {strangers[0].device}"
        )


def _to_card(leaf: Any, there: Mapping[int, Tensor], card: Card) -> Any:
    """A result on the card; what was changed in place stays the tensor it was."""
    if not isinstance(leaf, Tensor):
        return leaf
    return there[id(leaf)] if id(leaf) in there else CardTensor(leaf, card)


def _raw(tensor: Tensor) -> Tensor:
    return tensor.raw if isinstance(tensor, CardTensor) else tensor


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    """`change` at each leaf of nested lists, tuples and dicts: what operators take and return."""
    kind = type(tree)
    if kind is list or kind is tuple:
        return kind([_map(change, item) if type(item) in BRANCHES else change(item) for item in tree])
    if kind is dict:
        return {key: _map(change, item) for key, item in tree.items()}
    return change(tree)
