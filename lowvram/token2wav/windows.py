"""Rates and windows of the speech decoder: how many codes make a block, a chunk, a first sound.

Pure arithmetic over the published configuration. The DiT sees time in blocks counted from frame 0, so a chunk is a
whole number of blocks; what a frame may see ahead of itself decides when the first sound is final.
"""

from __future__ import annotations

import math

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
"""12 codes, 0.24 s."""

VOCODER_REACH_FRAMES = 34
"""BigVGAN's receptive field, 33.454 mel frames to each side (measured by perturbing its input), in whole frames."""


def chunk_codes(chunk_s: float) -> int:
    """The codes in a caller's chunk of `chunk_s` seconds, rounded up to whole blocks."""
    # Rounded, for 8.88 s is 37 blocks though 8.88 * 50 / 12 is a hair above.
    return BLOCK_CODES * math.ceil(round(chunk_s * CODES_PER_SECOND / BLOCK_CODES, 6))


def first_mel_codes(evaluations: int) -> int:
    """Codes that must have come in before the first mel block is final.

    One evaluation of a block reads one block ahead of it (the look-ahead layer), so block 0 waits for as many blocks
    as there are evaluations: 120 codes for 9.
    """
    return BLOCK_CODES * (evaluations + 1)


def first_sound_codes(evaluations: int) -> int:
    """Codes that must have come in before the first sample is final: 132 codes (2.64 s of sound) for 9 evaluations.

    Sample 0 hears the vocoder's reach, the first 34 mel frames: two blocks.
    """
    further_blocks = math.ceil(VOCODER_REACH_FRAMES / BLOCK_FRAMES) - 1
    return first_mel_codes(evaluations) + BLOCK_CODES * further_blocks
