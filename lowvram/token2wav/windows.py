"""Rates and windows of the speech decoder: how many codes make a block, a chunk, a first sound.

Pure arithmetic over the published configuration. The DiT sees time in blocks counted from frame 0, so a chunk is a
whole number of blocks; what a frame may see ahead of itself decides when the first sound is final.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..options import SpeechMode

CODES_PER_SECOND = 50
"""The talker's rate: a codec token is 20 ms of sound."""

MEL_FRAMES_PER_CODE = 2
"""`dit_config.repeats`: the DiT writes a mel frame every 10 ms."""

SAMPLE_RATE_HZ = 24_000
SAMPLES_PER_CODE = SAMPLE_RATE_HZ // CODES_PER_SECOND
"""480: twice BigVGAN's hop, the product of its upsample rates 5*3*2*2*2*2 = 240 samples per mel frame."""

BLOCK_FRAMES = 24
"""`dit_config.block_size`: attention is local to a block, but for the look-back and look-ahead layers."""

BLOCK_CODES = BLOCK_FRAMES // MEL_FRAMES_PER_CODE
"""12 codes."""

BLOCK_S = BLOCK_CODES / CODES_PER_SECOND
"""0.24 s of sound."""

VOCODER_REACH_FRAMES = 34
"""BigVGAN's receptive field, 33.454 mel frames to each side (measured by perturbing its input), in whole frames."""

_FIRST_SOUND_BLOCKS = math.ceil(VOCODER_REACH_FRAMES / BLOCK_FRAMES)
"""2: the blocks of mel that sample 0 hears."""

LOOK_AHEAD_BLOCKS: dict[SpeechMode, int] = {"balanced": 2, "low-latency": 1}
"""The modes that solve a chunk with so many blocks after it, which are solved again with the next one."""


@dataclass(frozen=True)
class Chunks:
    """How many blocks are solved at a time: at first, later, and ahead of them, provisionally."""

    first_blocks: int
    blocks: int
    ahead_blocks: int

    def __post_init__(self) -> None:
        # Without a look-ahead the error is a quarter of the signal.
        assert self.first_blocks >= 1 and self.blocks >= 1 and self.ahead_blocks >= 1

    @classmethod
    def of(cls, mode: SpeechMode, chunk_s: float) -> Chunks:
        """Those of a mode in `LOOK_AHEAD_BLOCKS`. The first chunk is the shortest that sounds: the vocoder reads two
        blocks before its first sample."""
        blocks = chunk_codes(chunk_s) // BLOCK_CODES
        return cls(min(_FIRST_SOUND_BLOCKS, blocks), blocks, LOOK_AHEAD_BLOCKS[mode])


def chunk_codes(chunk_s: float) -> int:
    """The codes in a caller's chunk of `chunk_s` seconds, rounded up to whole blocks."""
    # Rounded, for 8.88 s is 37 blocks though 8.88 * 50 / 12 is a hair above.
    return BLOCK_CODES * math.ceil(round(chunk_s * CODES_PER_SECOND / BLOCK_CODES, 6))


def arrivals_codes(mode: SpeechMode, chunk_s: float) -> Iterator[int]:
    """How many codes to wait for before decoding, time after time: whole chunks, each with its look-ahead heard."""
    if mode not in LOOK_AHEAD_BLOCKS:
        return repeat(chunk_codes(chunk_s))
    chunks = Chunks.of(mode, chunk_s)
    return chain(
        [BLOCK_CODES * (chunks.first_blocks + chunks.ahead_blocks)],
        repeat(BLOCK_CODES * chunks.blocks),
    )


def first_sound_codes(evaluations: int, mode: SpeechMode = "exact", chunk_s: float = BLOCK_S) -> int:
    """Codes that must have come in before the first sample is final: 132 (2.64 s of sound) for 9 evaluations, block by
    block, and 144 in chunks of 0.96 s.

    One evaluation of a block reads one block ahead of it (the look-ahead layer), so a block waits for as many more as
    there are evaluations. In "offload" it also waits for an arrival between evaluations.
    """
    if mode in LOOK_AHEAD_BLOCKS:
        return BLOCK_CODES * (_FIRST_SOUND_BLOCKS + LOOK_AHEAD_BLOCKS[mode])
    per_arrival = chunk_codes(chunk_s) // BLOCK_CODES
    arrivals = math.ceil((evaluations + _FIRST_SOUND_BLOCKS) / per_arrival)
    if mode == "offload":
        arrivals += evaluations - 1
    return BLOCK_CODES * per_arrival * arrivals
