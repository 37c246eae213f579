"""What memory a run really held, phase by phase and moment by moment; each way of counting has a name.

On CUDA the device's allocator knows its own peak, for free. On a CPU nobody knows, so `LiveBytes` can watch every
operator and count the storages alive: exact for tensors, blind to anything else, and slow, so it is asked for by
name. The resident set of the process is a third, separate figure.
"""

from __future__ import annotations

import traceback
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .allocator import CachingAllocator
from .profile import DEVICE_ALLOCATOR, TRACKED_LIVE_TENSORS, Moment

MOST_MOMENTS = 512
"""Of one turn: enough for a picture as wide as a screen."""


class Meter(Protocol):
    """Notes the peak of each phase, in bytes, and what was held from moment to moment, and says how it counts."""

    @property
    def kind(self) -> str: ...
    @property
    def peaks(self) -> Mapping[str, int]: ...
    @property
    def timeline(self) -> tuple[Moment, ...]: ...

    def begin(self, held_bytes: int) -> None:
        """A turn begins: forget the last one. So much on the device is the runtime's own by now."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Inside, what is held counts towards the phase's peak; a phase met again keeps its highest."""

    def mark(self, label: str, weights_bytes: int, kv_bytes: int) -> None:
        """A step named `label` of the phase is done, and of what is held now, so much is weights and so much KV
        caches."""


def open_meter(device: torch.device) -> Meter:
    """The meter that costs nothing here: the device's allocator on CUDA, none elsewhere."""
    return AllocatorMeter(device) if device.type == "cuda" else NoMeter()


class Timeline:
    """The moments of a turn in their order, `MOST_MOMENTS` at most: of neighbours that are one too many, the one that
    held more stays."""

    def __init__(self) -> None:
        self._moments: list[Moment] = []
        self._marks_per_moment = 1
        self._marks = 0
        self._weights_bytes = 0

    @property
    def moments(self) -> tuple[Moment, ...]:
        return tuple(self._moments)

    def mark(
        self, label: str, phase: str, weights_bytes: int, kv_bytes: int, *, peak_bytes: int, held_bytes: int
    ) -> None:
        """Add a moment; `peak_bytes` is the most that was held since the last one.

        Where weights have moved meanwhile, nobody knows which of them the peak included: `held_bytes`, what is held
        now, stands for it.
        """
        top_bytes = peak_bytes if weights_bytes == self._weights_bytes else held_bytes
        self._weights_bytes = weights_bytes
        activation_bytes = max(0, top_bytes - weights_bytes - kv_bytes)
        self._add(Moment(label, phase, weights_bytes, kv_bytes, activation_bytes))

    def _add(self, moment: Moment) -> None:
        if self._marks % self._marks_per_moment:
            moment = max(self._moments.pop(), moment, key=_total)
        elif len(self._moments) == MOST_MOMENTS:
            pairs = zip(self._moments[::2], self._moments[1::2], strict=True)
            self._moments = [max(pair, key=_total) for pair in pairs]
            self._marks_per_moment *= 2
        self._moments.append(moment)
        self._marks += 1


def _total(moment: Moment) -> int:
    return moment.total_bytes


class NoMeter:
    """Measures nothing, and says so."""

    kind = "not measured"

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.timeline: tuple[Moment, ...] = ()

    def begin(self, held_bytes: int) -> None:
        pass

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def mark(self, label: str, weights_bytes: int, kv_bytes: int) -> None:
        pass


class AllocatorMeter:
    """Peak bytes of tensors by torch's CUDA allocator: without the context, without what it caches, and without what
    was there before the turn and is not the runtime's: an application's own tensors, tables, libraries' workspaces.

    The allocator keeps one peak per device, so phases must not overlap, and a host application that reads the same
    peak will see it reset. `reserved_peaks` are the most that the allocator had reserved in each phase, whoever uses
    it.
    """

    kind = DEVICE_ALLOCATOR

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phase = ""
        self._others_bytes = 0
        self._timeline = Timeline()
        self.peaks: dict[str, int] = {}
        self.reserved_peaks: dict[str, int] = {}

    @property
    def timeline(self) -> tuple[Moment, ...]:
        return self._timeline.moments

    def begin(self, held_bytes: int) -> None:
        self.peaks.clear()
        self.reserved_peaks.clear()
        self._timeline = Timeline()
        self._others_bytes = max(0, torch.cuda.memory_allocated(self._device) - held_bytes)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phase = name
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            self._take_peak()

    def mark(self, label: str, weights_bytes: int, kv_bytes: int) -> None:
        peak_bytes, held_bytes = self._take_peak()
        self._timeline.mark(label, self._phase, weights_bytes, kv_bytes, peak_bytes=peak_bytes, held_bytes=held_bytes)

    def _take_peak(self) -> tuple[int, int]:
        """The peak since it was last taken, which counts towards the phase, and what is held now."""
        # One call for all three: torch makes a dictionary of some two hundred numbers at each, and this is every step.
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        allocated, reserved_bytes = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]["peak"]
        peak_bytes = self._own(allocated["peak"])
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), peak_bytes)
        self.reserved_peaks[self._phase] = max(self.reserved_peaks.get(self._phase, 0), reserved_bytes)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak_bytes, self._own(allocated["current"])

    def _own(self, n_bytes: int) -> int:
        return max(0, n_bytes - self._others_bytes)


@dataclass(frozen=True)
class Held:
    """A storage alive at a peak: the operator that made it, its first tensor's shape, and the line that called for it
    (of this package or of the modelling library)."""

    n_bytes: int
    operator: str
    shape: tuple[int, ...]
    dtype: str
    line: str


@dataclass(frozen=True)
class _Storage:
    """A storage that lives, and the bytes it counts for."""

    alive: weakref.ref[torch.UntypedStorage]
    n_bytes: int
    origin: Held | None


