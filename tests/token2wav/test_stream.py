"""Codes to pieces of sound, against the reference's token2wav from end to end."""

import copy
import gc
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scarce_memory import NoRoom, PassingBlock, passing
from small_models import COUPLING, relative, small_dit, small_token2wav, some_codes, some_speaker, whole_decode

from lowvram.errors import CheckpointError
from lowvram.options import MODES, SpeechParams
from lowvram.token2wav.conditioning import condition
from lowvram.token2wav.ode import time_grid
from lowvram.token2wav.stream import decode_speech
from lowvram.token2wav.windows import BLOCK_FRAMES, VOCODER_REACH_FRAMES, first_sound_codes

ONE_EVALUATION = SpeechParams(steps=2, chunk_s=0.24)


def heard(params):
    """What the model hears of its speaker."""
    dit = small_token2wav(torch.float32, COUPLING).code2wav_dit_model
    return condition(nullcontext(dit), some_speaker(), params)


def speech(codes, params=ONE_EVALUATION, *, seed=7, model=None, **options):
    model = model or small_token2wav(torch.float32, COUPLING)
    blocks = nullcontext(model.code2wav_dit_model), nullcontext(model.code2wav_bigvgan_model)
    return decode_speech(codes, *blocks, heard(params), params, seed=seed, **options)


def sounding(pieces) -> list[np.ndarray]:
    return [piece for piece in pieces if len(piece)]


def joined(pieces) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(list(pieces)))


def test_rk4_speech_equals_the_references() -> None:
    """The reference's float32 time grid is 1e-7 off ours, which is most of the difference."""
    model, speaker, codes = small_token2wav(torch.float32, COUPLING), some_speaker(), some_codes(37)
    torch.manual_seed(7)
    with torch.no_grad():
        expected = model(torch.tensor([codes]), speaker.cond, speaker.ref_mel, num_steps=4)
    assert relative(joined(speech(codes, SpeechParams(solver="rk4", steps=4))), expected) <= 1e-5


@pytest.mark.parametrize(
    ("mode", "tolerance"), [("exact", 1e-5), ("offload", 1e-5), ("balanced", 1e-4), ("low-latency", 5e-3)]
)
@pytest.mark.parametrize("count", [1, 12, 61])
def test_euler_speech_equals_the_whole_decode(mode, tolerance, count) -> None:
    model, codes = small_token2wav(torch.float32, COUPLING), some_codes(count)
    with torch.no_grad():
        expected = model.code2wav_bigvgan_model(whole_decode(model.code2wav_dit_model, codes, time_grid(10)))
    assert relative(joined(speech(codes, SpeechParams(mode=mode))), expected) <= tolerance


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


@pytest.mark.parametrize(
    ("mode", "chunk_s", "steps", "codes"),
    [
        ("exact", 0.24, 2, 36),
        ("exact", 0.24, 10, 132),
        ("exact", 0.96, 10, 144),
        ("offload", 0.24, 10, 228),
        ("offload", 0.96, 4, 192),
        ("balanced", 0.96, 10, 48),
        ("balanced", 0.24, 10, 48),
        ("low-latency", 0.96, 10, 36),
        ("low-latency", 0.24, 10, 36),
    ],
)
def test_the_first_piece_comes_with_the_stated_code(mode, chunk_s, steps, codes) -> None:
    arriving = iter(some_codes(300))
    pieces = speech(arriving, SpeechParams(mode=mode, steps=steps, chunk_s=chunk_s))
    next(piece for piece in pieces if len(piece))
    assert codes == first_sound_codes(steps - 1, mode, chunk_s) == 300 - len(list(arriving))


def test_nothing_is_drawn_before_sound_is_asked_for() -> None:
    arriving = iter(some_codes(5))
    speech(arriving)
    assert len(list(arriving)) == 5


@pytest.mark.parametrize("mode", MODES)
def test_closing_lets_go_of_all_state(mode) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    some_speaker(), small_token2wav(torch.float32, COUPLING)
    before = tensors()
    pieces = speech(some_codes(96), SpeechParams(mode=mode, steps=2))
    next(piece for piece in pieces if len(piece))
    during = tensors()
    pieces.close()
    assert during > before + 100
    assert tensors() == before


@pytest.mark.parametrize("mode", MODES)
def test_between_steps_no_weight_is_held(mode) -> None:
    model, codes, params = small_token2wav(torch.float32, COUPLING), some_codes(110), SpeechParams(mode=mode, steps=3)
    dit, bigvgan = passing(model.code2wav_dit_model), passing(model.code2wav_bigvgan_model)
    pieces = list(decode_speech(codes, dit, bigvgan, heard(params), params, seed=7))
    assert dit.uses > 3 and bigvgan.uses > 2
    assert (dit.left_behind, bigvgan.left_behind) == (0, 0)
    assert torch.equal(joined(pieces), joined(speech(codes, params)))


