"""A device -> the plain read that shows how fast its memory is: the ceiling beside which a kernel's GB/s stand.

On a CPU, reductions of a large float32 tensor, which do one operation for four bytes; of several the fastest is taken,
because all of them come near the memory's rate from below. On a card a copy, of which both directions count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

BUFFER_BYTES = 2**28
"""Past every cache, small beside any memory."""

CPU_READ_BYTES = 2**26
"""Of one read on a CPU, the next quarter of the buffer each time: the caches hold another one."""

TRIALS = 5


@dataclass(frozen=True)
class PlainRead:
    """Reads `n_bytes` of memory each time that `work` is called; a copy's writes are counted with them."""

    how: str
    n_bytes: int
    work: Callable[[], object]


def fastest_read(device: torch.device) -> PlainRead:
    """The plain read that takes the least time, with as many threads as torch uses now."""
    reads = _card_reads(device) if device.type != "cpu" else _cpu_reads()
    return max(reads, key=lambda read: read.n_bytes / min(seconds(read.work, device) for _ in range(TRIALS)))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes: on a card between two events of its stream, elsewhere by the clock."""
    if device.type == "cuda":
        return _seconds_on_card(work, device)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _seconds_on_card(work: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before.record()
        work()
        after.record()
        after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def _cpu_reads() -> Sequence[PlainRead]:
    parts = torch.split(torch.ones(BUFFER_BYTES // 4), CPU_READ_BYTES // 4)
    reductions: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": torch.sum,
        "largest": torch.max,
        "dot product": lambda part: torch.dot(part, part),
    }
    return [PlainRead(f"{name} of float32", CPU_READ_BYTES, _by_turns(of, parts)) for name, of in reductions.items()]


def _card_reads(device: torch.device) -> Sequence[PlainRead]:
    here = torch.zeros(BUFFER_BYTES, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    return [PlainRead("copy, read and written", 2 * BUFFER_BYTES, lambda: there.copy_(here))]


def _by_turns(of: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> Callable[[], Tensor]:
    turns = cycle(parts)
    return lambda: of(next(turns))