class ByOperator(TorchDispatchMode, ABC):
    """Sees every operator that computes or makes something, in `run`: one composed of others is taken apart, also where
    inference mode would run it whole."""

    def __init__(self) -> None:
        super().__init__()
        self._whole: set[Any] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._whole:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self._whole.add(func)
        return self.run(func, args, kwargs)

    @abstractmethod
    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator's result."""


class LiveBytes(ByOperator):
    """Counts the storages alive that operators made while it is entered, on devices of one type.

    Enter it around a whole run, in the thread that computes; `phase` only labels, and counts from the first storage
    made inside: what an earlier phase left and this one drops first is not its own. Storages from before do not count
    unless `track` announces them; views and in-place results share a storage and count once. Works on real, meta and
    fake tensors. Memory that operators use inside themselves is not seen. `explain` keeps what was held at each phase's
    peak, for `largest`; that takes twice the time. An `allocator` serves every storage that counts, and
    `reserved_peaks` are the most that it had reserved in each phase.
    """

    kind = TRACKED_LIVE_TENSORS

    def __init__(
        self, device_type: str = "cpu", *, explain: bool = False, allocator: CachingAllocator | None = None
    ) -> None:
        super().__init__()
        self.allocator = allocator
        self.reserved_peaks: dict[str, int] = {}
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peaks: dict[str, int] = {}
        self._device_type = device_type
        self._explain = explain
        self._phases: list[str] = []
        self._peak_since_mark_bytes = 0
        self._timeline = Timeline()
        self._storages: dict[int, _Storage] = {}
        self._risen: set[str] = set()
        self._at_peak: dict[str, tuple[Held, ...]] = {}

    @property
    def timeline(self) -> tuple[Moment, ...]:
        return self._timeline.moments

    def track(self, *tensors: Tensor) -> None:
        """Count tensors that were made before or outside."""
        for tensor in tensors:
            self._note(tensor, (), "before")

    def begin(self, held_bytes: int) -> None:
        self.peaks.clear()
        self.reserved_peaks.clear()
        self._timeline = Timeline()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        self.peaks.setdefault(name, 0)
        try:
            yield
        finally:
            self._rise()
            self._keep_peaks()
            self._phases.remove(name)

    def mark(self, label: str, weights_bytes: int, kv_bytes: int) -> None:
        peak_bytes, self._peak_since_mark_bytes = self._peak_since_mark_bytes, self.live_bytes
        phase = self._phases[-1] if self._phases else ""
        self._timeline.mark(label, phase, weights_bytes, kv_bytes, peak_bytes=peak_bytes, held_bytes=self.live_bytes)

    def largest(self, phase: str) -> tuple[Held, ...]:
        """What was held at a phase's peak, largest first; empty unless `explain` was asked for."""
        return tuple(sorted(self._at_peak.get(phase, ()), key=lambda held: held.n_bytes, reverse=True))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result, whose storages count if they are new."""
        result = func(*args, **kwargs)
        # `lift_fresh` is how `torch.tensor` announces what it has just made: its input is new, all others' is not.
        given = () if func is torch.ops.aten.lift_fresh.default else (args, kwargs)
        for tensor in _tensors(result):
            self._note(tensor, given, func)
        return result

    def _note(self, tensor: Tensor, given: tuple[Any, ...], operator: object) -> None:
        """Remember a storage seen for the first time until it dies; unless it was `given`, its bytes count."""
        if tensor.device.type != self._device_type or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        is_new = not any(_shares(other, key) for other in _tensors(given))
        n_bytes = storage.nbytes() if is_new else 0
        give_back = self.allocator.allocate(n_bytes) if self.allocator and n_bytes else None

        def forget(_: object) -> None:
            self._keep_peaks()
            del self._storages[key]
            self.live_bytes -= n_bytes
            if give_back:
                give_back()

        origin = _origin(tensor, n_bytes, operator) if self._explain and n_bytes else None
        self._storages[key] = _Storage(weakref.ref(storage, forget), n_bytes, origin)
        self.live_bytes += n_bytes
        if n_bytes:
            self._rise()

    def _rise(self) -> None:
        live_bytes = self.live_bytes
        self.peak_bytes = max(self.peak_bytes, live_bytes)
        self._peak_since_mark_bytes = max(self._peak_since_mark_bytes, live_bytes)
        for phase in self._phases:
            if live_bytes > self.peaks.get(phase, -1):
                self.peaks[phase] = live_bytes
                self._risen.add(phase)
            if self.allocator:
                self.reserved_peaks[phase] = max(self.allocator.reserved_bytes, self.reserved_peaks.get(phase, 0))

    def _keep_peaks(self) -> None:
        """Before something goes: if phases are at a new peak, this is what they hold there."""
        if self._explain and self._risen:
            held = tuple(storage.origin for storage in self._storages.values() if storage.origin)
            self._at_peak |= dict.fromkeys(self._risen, held)
        self._risen.clear()


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dictionaries: all that operators take and give."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from _tensors(branch)
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from _tensors(branch)


def _shares(tensor: Tensor, key: int) -> bool:
    return tensor.layout == torch.strided and tensor.untyped_storage()._cdata == key


def _origin(tensor: Tensor, n_bytes: int, operator: object) -> Held:
    frames = (frame for frame, _ in traceback.walk_stack(None))
    line = next((_line(frame) for frame in frames if _is_telling(frame.f_code.co_filename)), "outside")
    return Held(n_bytes, str(operator), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), line)


def _is_telling(file: str) -> bool:
    parts = Path(file).parts
    return ("lowvram" in parts or "transformers" in parts) and file != __file__


def _line(frame: Any) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


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