def test_decoder_layers_may_be_blocks_of_their_own_and_come_once_per_chunk_in_offload() -> None:
    model, codes, params = small_token2wav(torch.float32, COUPLING), some_codes(110), SpeechParams(mode="offload")
    dit = copy.deepcopy(model.code2wav_dit_model)
    layers = [PassingBlock(layer) for layer in dit.transformer_blocks]
    rest = PassingBlock(dit, lambda name: not name.startswith("transformer_blocks."))
    bigvgan = nullcontext(model.code2wav_bigvgan_model)
    pieces = decode_speech(codes, rest, bigvgan, heard(params), params, seed=7, layers=layers)
    begun, chunks = [next(pieces) for _ in codes], 2
    assert {layer.uses for layer in layers} == {chunks}
    assert torch.equal(joined([*begun, *pieces]), joined(speech(codes, params)))
    assert {block.left_behind for block in (rest, *layers)} == {0}


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_ran_out_of_memory_anywhere_can_be_tried_again(mode) -> None:
    codes, params, places, failures = some_codes(110), SpeechParams(mode=mode, steps=3), random.Random(1), []

    def again_and_again(step, undo=lambda: None):
        for _ in range(2):
            try:
                with NoRoom(places.randint(0, 1500)):
                    return step()
            except torch.OutOfMemoryError as error:
                failures.append(str(error))
            undo()
        return step()

    retried = joined(speech(codes, params, attempt=again_and_again))
    assert len(failures) > 5
    assert torch.equal(retried, joined(speech(codes, params)))


def test_two_utterances_at_once_share_nothing() -> None:
    params = SpeechParams(steps=2, chunk_s=0.48)
    texts = some_codes(61, seed=1), some_codes(61, seed=2)
    alone = [joined(speech(text, params, seed=seed)) for seed, text in enumerate(texts)]
    together = zip(*(speech(text, params, seed=seed) for seed, text in enumerate(texts)), strict=True)
    for one, pieces in zip(alone, zip(*together, strict=True), strict=True):
        assert torch.equal(joined(pieces), one)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_layers_compute_in_the_precision_they_come_in(dtype, tolerance) -> None:
    codes, exact = some_codes(61), joined(speech(some_codes(61), SpeechParams()))
    layers = [nullcontext(copy.deepcopy(layer).to(dtype)) for layer in small_dit(torch.float32).transformer_blocks]
    halved = joined(speech(codes, SpeechParams(), layers=layers))
    assert 1e-5 < relative(halved, exact) < tolerance


def test_one_conditioning_serves_any_number_of_utterances_and_modes() -> None:
    model, shared = small_token2wav(torch.float32, COUPLING), heard(SpeechParams(steps=3))
    blocks = nullcontext(model.code2wav_dit_model), nullcontext(model.code2wav_bigvgan_model)
    for mode in MODES:
        params, codes = SpeechParams(mode=mode, steps=3), some_codes(30, seed=len(mode))
        pieces = decode_speech(codes, *blocks, shared, params, seed=7)
        assert torch.equal(joined(pieces), joined(speech(codes, params)))


def damaged(weight, place=0, odd=float("nan")):
    """The model with one number that is none."""
    model = copy.deepcopy(small_token2wav(torch.float32, COUPLING))
    model.get_parameter(weight).data.view(-1)[place] = odd
    return model


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "weight",
    [
        "code2wav_dit_model.text_embed.codec_embed.weight",
        "code2wav_dit_model.input_embed.proj.bias",
        "code2wav_dit_model.transformer_blocks.1.attn.to_k.weight",
        "code2wav_dit_model.transformer_blocks.4.ff.ff.0.weight",
        "code2wav_dit_model.proj_out.bias",
        "code2wav_bigvgan_model.conv_pre.weight",
        "code2wav_bigvgan_model.ups.1.0.weight",
        "code2wav_bigvgan_model.resblocks.3.convs1.0.bias",
        "code2wav_bigvgan_model.conv_post.weight",
    ],
)
@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_a_weight_that_is_no_number_ends_the_speech_with_one_sentence(weight, odd, guidance) -> None:
    params = SpeechParams(steps=2, chunk_s=0.24, guidance=guidance)
    with pytest.raises(CheckpointError, match=r"samples are not numbers \(1 or more weights of token2wav") as refused:
        list(speech([0] * 40, params, model=damaged(weight, odd=odd)))
    assert refused.value.tensor == "token2wav."


@pytest.mark.parametrize("mode", MODES)
def test_what_sounded_before_a_code_that_is_no_number_is_what_it_would_have_been(mode) -> None:
    codes, params, pieces = some_codes(200), SpeechParams(mode=mode, steps=3, chunk_s=0.24), []
    table = "code2wav_dit_model.text_embed.codec_embed.weight"
    width = small_token2wav().get_parameter(table).shape[1]
    with pytest.raises(CheckpointError):
        for piece in speech(codes, params, model=damaged(table, codes[150] * width)):
            pieces.append(piece)
    heard = joined(pieces)
    assert len(heard) > 60 * 480
    assert torch.equal(heard, joined(speech(codes, params))[: len(heard)])
