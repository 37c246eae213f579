"""Order between the two things a device does at once: computing with weights, and receiving the next ones.

Each is a lane; a lane keeps its own order, and waits for a point of the other only where it is told to. Nothing here
waits for the whole device. Where host and device share their memory there is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from enum import Enum
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

HOST_REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every device of the process."""


class Lane(Enum):
    """Where work is queued: COMPUTE is whatever stream the calling thread computes in, COPY one beside it."""

    COMPUTE = "compute"
    COPY = "copy"


Event = Any
"""A point in a lane, made and read by one kind of `Streams` only."""


class Streams(Protocol):
    """A device's lanes, and what it can do for host memory that it copies from."""

    @property
    def apart(self) -> bool:
        """Whether the device has memory of its own, filled while the host and the other lane go on."""

    def copying(self) -> AbstractContextManager[object]:
        """What is issued to the device inside goes to the copy lane."""

    def record(self, lane: Lane) -> Event:
        """The point at which all that was issued to `lane` so far is done."""

    def wait(self, lane: Lane, event: Event) -> None:
        """What is issued to `lane` from now on starts after `event`; the host goes on at once."""

    def host_wait(self, event: Event) -> None:
        """Return once `event` has been reached."""

    def here(self) -> Callable[[], AbstractContextManager[object]]:
        """Contexts for other threads: inside, they compute in the same stream as this thread does now."""

    def beside(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do `work`, which reads files and issues copies, while the caller goes on. The result, called, returns once it
        is done, and raises what it raised."""

    def lock_pages(self, pages: Tensor) -> bool:
        """Page-lock host memory [n] uint8, so that copies from it need not pass through the driver's own buffers;
        False if that is refused."""

    def unlock_pages(self, pages: Tensor) -> None:
        """Undo `lock_pages`; no copy from there may be under way."""


def open_streams(device: torch.device) -> Streams:
    """The lanes of `device`: CUDA's streams, elsewhere everything in the program's order."""
    return CudaStreams(device) if device.type == "cuda" else InOrder(apart=device.type not in ("cpu", "meta"))


class InOrder:
    """One thing after another, as the program says it."""

    def __init__(self, *, apart: bool) -> None:
        self.apart = apart

    def copying(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self, lane: Lane) -> Event:
        return lane

    def wait(self, lane: Lane, event: Event) -> None:
        pass

    def host_wait(self, event: Event) -> None:
        pass

    def here(self) -> Callable[[], AbstractContextManager[object]]:
        return nullcontext

    def beside(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return lambda: None

    def lock_pages(self, pages: Tensor) -> bool:
        return False

    def unlock_pages(self, pages: Tensor) -> None:
        raise AssertionError("no page was locked")


class CudaStreams:
    """A CUDA device's current stream for computing, and one of our own for copies.

    Weights that stay are ordered before the stream that was current when they came, and before that in which a later
    turn begins. Who changes placements from another thread does so in a context from `here`; who asks for an answer's
    next event has not chosen another stream since.
    """

    apart = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy = torch.cuda.Stream(device)

    def copying(self) -> AbstractContextManager[object]:
        return _in_stream(self._copy)

    def record(self, lane: Lane) -> Event:
        return self._stream(lane).record_event()

    def wait(self, lane: Lane, event: Event) -> None:
        self._stream(lane).wait_event(event)

    def host_wait(self, event: Event) -> None:
        event.synchronize()

    def here(self) -> Callable[[], AbstractContextManager[object]]:
        return partial(_in_stream, self._stream(Lane.COMPUTE))

    def beside(self, work: Callable[[], None]) -> Callable[[], None]:
        return in_a_thread(work)

    def lock_pages(self, pages: Tensor) -> bool:
        with torch.cuda.device(self._device):
            refused = torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.nbytes, HOST_REGISTER_PORTABLE)
        return self._accepted(refused)

    def unlock_pages(self, pages: Tensor) -> None:
        with torch.cuda.device(self._device):
            refused = torch.cuda.cudart().cudaHostUnregister(pages.data_ptr())
        self._accepted(refused)

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return self._copy if lane is Lane.COPY else torch.cuda.current_stream(self._device)

    def _accepted(self, error: object) -> bool:
        """Whether the runtime did as it was told."""
        if error == torch.cuda.cudart().cudaError.success:
            return True
        # A refusal stays pending until somebody asks, and the next kernel launch of this thread would raise it.
        with suppress(RuntimeError):
            torch.ones(1, device=self._device)
        return False


@contextmanager
def _in_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Compute in a stream. Its card is made the current one by itself: a thread that works on another card would come
    back to that from the stream, and so make a context there, some 300 MiB on a card that nobody chose."""
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


def in_a_thread(work: Callable[[], None]) -> Callable[[], None]:
    """Start `work` in a thread that ends with it; the result, called, waits for it and raises what it raised."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="lowvram-prefetch")
    done = thread.submit(work)
    thread.shutdown(wait=False)
    return done.result
