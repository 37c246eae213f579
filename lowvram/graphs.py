"""A stage's decode steps: captured once and repeated where its weights stay in place, computed one by one elsewhere.

A decode step is a thousand kernels, most of which take less time than starting them does. A CUDA graph starts them all
at once, on the addresses and in the shapes with which they were captured: so a step reads its row, its position and its
place in the cache from tensors of its own, and stays capturable for a stretch of positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .kv_cache import KVCache, Stretch

log = logging.getLogger(__name__)

STRETCH_TOKENS = 256
"""Steps for which one capture serves. To capture costs about what one of them does uncaptured; the longer a stretch,
the more keys each of its steps reads only to hide them."""

MOST_BROKEN = 3
"""Captures that may be refused before no more are tried: what a broken one had allocated, torch 2.13 keeps for good."""

T = TypeVar("T")

Compute = Callable[[Tensor, Tensor, KVCache | Stretch], T]
"""What comes, on the device, of a row [1, H] at position_ids [3, 1], which joins the cache. Both are on the host, or on
the device already."""

Step = Callable[[Tensor, int], T]
"""The same for a row [1, H] on the host, at a position that is one for all three axes. What comes of it is good until
the next step."""


class Stepping(Protocol):
    """How a stage computes its decode steps, one after another, on `device`."""

    def __call__(self, compute: Compute[T], cache: KVCache, device: torch.device) -> Step[T]: ...


def one_by_one(compute: Compute[T], cache: KVCache, device: torch.device) -> Step[T]:
    """The plainest way: nothing is captured."""
    return lambda row, position: compute(row, torch.full((3, 1), position, device="cpu"), cache)


class Recorder(Protocol):
    """Captures what a device is told to do."""

    def capture(self, step: Callable[[], T]) -> Callable[[], T]:
        """`step` again, with the same tensors for the same results each time. It has been computed once before, and is
        not computed now."""


class CudaRecorder:
    """Captures CUDA graphs, on a stream apart. Other threads may use the card meanwhile; one that waits for all of it
    breaks the capture."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._broken = 0

    def capture(self, step: Callable[[], T]) -> Callable[[], T]:
        """Where the card refuses, the step itself: that costs time, never the answer."""
        if self._broken >= MOST_BROKEN:
            return step
        try:
            graph = torch.cuda.CUDAGraph()
            with _capturing, torch.cuda.device(self._device), self._into(graph):
                result = step()
        except RuntimeError as error:
            self._broken += not isinstance(error, torch.OutOfMemoryError)  # after which torch tidies up
            reason = str(error).splitlines()[0]
            later = ", as all later ones are" if self._broken >= MOST_BROKEN else ""
            log.warning("a decode step cannot be captured, and is started kernel by kernel%s: %s", later, reason)
            return step

        def again() -> T:
            graph.replay()
            return result

        return again

    @contextmanager
    def _into(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        in_use = torch.cuda.current_stream(self._device)
        stream, pool = _capture_stream(self._device), torch.cuda.graph_pool_handle()
        try:
            # The outer context puts the stream in use back, which torch's own leaves as it is where a capture fails.
            with (
                torch.cuda.stream(in_use),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                yield
            # Nothing was computed there, but torch's race detector takes what is captured for what is computed.
            in_use.wait_stream(stream)
        except RuntimeError:
            # Torch 2.11 and 2.12 go on as if a broken capture had no end, and give no memory back from then on.
            with suppress(RuntimeError, AttributeError):  # it is over already, or nothing ends it here
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise


_capturing = Lock()
"""A process can only make one capture at a time."""


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The same for every capture: cuBLAS keeps a workspace for each stream that it has worked on.

    Torch has 32 streams of a priority and hands them out in turns: one of the usual priority would sooner or later be
    somebody's stream for copies, too, and what is issued there during a capture breaks it.
    """
    return torch.cuda.Stream(device, priority=-1)


@cache
def open_recorder(device: torch.device) -> Recorder | None:
    """What captures on this device, if anything does: one for the process, which remembers what the card refused."""
    return CudaRecorder(device) if device.type == "cuda" else None


class CapturedSteps:
    """Decode steps that are captured, a stretch of positions at a time, while the stage's weights stay in place.

    `whereabouts` tells where the weights are, or None when not all of them stay there from one step to the next: then
    steps are computed one by one. `drop` gives back what a capture holds; the next step begins another.
    """

    def __init__(self, recorder: Recorder, whereabouts: Callable[[], Hashable | None]) -> None:
        self._recorder = recorder
        self._whereabouts = whereabouts
        self._captured: _Captured[Any] | None = None

    def __call__(self, compute: Compute[T], cache: KVCache, device: torch.device) -> Step[T]:
        plain = one_by_one(compute, cache, device)

        def step(row: Tensor, position: int) -> T:
            weights_at = self._whereabouts()
            if self._captured is None or not self._captured.goes_on(weights_at):
                self.drop()  # before the next one, so that two never hold memory at once
                if weights_at is None:
                    return plain(row, position)
                self._captured = _Captured(
                    self._recorder, compute, cache, weights_at, torch.empty_like(row, device=device)
                )
            result: T = self._captured.step(row, position)
            return result

        return step

    def drop(self) -> None:
        """Hold nothing, before weights or caches go elsewhere."""
        self._captured = None


class _Captured(Generic[T]):
    """One stretch of steps: the first is computed as it is, and captured for the others. `row` [1, H] is theirs."""

    def __init__(
        self, recorder: Recorder, compute: Compute[T], cache: KVCache, weights_at: Hashable, row: Tensor
    ) -> None:
        self._recorder = recorder
        self._compute = compute
        self._cache = cache
        self._weights_at = weights_at
        self._stretch = cache.stretch(STRETCH_TOKENS)
        self._row = row
        self._place = torch.empty(2, dtype=torch.int64, device=row.device)
        self._again: Callable[[], T] | None = None

    def goes_on(self, weights_at: Hashable | None) -> bool:
        """Whether the next step is one of these: the same weights, and a position of the stretch."""
        return self._weights_at == weights_at and self._cache.goes_on_in(self._stretch)

    def step(self, row: Tensor, position: int) -> T:
        slot = self._cache.get_seq_length() - self._stretch.start
        # From pageable memory such a copy returns once it is staged: the host may forget what it copied from.
        self._row.copy_(row, non_blocking=True)
        self._place.copy_(torch.tensor([position, slot], device="cpu"), non_blocking=True)
        if self._again is None:
            result = self._once()  # also loads the kernels, which a capture cannot
            self._again = self._recorder.capture(self._once)
        else:
            result = self._again()
        self._cache.advance()
        return result

    def _once(self) -> T:
        position, slot = self._place.split(1)
        self._stretch.begin(slot)
        return self._compute(self._row, position.expand(3, 1), self._stretch)
