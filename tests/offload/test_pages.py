from __future__ import annotations

import gc
import mmap

from hypothesis import given
from hypothesis import strategies as st
from toy_blocks import Locks

from lowvram.offload.pages import HostPages


@given(st.integers(1, 5 * mmap.PAGESIZE))
def test_whole_pages_are_locked_and_less_than_one_more_than_asked_for(n_bytes: int):
    streams = Locks()
    pages = HostPages(n_bytes, streams)
    assert pages.lock()
    ((address, locked_bytes),) = streams.locked.items()
    assert (pages.n_bytes, pages.run.data_ptr()) == (n_bytes, address)
    assert address % mmap.PAGESIZE == locked_bytes % mmap.PAGESIZE == 0
    assert n_bytes <= locked_bytes < n_bytes + mmap.PAGESIZE


def test_locking_twice_locks_once_and_unlocking_keeps_the_bytes():
    streams = Locks()
    pages = HostPages(100, streams)
    pages.run.fill_(7)
    assert pages.lock() and pages.lock() and pages.is_locked
    pages.unlock()
    pages.unlock()
    assert not streams.locked and not pages.is_locked
    assert set(pages.run.tolist()) == {7}


def test_a_refusal_leaves_ordinary_memory():
    pages = HostPages(100, Locks(limit_bytes=0))
    assert not pages.lock()
    assert not pages.is_locked


def test_pages_that_nobody_holds_any_more_are_unlocked():
    streams = Locks()
    pages = HostPages(100, streams)
    pages.lock()
    del pages
    gc.collect()
    assert not streams.locked
