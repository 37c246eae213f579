"""What torch's CUDA allocator reserves of a card for tensors that are made and dropped in some order, without a card.

A request takes the smallest free piece that holds it and leaves the rest of it free; where there is none, a new segment
is reserved. A segment goes back only as a whole: a small tensor that stays keeps all of it from others. Constants and
rules are those of torch's `c10/cuda/CUDACachingAllocator.cpp` (2.11 to 2.13) as it comes, for tensors of one stream;
where segments lie is the driver's choice, so ties between equal pieces may go another way there.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .budget import MIB

ROUND_BYTES = 512
"""Requests are rounded up to multiples of this (`kMinBlockSize`)."""

SMALL_BYTES = 1 * MIB
"""Requests up to here share segments among themselves (`kSmallSize`), each of `SMALL_SEGMENT_BYTES`."""

SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
"""A new segment for requests below `OWN_SEGMENT_BYTES`; larger ones get one of their size, in steps of 2 MiB."""

OWN_SEGMENT_BYTES = 10 * MIB
SEGMENT_STEP_BYTES = 2 * MIB


@dataclass(eq=False)
class _Piece:
    """A run of bytes of a segment, in use or free, between its neighbours there."""

    segment: int
    start: int
    n_bytes: int
    is_small: bool
    before: _Piece | None = None
    after: _Piece | None = None
    is_free: bool = False

    @property
    def rank(self) -> tuple[int, int, int]:
        """Free pieces are tried in this order."""
        return self.n_bytes, self.segment, self.start

    @property
    def is_whole_segment(self) -> bool:
        return self.before is None and self.after is None


class CachingAllocator:
    """The bookkeeping of one card's memory. `cap_bytes` is what may be reserved (None: anything).

    `retries` counts requests for which all that was wholly free had to go back first: each costs a card a
    synchronization. `short_bytes` is the most by which a request went beyond the cap even then, where a card would have
    run out; it is served all the same.
    """

    def __init__(self, cap_bytes: int | None = None) -> None:
        self.reserved_bytes = 0
        self.retries = 0
        self.short_bytes = 0
        self._cap_bytes = cap_bytes
        self._segments = 0
        self._free: dict[bool, list[_Piece]] = {True: [], False: []}
        """Those of small requests and the others, by rank."""

    def allocate(self, n_bytes: int) -> Callable[[], None]:
        """Serve a request; returns what takes it back, to be called once."""
        n_bytes = max(1, -(-n_bytes // ROUND_BYTES)) * ROUND_BYTES
        is_small = n_bytes <= SMALL_BYTES
        pieces = self._free[is_small]
        index = bisect_left(pieces, (n_bytes, -1, -1), key=lambda piece: piece.rank)
        piece = pieces.pop(index) if index < len(pieces) else self._reserve(segment_bytes(n_bytes), is_small)
        piece.is_free = False
        left_bytes = piece.n_bytes - n_bytes
        if left_bytes >= ROUND_BYTES if is_small else left_bytes > SMALL_BYTES:
            self._split(piece, n_bytes)
        return partial(self._take_back, piece)

    def empty_cache(self) -> None:
        """Give back the segments of which nothing is in use."""
        for is_small, pieces in self._free.items():
            self.reserved_bytes -= sum(piece.n_bytes for piece in pieces if piece.is_whole_segment)
            self._free[is_small] = [piece for piece in pieces if not piece.is_whole_segment]

    def _reserve(self, n_bytes: int, is_small: bool) -> _Piece:
        if self._over_cap_bytes(n_bytes) > 0:
            self.retries += 1
            self.empty_cache()
            self.short_bytes = max(self.short_bytes, self._over_cap_bytes(n_bytes))
        self._segments += 1
        self.reserved_bytes += n_bytes
        return _Piece(self._segments, 0, n_bytes, is_small)

    def _over_cap_bytes(self, n_bytes: int) -> int:
        return 0 if self._cap_bytes is None else self.reserved_bytes + n_bytes - self._cap_bytes

    def _split(self, piece: _Piece, n_bytes: int) -> None:
        rest = _Piece(piece.segment, piece.start + n_bytes, piece.n_bytes - n_bytes, piece.is_small, piece, piece.after)
        if piece.after:
            piece.after.before = rest
        piece.n_bytes, piece.after = n_bytes, rest
        self._offer(rest)

    def _take_back(self, piece: _Piece) -> None:
        """Join a piece to its free neighbours, and offer the whole."""
        if piece.after and piece.after.is_free:
            self._withdraw(piece.after)
            _absorb(piece, piece.after)
        if piece.before and piece.before.is_free:
            self._withdraw(piece.before)
            piece, after = piece.before, piece
            _absorb(piece, after)
        self._offer(piece)

    def _offer(self, piece: _Piece) -> None:
        piece.is_free = True
        insort(self._free[piece.is_small], piece, key=lambda piece: piece.rank)

    def _withdraw(self, piece: _Piece) -> None:
        pieces = self._free[piece.is_small]
        del pieces[bisect_left(pieces, piece.rank, key=lambda piece: piece.rank)]


def held_bytes(n_bytes: int) -> int:
    """What a run of weights takes of a card for as long as it stays: a segment, where it gets one of its own. Of that
    more than 1 MiB at the end would serve others; it is not counted on."""
    return segment_bytes(n_bytes) if n_bytes >= OWN_SEGMENT_BYTES else n_bytes


def segment_bytes(n_bytes: int) -> int:
    """The size of the segment that is reserved for a request that no free piece holds."""
    if n_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if n_bytes < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-n_bytes // SEGMENT_STEP_BYTES) * SEGMENT_STEP_BYTES


def _absorb(piece: _Piece, after: _Piece) -> None:
    """Make a piece and the one after it one."""
    piece.n_bytes += after.n_bytes
    piece.after = after.after
    if after.after:
        after.after.before = piece
