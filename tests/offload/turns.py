"""Turns that several tests plan."""

from __future__ import annotations

from typing import Any

from lowvram.offload.plan import Turn

FRAME_GRID = (48, 64)
"""A pair of frames at the cap: 3072 patches, 768 tokens."""
AUDIO_TOKENS_PER_SECOND = 25
WORDS_TOKENS = 60


def clip(seconds: int, *, grid: tuple[int, int] = FRAME_GRID, **options: Any) -> Turn:
    """A video with its sound, a pair of frames per second, answered in 1024 tokens and 82 s of speech, in a voice that
    is known from an earlier turn."""
    patches = grid[0] * grid[1]
    return Turn(
        prompt_tokens=seconds * (patches // 4 + AUDIO_TOKENS_PER_SECOND) + WORDS_TOKENS,
        **{
            "text_tokens": 1024,
            "codes": 4096,
            "audio_windows": -(-seconds // 2),
            "grids": ((seconds, *grid),),
            "is_conditioned": True,
        }
        | options,
    )


MINUTE = clip(60)
QUARTER = clip(15)
CHAT = Turn(prompt_tokens=400, text_tokens=1024, codes=4096, is_conditioned=True)
