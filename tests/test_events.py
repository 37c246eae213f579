from __future__ import annotations

import pickle

import numpy as np
import pytest

from lowvram.errors import BudgetExceededError, LowVRAMError, MediaError
from lowvram.events import AudioChunk, Event, Finished, Progress, TextDelta

CHUNK = AudioChunk(np.linspace(-1, 1, 480, dtype=np.float32), 24_000, 0.96)
FINISHED = Finished("ab", (1, 2), (), 7, "stop", None, 0.0, 24_000, timings={"total": 1.5})


def test_sound_can_be_compared_with_other_events_and_kept_in_a_set():
    other = AudioChunk(CHUNK.samples.copy(), 24_000, 0.96)
    assert [event == CHUNK for event in (CHUNK, other, TextDelta("a"), None)] == [True, False, False, False]
    assert len({CHUNK, other, TextDelta("a"), TextDelta("a")}) == 3


@pytest.mark.parametrize("event", [Progress("load", 1, 2, "bytes"), TextDelta("é"), FINISHED])
def test_an_event_reaches_another_process_as_it_is(event: Event):
    assert pickle.loads(pickle.dumps(event)) == event


def test_sound_reaches_another_process_as_it_is():
    received = pickle.loads(pickle.dumps(CHUNK))
    assert np.array_equal(received.samples, CHUNK.samples) and received.start_s == CHUNK.start_s


@pytest.mark.parametrize(
    "error",
    [
        MediaError("no such file", path="a.mp4", limit="x", hint="look again"),
        BudgetExceededError("full", phase="think", needed_bytes=2, available_bytes=1, hint="less"),
    ],
)
def test_an_error_reaches_another_process_with_all_it_says(error: LowVRAMError):
    received = pickle.loads(pickle.dumps(error))
    assert (type(received), str(received), vars(received)) == (type(error), str(error), vars(error))
