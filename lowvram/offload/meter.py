"""What memory a run really held, phase by phase, as far as this machine can tell; each way of counting has a name.

On CUDA the device's allocator knows its own peak, for free. On a CPU nobody knows, so `LiveBytes` can watch every
operator and count the storages alive: exact for tensors, blind to anything else, and slow, so it is asked for by
name. The resident set of the process is a third, separate figure.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .profile import DEVICE_ALLOCATOR, TRACKED_LIVE_TENSORS


class Meter(Protocol):
    """Notes the peak of each phase, in bytes, and says how it counts."""

    @property
    def kind(self) -> str: ...
    @property
    def peaks(self) -> Mapping[str, int]: ...

    def begin(self) -> None:
        """A turn begins: forget the peaks of the last one."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Inside, what is held counts towards the phase's peak; a phase met again keeps its highest."""


def open_meter(device: torch.device) -> Meter:
    """The meter that costs nothing here: the device's allocator on CUDA, none elsewhere."""
    return AllocatorMeter(device) if device.type == "cuda" else NoMeter()


class NoMeter:
    """Measures nothing, and says so."""

    kind = "not measured"

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    def begin(self) -> None:
        pass

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield


class AllocatorMeter:
    """Peak bytes of tensors by torch's CUDA allocator: without the context, and without what it caches.

    The allocator keeps one peak per device, so phases must not overlap, and a host application that reads the same
    peak will see it reset.
    """

    kind = DEVICE_ALLOCATOR

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peaks: dict[str, int] = {}

    def begin(self) -> None:
        self.peaks.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            peak_bytes = torch.cuda.max_memory_allocated(self._device)
            self.peaks[name] = max(self.peaks.get(name, 0), peak_bytes)


class LiveBytes(TorchDispatchMode):
    """Counts the storages alive that operators made while it is entered, on devices of one type.

    Enter it around a whole run, in the thread that computes; `phase` only labels. Storages from before do not count
    unless `track` announces them; views and in-place results share a storage and count once. Works on real, meta and
    fake tensors. Memory that operators use inside themselves is not seen.
    """

    kind = TRACKED_LIVE_TENSORS

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peaks: dict[str, int] = {}
        self._device_type = device_type
        self._phases: list[str] = []
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def track(self, *tensors: Tensor) -> None:
        """Count tensors that were made before or outside."""
        for tensor in tensors:
            self._note(tensor, counts=True)

    def begin(self) -> None:
        self.peaks.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        self.peaks[name] = max(self.peaks.get(name, 0), self.live_bytes)
        try:
            yield
        finally:
            self._phases.remove(name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # `lift_fresh` is how `torch.tensor` announces what it has just made: its input is new, all others' is not.
        if func is not torch.ops.aten.lift_fresh.default:
            for tensor in _tensors((args, kwargs)):
                self._note(tensor, counts=False)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._note(tensor, counts=True)
        return result

    def _note(self, tensor: Tensor, *, counts: bool) -> None:
        """Remember a storage seen for the first time until it dies; if it `counts`, so do its bytes."""
        if tensor.device.type != self._device_type or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        n_bytes = storage.nbytes() if counts else 0

        def forget(_: object) -> None:
            del self._storages[key]
            self.live_bytes -= n_bytes

        self._storages[key] = weakref.ref(storage, forget)
        self.live_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        for phase in self._phases:
            self.peaks[phase] = max(self.peaks[phase], self.live_bytes)


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class ProcessBytes:
    """The process's resident set: now, and the highest since it started (None where the system does not say)."""

    resident_bytes: int
    peak_resident_bytes: int | None


def process_bytes() -> ProcessBytes:
    """Read the resident set, shared pages of files included."""
    import psutil

    memory = psutil.Process().memory_info()
    return ProcessBytes(memory.rss, getattr(memory, "peak_wset", None) or _peak_resident_bytes())


def _peak_resident_bytes() -> int | None:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux, bytes on macOS
