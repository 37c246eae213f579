"""The CUDA allocator's rules, without a card. tests/test_cuda.py holds them against the real one where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.offload.allocator import CachingAllocator, segment_bytes
from lowvram.offload.budget import MIB

LARGE = 64 * MIB


@pytest.mark.parametrize(
    ("request_bytes", "reserved_bytes"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (63 * MIB, LARGE),
    ],
)
def test_the_first_request_reserves_a_segment_for_its_size(request_bytes: int, reserved_bytes: int):
    allocator = CachingAllocator()
    allocator.allocate(request_bytes)
    assert allocator.reserved_bytes == reserved_bytes


def test_small_requests_share_a_segment():
    allocator = CachingAllocator()
    for _ in range(2 * MIB // 512):
        allocator.allocate(1)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(1)
    assert allocator.reserved_bytes == 4 * MIB


def test_a_large_piece_is_divided_only_where_more_than_a_mebibyte_is_left():
    for rest_bytes, reserved_bytes in ((MIB, 128 * MIB), (MIB + 512, LARGE)):
        allocator = CachingAllocator()
        allocator.allocate(LARGE)()
        allocator.allocate(LARGE - rest_bytes)
        allocator.allocate(MIB + 1 if rest_bytes > MIB else LARGE)
        assert allocator.reserved_bytes == reserved_bytes


def test_a_request_takes_the_smallest_piece_that_holds_it():
    allocator = CachingAllocator()
    give_back = [allocator.allocate(n * MIB) for n in (100, 30, 60)]
    for each in give_back:
        each()
    allocator.allocate(29 * MIB)
    allocator.allocate(99 * MIB)
    allocator.allocate(59 * MIB)
    assert allocator.reserved_bytes == 190 * MIB


def test_neighbours_that_are_free_become_one_piece_again():
    allocator = CachingAllocator()
    allocator.allocate(LARGE)()
    first, second, third = (allocator.allocate(size * MIB) for size in (20, 30, 14))
    first()
    third()
    second()
    allocator.allocate(LARGE)
    assert allocator.reserved_bytes == LARGE


def test_a_small_tensor_that_stays_keeps_its_whole_segment():
    allocator = CachingAllocator()
    allocator.allocate(LARGE)()
    give_back = allocator.allocate(2 * MIB)
    allocator.empty_cache()
    assert allocator.reserved_bytes == LARGE
    give_back()
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_at_the_cap_what_is_wholly_free_goes_back_first():
    allocator = CachingAllocator(cap_bytes=100 * MIB)
    allocator.allocate(60 * MIB)()
    allocator.allocate(80 * MIB)
    assert (allocator.reserved_bytes, allocator.retries, allocator.short_bytes) == (80 * MIB, 1, 0)


def test_beyond_the_cap_it_says_by_how_much():
    allocator = CachingAllocator(cap_bytes=100 * MIB)
    allocator.allocate(60 * MIB)
    allocator.allocate(50 * MIB)
    assert (allocator.retries, allocator.short_bytes) == (1, 10 * MIB)


SIZES = st.one_of(st.integers(1, 3 * MIB), st.integers(1, 80 * MIB))


@given(st.lists(st.tuples(SIZES, st.integers(0, 5))))
def test_what_is_reserved_covers_what_is_in_use_and_goes_back_whole(steps: list[tuple[int, int]]):
    """Each step makes a tensor and drops an older one, or none."""
    allocator = CachingAllocator()
    alive: list[tuple[int, Callable[[], None]]] = []
    for n_bytes, older in steps:
        alive.append((n_bytes, allocator.allocate(n_bytes)))
        if older < len(alive):
            alive.pop(older)[1]()
        assert allocator.reserved_bytes >= sum(used_bytes for used_bytes, _ in alive)
    for _, give_back in alive:
        give_back()
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


@given(st.lists(SIZES, min_size=1))
def test_what_was_held_once_is_held_again_without_reserving_more(sizes: list[int]):
    allocator = CachingAllocator()
    for give_back in [allocator.allocate(n_bytes) for n_bytes in sizes]:
        give_back()
    reserved_bytes = allocator.reserved_bytes
    for n_bytes in sizes:
        allocator.allocate(n_bytes)()
    assert allocator.reserved_bytes == reserved_bytes <= sum(map(segment_bytes, sizes))
