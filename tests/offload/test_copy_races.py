"""The real code on watched streams: torch's own race detector is told who touches which memory in which lane, and what
waits for what. On a CPU everything then happens in order; whether it would on a device is what the detector says."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.cuda._sanitizer import EventHandler
from torch.utils._python_dispatch import TorchDispatchMode
from toy_blocks import Shelf, expected, phase, stack, walk

from lowvram.offload.placement import HostTier, Placement, Plan
from lowvram.offload.residency import Residency
from lowvram.offload.streams import Lane
from lowvram.offload.transfer import Transfer

HOST = "host"
STREAM = {Lane.COMPUTE: 0, Lane.COPY: 1, HOST: 2}
ANOTHER_STREAM = 3
CARD = torch.device("cpu", 0)
"""The watched device: host memory is asked for without an index."""

CELL_BYTES = 64
"""How finely memory is watched: staging hands out rooms at multiples of it, and torch's host memory begins at one."""

Site = tuple[str, int]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.getLogger("torch.cuda._sanitizer").setLevel(logging.WARNING)
    yield
    logging.getLogger("torch.cuda._sanitizer").setLevel(logging.NOTSET)


class Watch(TorchDispatchMode):
    """Streams that order nothing and report everything; `ignored` is a place in the code whose wait is left out.

    Memory counts as written by the compute lane when it is allocated and when it is freed: an allocator that serves
    that lane hands it out and takes it back without asking whether other lanes are done.
    """

    apart = True

    def __init__(self, ignored: Site | None = None) -> None:
        super().__init__()
        self.races: list[Any] = []
        self.sites: set[Site] = set()
        self._ignored = ignored
        self._detector = EventHandler()
        self._stream = dict(STREAM)
        for stream in (*STREAM.values(), ANOTHER_STREAM):
            self._detector._handle_stream_creation(stream)
        self._events = count(1)
        self._unused = count(1)
        self._names: dict[int, int] = {}
        self._on_card: set[int] = set()
        self._deaths: list[weakref.ref] = []
        self._lane = Lane.COMPUTE

    def choose_another_stream(self) -> None:
        """As an application may between two turns."""
        self._stream[Lane.COMPUTE] = ANOTHER_STREAM

    # What the code under test calls.

    @contextmanager
    def copying(self) -> Iterator[None]:
        before, self._lane = self._lane, Lane.COPY
        try:
            yield
        finally:
            self._lane = before

    def record(self, lane: Any) -> int:
        event = next(self._events)
        self._detector._handle_event_creation(event)
        self._detector._handle_event_record(event, self._stream[lane])
        return event

    def wait(self, lane: Any, event: int) -> None:
        if self._obeyed():
            self._detector._handle_event_wait(event, self._stream[lane])

    def host_wait(self, event: int) -> None:
        if self._obeyed():
            self._detector._handle_event_synchronization(event)

    def beside(self, work: Callable[[], None]) -> Callable[[], None]:
        """In order, as far as the host is concerned: the lanes are what is watched."""
        work()
        return lambda: None

    def lock_pages(self, pages: torch.Tensor) -> bool:
        return True

    def unlock_pages(self, pages: torch.Tensor) -> None:
        self._touch(HOST, "unlock", writes=self._cells(pages))

    def _obeyed(self) -> bool:
        """Note where in the code under test a wait is asked for, and whether it is to be left out."""
        frame = sys._getframe(2)
        if frame.f_code.co_name == "drain":
            frame = frame.f_back
        site = f"{type(frame.f_locals['self']).__name__}.{frame.f_code.co_name}", frame.f_lineno
        self.sites.add(site)
        return site != self._ignored

    # What the detector is told.

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten.empty.memory_format:
            self._born(result, on_card=kwargs.get("device") == CARD)
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            on_card = target.untyped_storage()._cdata in self._on_card
            self._touch(self._lane if on_card else HOST, "copy", self._cells(source), self._cells(target))
        if func is torch.ops.aten.clone.default:
            self._touch(self._lane, "use", self._cells(args[0]))
        return result

    def filled(self, buffer: memoryview) -> None:
        """The host has written to one of its buffers."""
        self._touch(HOST, "read", writes=self._cells(torch.frombuffer(buffer, dtype=torch.uint8)))

    def _born(self, tensor: torch.Tensor, on_card: bool) -> None:
        storage, owner = tensor.untyped_storage(), Lane.COMPUTE if on_card else HOST
        key, start = storage._cdata, storage.data_ptr()
        for cell in range(start // CELL_BYTES, -(-(start + storage.nbytes()) // CELL_BYTES)):
            self._names[cell] = next(self._unused)
        if on_card:
            self._on_card.add(key)
        cells = self._cells(tensor)
        self._touch(owner, "allocate", writes=cells)

        def died(_: object) -> None:
            self._on_card.discard(key)
            self._touch(owner, "free", writes=cells)

        self._deaths.append(weakref.ref(storage, died))

    def _cells(self, tensor: torch.Tensor) -> list[int]:
        """The detector's names for the memory of a contiguous tensor; memory that is allocated again has new ones."""
        start = tensor.data_ptr()
        cells = range(start // CELL_BYTES, -(-(start + tensor.nbytes) // CELL_BYTES))
        return [self._names[cell] for cell in cells if cell in self._names]

    def _touch(self, lane: Any, what: str, reads: Sequence[int] = (), writes: Sequence[int] = ()) -> None:
        if lane is not HOST:  # nothing is issued before the host has come to it
            self._detector._handle_event_wait(self.record(HOST), self._stream[lane])
        why = {cell: [what] for cell in [*reads, *writes]}
        self.races += self._detector._handle_kernel_launch(
            self._stream[lane], set(reads), set(writes), set(), what, why
        )


def plan(**tiers: HostTier) -> Plan:
    """A plan that matters for its host tiers alone, by component."""
    named = {f"{component}.{i}": tier for component, tier in tiers.items() for i in range(8)}
    return Plan("cuda", None, (), 1, 1, 0, 1, 1, 1, host_tiers=named)


class BrokenOffError(Exception):
    """A walk that ends inside of a block."""


def turn(watch: Watch, layers: int = 5, kept: int = 1, breaks: Sequence[int] = (2,)) -> None:
    """Much of what can happen in a turn and after it, with every byte checked at every use."""
    shelf = Shelf(on_write=watch.filled)
    with watch:
        transfer = Transfer(shelf, CARD, watch, staging_bytes=256)
        widths = [40 + 16 * (i % 3) for i in range(layers)]
        components = {  # stored in 16 bits, since the watched device is a CPU: what needs no cast would skip staging
            "thinker": stack(shelf, transfer, "thinker", [*widths, 8], torch.float16),
            "talker": stack(shelf, transfer, "talker", [*widths, 100], torch.float16),
            "head": stack(shelf, transfer, "head", [150], torch.float16),
        }
        residency = Residency(components, transfer)

        def check(component: str) -> None:
            uses = residency.component(component)
            assert walk(uses) == [expected(component, i) for i in range(len(uses))]

        thinking = phase({"thinker": kept}, thinker=Placement.STREAMED, head=Placement.RESIDENT)
        list(residency.enter(thinking))
        for _ in range(2):
            check("thinker")
            check("head")
        for stop in breaks:
            with suppress(BrokenOffError):
                for i, use in enumerate(residency.component("thinker")):
                    with use as linear:
                        linear.weight.clone()
                        if i == stop:
                            raise BrokenOffError
            check("thinker")
        both = phase(thinker=Placement.STREAMED, talker=Placement.STREAMED, head=Placement.RESIDENT)
        for tiers in (plan(talker=HostTier.PINNED, head=HostTier.PAGEABLE), plan(talker=HostTier.PAGEABLE), plan()):
            residency.prepare(tiers)
            list(residency.enter(both))
            check("talker")
            check("head")
            check("thinker")
        residency.prepare(plan(talker=HostTier.PINNED))
        list(residency.enter(phase(talker=Placement.STREAMED)))
        check("talker")
        residency.prepare(plan())
        residency.prepare(plan(talker=HostTier.PINNED))
        check("talker")
        residency.release()
        for tiers in (plan(), plan(thinker=HostTier.PINNED, talker=HostTier.PAGEABLE)):
            residency.prepare(tiers)
            asking = replace(phase(head=Placement.PHASE), prefetch_bytes=10**6)
            thinking = phase({"thinker": 2}, thinker=Placement.STREAMED, talker=Placement.PHASE)
            list(residency.enter(asking, thinking))
            check("head")
            list(residency.enter(thinking))
            check("thinker")
            check("talker")
            list(residency.enter(asking, thinking))
            list(residency.enter(asking))  # what came ahead goes unused
            check("head")
        residency.release()
        residency.prepare(plan())
        next(residency.enter(phase(head=Placement.PHASE, talker=Placement.STREAMED)))
        list(residency.enter(phase(talker=Placement.PHASE)))
        transfer.release()
        check("talker")
        residency.release()
        keeping = phase(head=Placement.RESIDENT)
        list(residency.enter(keeping))
        residency.leave()
        watch.choose_another_stream()
        residency.prepare(plan())
        list(residency.enter(keeping))
        check("head")
        residency.release()
        assert (residency.live_bytes, residency.host_bytes) == (0, 0)


def test_nothing_races():
    watch = Watch()
    turn(watch)
    assert watch.races == []
    assert not watch._on_card


@settings(max_examples=10, deadline=None)
@given(st.integers(3, 7), st.integers(0, 4), st.lists(st.integers(0, 6), max_size=3))
def test_nothing_races_however_many_layers_stay_and_wherever_walks_break_off(layers: int, kept: int, breaks: list[int]):
    watch = Watch()
    turn(watch, layers, min(kept, layers), breaks)
    assert watch.races == []


def test_leaving_out_any_single_wait_is_a_race():
    watch = Watch()
    turn(watch)
    assert {function for function, _ in watch.sites} == {
        "HostCopies.drop",
        "HostCopies.prepare",
        "Prefetch.__init__",
        "Prefetch.take",
        "Residency._onload",
        "Residency.prepare",
        "Ring.begin",
        "Ring.close",
        "Ring.load_next",
        "Staging._turn",
        "Transfer.release",
    }
    for site in watch.sites:
        faulty = Watch(ignored=site)
        turn(faulty)
        assert faulty.races, f"the wait in {site} could be left out"
