from __future__ import annotations

import queue

import numpy as np
import pytest
from media_files import sine
from push_to_talk import EnterKey, find_microphone, recordings

from lowvram import LowVRAMError


def test_a_press_is_told_at_once_and_waited_for_once():
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    told: queue.SimpleQueue[None] = queue.SimpleQueue()
    enter = EnterKey(iter(lines.get, "end"), lambda: told.put(None))
    lines.put("\n")
    told.get(timeout=10)
    assert enter.wait() and told.empty()
    lines.put("end")
    assert not enter.wait()


def test_what_is_said_between_two_presses_is_recorded(sound_device):
    sound_device.spoken = sine(16_000, 0.25)
    enter = EnterKey(iter(["\n"] * 4), lambda: None)
    first, second = recordings(enter)
    assert np.array_equal(first, sound_device.spoken) and np.array_equal(second, sound_device.spoken)


def test_a_machine_without_a_microphone_is_told_so(sound_device):
    sound_device.has_input = False
    with pytest.raises(LowVRAMError, match="there is no microphone: Error querying device -1"):
        find_microphone()
