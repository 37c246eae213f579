"""What a stream carries: taken back as a whole, and no more than it must."""

import torch

from lowvram.token2wav.carry import Carry, Queue


def frames(first: int, after: int) -> torch.Tensor:
    """[1, F, 2], numbered."""
    return torch.arange(first, after, dtype=torch.float32)[None, :, None].expand(1, -1, 2).clone()


def test_frames_leave_a_queue_in_the_order_they_came() -> None:
    queue = Queue(Carry())
    queue.put(frames(0, 5))
    queue.put(frames(5, 9))
    assert [queue.take(n)[0][0, :, 0].tolist() for n in (2, 0, 7)] == [[0, 1], [], [2, 3, 4, 5, 6, 7, 8]]
    assert queue.frames == 0


def test_the_last_frames_can_be_dropped() -> None:
    queue = Queue(Carry())
    queue.put(frames(0, 5))
    queue.drop_last(2)
    assert queue.take_all()[0][0, :, 0].tolist() == [0, 1, 2]


def test_what_waits_holds_no_more_memory_than_its_own() -> None:
    carry = Carry()
    queue = Queue(carry)
    queue.put(frames(0, 1000), frames(0, 1000))
    queue.take(990)
    assert carry.n_bytes == 2 * 10 * 2 * 4


def test_frames_stored_as_a_view_hold_their_own_memory_only() -> None:
    carry = Carry()
    Queue(carry).store(frames(0, 1000)[:, :3])
    assert carry.n_bytes == 3 * 2 * 4


def test_a_snapshot_brings_back_every_cell() -> None:
    carry = Carry()
    queue, count = Queue(carry), carry.cell(3)
    queue.put(frames(0, 5))
    snapshot = carry.snapshot()
    queue.take(4)
    count.value += 1
    carry.restore(snapshot)
    assert (queue.frames, count.value) == (5, 3)


def test_a_snapshot_copies_no_tensor() -> None:
    carry = Carry()
    queue = Queue(carry)
    (held,) = queue.put(frames(0, 5))
    ((kept,),) = carry.snapshot()
    assert kept is held
