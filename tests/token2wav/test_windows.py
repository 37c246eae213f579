"""The rates, against the published configuration, and the latency arithmetic."""

import math
from itertools import islice

import pytest
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniToken2WavConfig

from lowvram.token2wav import windows


def test_the_constants_are_those_of_the_published_configuration() -> None:
    config = Qwen2_5OmniToken2WavConfig()
    assert config.dit_config.block_size == windows.BLOCK_FRAMES
    assert config.dit_config.repeats == windows.MEL_FRAMES_PER_CODE
    hop = math.prod(config.bigvgan_config.upsample_rates)
    assert hop * windows.MEL_FRAMES_PER_CODE == windows.SAMPLES_PER_CODE


def test_a_second_of_codes_is_a_second_of_samples() -> None:
    assert windows.CODES_PER_SECOND * windows.SAMPLES_PER_CODE == windows.SAMPLE_RATE_HZ


@pytest.mark.parametrize(
    ("chunk_s", "codes"), [(0.24, 12), (0.25, 24), (0.72, 36), (0.96, 48), (1.0, 60), (1.68, 84), (60.0, 3000)]
)
def test_a_chunk_is_whole_blocks(chunk_s: float, codes: int) -> None:
    assert windows.chunk_codes(chunk_s) == codes


def test_every_multiple_of_a_block_keeps_its_length() -> None:
    """8.88 s among them: 8.88 * 50 / 12 is a hair above 37."""
    assert [windows.chunk_codes(round(blocks * 0.24, 2)) for blocks in range(1, 251)] == [12 * b for b in range(1, 251)]


@pytest.mark.parametrize(
    ("mode", "chunk_s", "codes"),
    [
        ("exact", 0.24, 132),
        ("exact", 0.96, 144),
        ("offload", 0.24, 228),
        ("offload", 0.96, 528),
        ("balanced", 0.24, 48),
        ("balanced", 0.96, 48),
        ("low-latency", 0.24, 36),
        ("low-latency", 0.96, 36),
    ],
)
def test_nine_evaluations_need_so_many_codes_for_sound(mode, chunk_s, codes) -> None:
    assert windows.first_sound_codes(9, mode, chunk_s) == codes


@pytest.mark.parametrize(
    ("mode", "chunk_s", "codes"),
    [
        ("exact", 0.96, [48, 48, 48]),
        ("offload", 0.24, [12, 12, 12]),
        ("balanced", 0.96, [48, 48, 48]),
        ("low-latency", 0.96, [36, 48, 48]),
        ("balanced", 0.24, [36, 12, 12]),
    ],
)
def test_codes_are_awaited_in_whole_chunks_the_first_with_its_look_ahead(mode, chunk_s, codes) -> None:
    assert list(islice(windows.arrivals_codes(mode, chunk_s), 3)) == codes


@pytest.mark.parametrize("chunks", [(2, 4, 0), (0, 4, 1), (2, 0, 1)])
def test_there_are_no_chunks_without_a_look_ahead_and_none_of_no_blocks(chunks) -> None:
    with pytest.raises(AssertionError):
        windows.Chunks(*chunks)
