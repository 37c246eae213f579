"""Codes to pieces of sound, against the reference's token2wav from end to end."""

import gc

import numpy as np
import pytest
import torch
from small_models import relative, small_token2wav, some_codes, some_speaker, whole_decode

from lowvram.errors import CheckpointError
from lowvram.options import SpeechParams
from lowvram.token2wav.ode import time_grid
from lowvram.token2wav.stream import Speaker, decode_speech
from lowvram.token2wav.windows import BLOCK_FRAMES, VOCODER_REACH_FRAMES, first_sound_codes

ONE_EVALUATION = SpeechParams(steps=2, chunk_s=0.24)


def speech(codes, params=ONE_EVALUATION, *, speaker=None, seed=7):
    model = small_token2wav(torch.float32, 8.0)
    dit, vocoder = model.code2wav_dit_model, model.code2wav_bigvgan_model
    return decode_speech(codes, dit, vocoder, speaker or some_speaker(), params, seed=seed)


def sounding(pieces) -> list[np.ndarray]:
    return [piece for piece in pieces if len(piece)]


def joined(pieces) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(list(pieces)))


def test_rk4_speech_equals_the_references() -> None:
    """The reference's float32 time grid is 1e-7 off ours, which is most of the difference."""
    model, speaker, codes = small_token2wav(torch.float32, 8.0), some_speaker(), some_codes(37)
    torch.manual_seed(7)
    with torch.no_grad():
        expected = model(torch.tensor([codes]), speaker.cond, speaker.ref_mel, num_steps=4)
    assert relative(joined(speech(codes, SpeechParams(solver="rk4", steps=4))), expected) <= 1e-5


@pytest.mark.parametrize("count", [1, 12, 49])
def test_euler_speech_equals_the_whole_decode(count) -> None:
    model, codes = small_token2wav(torch.float32, 8.0), some_codes(count)
    with torch.no_grad():
        expected = model.code2wav_bigvgan_model(whole_decode(model.code2wav_dit_model, codes, time_grid(10)))
    assert relative(joined(speech(codes, SpeechParams())), expected) <= 1e-5


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 19, 24, 48])
def test_a_code_is_480_samples(count) -> None:
    assert sum(len(piece) for piece in speech(some_codes(count))) == 480 * count


def test_no_codes_make_no_sound() -> None:
    assert sounding(speech([])) == []


def test_pieces_are_float32_vectors_in_range() -> None:
    for piece in speech(some_codes(61)):
        assert piece.dtype == np.float32
        assert piece.ndim == 1
        assert np.abs(piece).max(initial=0) <= 1


def test_a_piece_follows_every_code_drawn() -> None:
    drawn = []
    pieces = speech(drawn.append(code) or code for code in some_codes(30))
    assert [len(drawn) for _, piece in zip(range(30), pieces, strict=False)] == list(range(1, 31))


def test_the_rest_comes_a_chunk_at_a_time() -> None:
    pieces = sounding(speech(some_codes(240), SpeechParams(chunk_s=0.24)))
    assert max(len(piece) for piece in pieces) <= (BLOCK_FRAMES + VOCODER_REACH_FRAMES) * 240


def test_chunks_change_when_sound_comes_and_not_what_it_is() -> None:
    codes = some_codes(49)
    short, long = sounding(speech(codes)), sounding(speech(codes, SpeechParams(steps=2, chunk_s=0.96)))
    assert len(short) > len(long)
    assert relative(joined(short), joined(long)) <= 1e-5


def test_another_seed_is_another_sound() -> None:
    assert relative(joined(speech(some_codes(1), seed=8)), joined(speech(some_codes(1)))) > 1e-2


@pytest.mark.parametrize(("steps", "codes"), [(2, 36), (10, 132)])
def test_the_first_piece_comes_with_the_stated_code(steps, codes) -> None:
    arriving = iter(some_codes(300))
    next(piece for piece in speech(arriving, SpeechParams(steps=steps, chunk_s=0.24)) if len(piece))
    assert codes == first_sound_codes(steps - 1) == 300 - len(list(arriving))


def test_nothing_is_drawn_before_sound_is_asked_for() -> None:
    arriving = iter(some_codes(5))
    speech(arriving)
    assert len(list(arriving)) == 5


def test_closing_lets_go_of_all_state() -> None:
    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    some_speaker(), small_token2wav(torch.float32, 8.0)
    before = tensors()
    pieces = speech(some_codes(48))
    next(piece for piece in pieces if len(piece))
    during = tensors()
    pieces.close()
    assert during > before + 100
    assert tensors() == before


@pytest.mark.parametrize(
    ("cond", "ref_mel"), [((1, 16), (1, 30, 80)), ((192,), (1, 30, 80)), ((1, 192), (1, 30, 128)), ((1, 192), (30, 80))]
)
def test_a_voice_of_another_model_is_refused(cond, ref_mel) -> None:
    with pytest.raises(CheckpointError, match=r"\[1, 192\] and \[1, T, 80\]"):
        next(speech(some_codes(1), speaker=Speaker(torch.zeros(cond), torch.zeros(ref_mel))))
