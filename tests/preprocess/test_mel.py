from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from lowvram.preprocess.counts import audio_tokens
from lowvram.preprocess.mel import MelRecipe, log_mel

TOLERANCE = 2e-6
"""One float32 rounding of values near 1; the matrix product adds in another order for other widths."""


def extractor(chunk_s: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16000, hop_length=160, chunk_length=chunk_s, n_fft=400
    )


def recipe(chunk_s: int) -> MelRecipe:
    filters = torch.from_numpy(extractor(chunk_s).mel_filters).float().T
    return MelRecipe(hop_length=160, n_fft=400, chunk_samples=16000 * chunk_s, filters=filters)


def speechlike(samples: int) -> np.ndarray:
    """Noise that swells and fades, so that the loudest moment is somewhere in particular."""
    noise = np.random.default_rng(samples).standard_normal(samples) * 0.1
    return (noise * np.sin(np.linspace(0, 7, samples))).astype(np.float32)


def reference(sound: np.ndarray, chunk_s: int) -> torch.Tensor:
    out = extractor(chunk_s)(sound, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")
    return out["input_features"][0][:, : int(out["attention_mask"].sum())]


@pytest.mark.parametrize("samples", [321, 480, 1600, 8001, 15999, 16000 * 2 - 41, 16000 * 2 - 1, 16000 * 2])
def test_log_mel_equals_the_extractors(samples: int):
    sound = speechlike(samples)
    torch.testing.assert_close(log_mel(sound, recipe(2)), reference(sound, 2), atol=TOLERANCE, rtol=0)


def test_an_applications_autocast_is_not_heard():
    sound = speechlike(1600)
    with torch.autocast("cpu", torch.bfloat16):
        heard = log_mel(sound, recipe(2))
    assert torch.equal(heard, log_mel(sound, recipe(2)))


@pytest.mark.parametrize("samples", [16001, 40000])
def test_sound_beyond_the_chunk_length_is_not_cut(samples: int):
    sound = speechlike(samples)
    torch.testing.assert_close(log_mel(sound, recipe(1)), reference(sound, 4), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("samples", [1600, 16000])
def test_a_bang_at_the_very_end_is_as_loud_as_the_extractor_hears_it(samples: int):
    sound = np.zeros(samples, np.float32)
    sound[-1] = 1.0  # heard best by the window centred behind it, which a full chunk does not have
    torch.testing.assert_close(log_mel(sound, recipe(1)), reference(sound, 1), atol=TOLERANCE, rtol=0)


def test_segments_do_not_show():
    sound = speechlike(50_000)
    torch.testing.assert_close(
        log_mel(sound, recipe(2), segment_frames=7), log_mel(sound, recipe(2)), atol=TOLERANCE, rtol=0
    )


def test_silence_is_flat():
    assert log_mel(np.zeros(5000, np.float32), recipe(1)).unique().tolist() == [-1.5]


@pytest.mark.parametrize("samples", [1, 100, 320])
def test_the_shortest_sound_counts_as_30_ms_and_makes_a_token(samples: int):
    sound = speechlike(samples + 1)[1:]
    mel = log_mel(sound, recipe(1))
    assert mel.shape == (128, 3)
    assert audio_tokens(mel.shape[1]) == 1
    padded = np.pad(sound, (0, 480 - samples))
    torch.testing.assert_close(mel, reference(padded, 1), atol=TOLERANCE, rtol=0)
