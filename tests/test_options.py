from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lowvram.errors import OptionError
from lowvram.options import Limits, MediaParams, SamplingParams, SpeechParams

SEEDS = "but must be 0 to 18446744073709551615"

REFUSED: list[tuple[Callable[..., object], dict[str, Any], str]] = [
    (SamplingParams, {"max_tokens": 0}, "max_tokens is 0, but an answer has at least 1 token"),
    (SamplingParams, {"temperature": -0.1}, "temperature is -0.1, but must be 0 (greedy) or a positive number"),
    (SamplingParams, {"temperature": math.inf}, "temperature is inf, but must be 0 (greedy) or a positive number"),
    (SamplingParams, {"temperature": math.nan}, "temperature is nan, but must be 0 (greedy) or a positive number"),
    (SamplingParams, {"top_k": -1}, "top_k is -1, but must be 0 (off) or more"),
    (SamplingParams, {"top_p": 0.0}, "top_p is 0.0, but must be above 0 and at most 1 (off)"),
    (SamplingParams, {"top_p": 1.5}, "top_p is 1.5, but must be above 0 and at most 1 (off)"),
    (SamplingParams, {"top_p": math.nan}, "top_p is nan, but must be above 0 and at most 1 (off)"),
    (
        SamplingParams,
        {"repetition_penalty": 0.0},
        "repetition_penalty is 0.0, but must be a positive number (1 is off)",
    ),
    (SamplingParams, {"repetition_penalty": math.inf}, "repetition_penalty is inf, but must be a positive number"),
    (SamplingParams, {"seed": -1}, f"seed is -1, {SEEDS}"),
    (SamplingParams, {"seed": 2**64}, f"seed is 18446744073709551616, {SEEDS}"),
    (SamplingParams, {"max_tokens": "6"}, "max_tokens is '6', but must be a whole number"),
    (SamplingParams, {"max_tokens": 6.0}, "max_tokens is 6.0, but must be a whole number"),
    (SamplingParams, {"max_tokens": True}, "max_tokens is True, but must be a whole number"),
    (SamplingParams, {"temperature": None}, "temperature is None, but must be a number"),
    (SamplingParams, {"seed": "x"}, "seed is 'x', but must be a whole number"),
    (SpeechParams, {"sampling": {"max_tokens": 3}}, "sampling is {'max_tokens': 3}, but must be SamplingParams"),
    (SpeechParams, {"voice": 3}, "voice is 3, but must be a word"),
    (MediaParams, {"start_s": "1:30"}, "start_s is '1:30', but must be a number"),
    (MediaParams, {"video_sound": 1}, "video_sound is 1, but must be True or False"),
    (SamplingParams, {"max_tokens": 10**30}, "max_tokens is above 1,000,000,000,000, beyond any use"),
    (MediaParams, {"max_frames": 10**400}, "max_frames is above 1,000,000,000,000, beyond any use"),
    (Limits, {"max_prompt_tokens": 1.5}, "max_prompt_tokens is 1.5, but must be a whole number"),
    (SpeechParams, {"steps": 1}, "steps is 1, but the ODE grid needs 2 to 1000 time points"),
    (SpeechParams, {"steps": 1001}, "steps is 1001, but the ODE grid needs 2 to 1000 time points"),
    (SpeechParams, {"guidance": -1.0}, "guidance is -1.0, but must be 0 (off) to 100"),
    (SpeechParams, {"guidance": math.inf}, "guidance is inf, but must be 0 (off) to 100"),
    (SpeechParams, {"solver": "magic"}, "solver 'magic' is unknown (one of: euler, ab2, rk4)"),
    (SpeechParams, {"mode": "fast"}, "mode 'fast' is unknown (one of: exact, balanced, low-latency, offload)"),
    (SpeechParams, {"dtype": "int8"}, "dtype 'int8' is unknown (one of: float32, float16, bfloat16)"),
    (SpeechParams, {"chunk_s": 0.1}, "chunk_s is 0.1 s, but a chunk is 0.24 s (one DiT block) to 60 s of sound"),
    (SpeechParams, {"chunk_s": 61.0}, "chunk_s is 61.0 s, but a chunk is 0.24 s (one DiT block) to 60 s of sound"),
    (SpeechParams, {"voice": ""}, "voice is empty: 0 characters (without one, the checkpoint's first voice speaks)"),
    (SpeechParams, {"seed": -1}, f"seed is -1, {SEEDS}"),
    (SpeechParams, {"seed": 2**64}, f"seed is 18446744073709551616, {SEEDS}"),
    (MediaParams, {"fps": 0.0}, "fps is 0.0, but must be at least 0.01 frames/s (a frame every 100 s)"),
    (MediaParams, {"fps": 1e-9}, "fps is 1e-09, but must be at least 0.01 frames/s"),
    (MediaParams, {"fps": math.inf}, "fps is inf, but must be at least 0.01 frames/s"),
    (MediaParams, {"max_frames": 1}, "max_frames is 1, but frames come in pairs: at least 2"),
    (MediaParams, {"min_frames": 1}, "min_frames is 1, but frames come in pairs: at least 2"),
    (MediaParams, {"max_frames": 2}, "max_frames is 2, below min_frames 4 (lower min_frames too)"),
    (MediaParams, {"max_pixels": 0}, "max_pixels is 0, but a picture has at least 1 pixel"),
    (MediaParams, {"min_pixels": 0}, "min_pixels is 0, but a picture has at least 1 pixel"),
    (MediaParams, {"max_pixels": 784}, "max_pixels is 784, below min_pixels 100352 (lower min_pixels too)"),
    (MediaParams, {"image_max_pixels": 784}, "image_max_pixels is 784, below image_min_pixels 3136 (lower image_min"),
    (MediaParams, {"total_pixels": 784}, "total_pixels is 784, below one frame of min_pixels 100352 (lower min_pixels"),
    (MediaParams, {"start_s": -1.0}, "start is -1.0 s, but must be 0 to 1000000000 s"),
    (MediaParams, {"start_s": math.inf}, "start is inf s, but must be 0 to 1000000000 s"),
    (MediaParams, {"start_s": math.nan}, "start is nan s, but must be 0 to 1000000000 s"),
    (MediaParams, {"end_s": 0.0}, "end is 0.0 s, not after the start at 0.0 s"),
    (MediaParams, {"end_s": math.nan}, "end is nan s, not after the start at 0.0 s"),
    (MediaParams, {"start_s": 3.0, "end_s": 2.0}, "end is 2.0 s, not after the start at 3.0 s"),
    (
        MediaParams,
        {"end_s": math.inf},
        "end is inf s, but must be at most 1000000000 s (without an end, media are read",
    ),
    (MediaParams, {"end_s": 1e308}, "end is 1e+308 s, but must be at most 1000000000 s"),
    (Limits, {"prefill_chunk_tokens": 0}, "prefill_chunk_tokens is 0, but must be at least 1"),
    (Limits, {"vision_chunk_patches": 0}, "vision_chunk_patches is 0, but must be at least 1"),
    (Limits, {"audio_chunk_windows": 0}, "audio_chunk_windows is 0, but must be at least 1"),
    (Limits, {"max_media_bytes": 0}, "max_media_bytes is 0, but must be at least 1"),
    (Limits, {"max_prompt_tokens": 0}, "max_prompt_tokens is 0, but must be at least 1"),
    (Limits, {"network_timeout_s": 0.0}, "network_timeout_s is 0.0 s, but must be above 0 and at most 86400 s"),
    (Limits, {"network_timeout_s": math.inf}, "network_timeout_s is inf s, but must be above 0"),
    (Limits, {"network_timeout_s": math.nan}, "network_timeout_s is nan s, but must be above 0"),
]


@pytest.mark.parametrize(("options", "given", "says"), REFUSED, ids=[says for _, _, says in REFUSED])
def test_a_bad_option_is_refused_with_its_number(options: Callable[..., object], given: dict[str, Any], says: str):
    with pytest.raises(OptionError, match=f"^{re.escape(says)}"):
        options(**given)


def test_the_way_out_of_a_refusal_leads_out():
    assert MediaParams(max_pixels=784, min_pixels=784, max_frames=2, min_frames=2).max_pixels == 784


@pytest.mark.parametrize("seed", [None, 0, 2**64 - 1])
def test_every_state_of_a_generator_is_a_seed(seed: int | None):
    assert SamplingParams(seed=seed).seed == SpeechParams(seed=seed).seed == seed


def test_a_number_of_numpy_is_a_number():
    assert SamplingParams(max_tokens=np.int64(6), temperature=np.float32(0.5), top_p=1).max_tokens == 6
