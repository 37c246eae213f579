"""Encoders that run out of room: what failed is tried again in the smaller chunks of another plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_turn import MEDIA, MESSAGES, SAMPLING, SPEECH, STAGES, answer, plan_of, run
from torch import Tensor

from lowvram import encoders
from lowvram.encoders import AudioTower
from lowvram.offload.budget import Budget
from lowvram.recall import Reading
from lowvram.room import Control
from lowvram.runtime import OmniRuntime
from lowvram.turn import Request, Turn


def several_frames(patches: Tensor, grid: tuple[int, int, int], *_: object) -> bool:
    return grid[0] > 1


def several_windows(mel: Tensor, tower: AudioTower, *_: object) -> bool:
    return mel.shape[1] > tower.hearing.window_frames


@pytest.mark.parametrize(
    ("name", "is_too_much"), [("_see", several_frames), ("_hear", several_windows)], ids=["video", "sound"]
)
def test_a_chunk_for_which_there_is_no_room_is_cut_smaller(
    omni: OmniRuntime, name: str, is_too_much: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
):
    least = plan_of([STAGES], vision_chunk_patches=1, audio_chunk_windows=1)
    encode, refused = getattr(encoders, name), list[bool]()
    whole, samples = answer(run(omni, plan_of([STAGES])))

    def in_little_room(*inputs: Any) -> Tensor:
        refused.append(is_too_much(*inputs))
        if refused[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        features: Tensor = encode(*inputs)
        return features

    monkeypatch.setattr(encoders, name, in_little_room)
    with omni.preprocessor.open(MESSAGES, MEDIA) as prompt:
        voice = omni._voices["Chelsie"]
        request = Request(Reading(prompt.inputs), plan_of([STAGES]), lambda *_: least, SAMPLING, SPEECH, voice)
        cut, cut_samples = answer(Turn(omni._machine, request, Control(Budget()), started_s=0.0).run())
    assert any(refused) and not refused[-1]
    assert (cut.text_ids, cut.codec_ids) == (whole.text_ids, whole.codec_ids)
    assert np.array_equal(cut_samples, samples)
