"""A waveform as the log-mel picture the audio tower sees, of any length, a segment at a time.

Equal to transformers' `WhisperFeatureExtractor`, which pads every sound with silence to its chunk length (300 s) and
cuts what is longer. Only the frames that meet sound are computed here, and nothing is cut: beyond the chunk length
the result is what an extractor with a longer chunk would give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .counts import mel_frames

SEGMENT_FRAMES = 3000
"""Frames transformed at once: 30 s of sound, about 10 MB of working memory."""

FLOOR = 1e-10
DYNAMIC_RANGE = 8.0
"""Powers are floored at 1e-10 and at 8 decades below the loudest of the whole sound (Whisper's log-mel)."""


@dataclass(frozen=True)
class MelRecipe:
    """How a checkpoint hears: `filters` [M, n_fft // 2 + 1] float32 turn a power spectrum into mel bins.

    `chunk_samples` is the length to which the extractor pads, 300 s as published.
    """

    hop_length: int
    n_fft: int
    chunk_samples: int
    filters: Tensor

    def frames(self, samples: int) -> int:
        """Mel frames of a sound of `samples` samples."""
        return mel_frames(samples, self.hop_length)


@torch.autocast("cpu", enabled=False)  # an application's would round the mel filters and the spectrum to bfloat16
def log_mel(sound: np.ndarray, recipe: MelRecipe, segment_frames: int = SEGMENT_FRAMES) -> Tensor:
    """Log-mel [M, F] float32 of a mono waveform [S] float32, F = `recipe.frames(S)`.

    Memory beyond the result does not grow with S; `segment_frames` does not change it.
    """
    assert len(sound) > 0, "a sound without samples has no mel"
    frames = recipe.frames(len(sound))
    # The loudest moment may lie in a window whose centre is past the end, as the padded extractor sees it.
    last_centre = len(sound) + recipe.n_fft // 2
    sounding = min(math.ceil(last_centre / recipe.hop_length), _frames_before_cut(len(sound), recipe))
    mel = torch.empty(len(recipe.filters), max(frames, sounding), dtype=torch.float32, device="cpu")
    for start in range(0, mel.shape[1], segment_frames):
        stop = min(start + segment_frames, mel.shape[1])
        mel[:, start:stop] = _segment(sound, start, stop, recipe)
    return mel.clamp_(min=mel.max() - DYNAMIC_RANGE).add_(4.0).div_(4.0)[:, :frames]


def _frames_before_cut(samples: int, recipe: MelRecipe) -> int:
    """Frames of the padded sound but for its last, which the extractor drops."""
    return _padded_samples(samples, recipe) // recipe.hop_length


def _padded_samples(samples: int, recipe: MelRecipe) -> int:
    """Length of the sound with its silence: the chunk length, or for a longer sound enough to meet every window."""
    return recipe.chunk_samples if samples <= recipe.chunk_samples else samples + recipe.n_fft


def _segment(sound: np.ndarray, start: int, stop: int, recipe: MelRecipe) -> Tensor:
    """log10 mel powers [M, stop - start]. Windows are centred on frame * hop; both ends of the padded sound mirror."""
    reach = recipe.n_fft // 2
    at = np.abs(np.arange(start * recipe.hop_length - reach, (stop - 1) * recipe.hop_length + reach))
    end = _padded_samples(len(sound), recipe) - 1
    at = end - np.abs(end - at)
    heard = np.where(at < len(sound), sound[np.minimum(at, len(sound) - 1)], np.float32(0))
    spectrum = torch.stft(
        torch.from_numpy(heard),
        recipe.n_fft,
        recipe.hop_length,
        window=torch.hann_window(recipe.n_fft, dtype=torch.float32, device="cpu"),
        center=False,
        return_complex=True,
    )
    return (recipe.filters @ spectrum.abs().square()).clamp_(min=FLOOR).log10_()
