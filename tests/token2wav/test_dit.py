"""The streaming DiT against the reference's forward over the whole utterance, on weights that couple the blocks."""

import copy
import random
from functools import cache

import pytest
import torch
from small_models import (
    held_bytes,
    noise_of,
    relative,
    small_token2wav,
    some_codes,
    some_speaker,
    whole_decode,
)

from lowvram.token2wav.dit import NULL_CODE, WavefrontDiT, _Rotary
from lowvram.token2wav.ode import solver_stages, time_grid
from lowvram.token2wav.windows import first_mel_codes

COUPLING = 8.0
SEED = 7
LENGTHS = (1, 2, 10, 11, 12, 13, 19, 20, 23, 24, 25, 48, 59, 60, 61, 100, 333)
FOUR_EVALUATIONS = time_grid(5)


def small_dit(dtype=torch.float64):
    return small_token2wav(dtype, COUPLING).code2wav_dit_model


def stream_of(dit, *, solver="euler", times=FOUR_EVALUATIONS, guidance=0.5, seed=SEED, speaker=None):
    voice = speaker or some_speaker()
    return WavefrontDiT(dit, voice.cond, voice.ref_mel, solver_stages(solver, times), guidance=guidance, seed=seed)


def arrivals(codes, size):
    """Codes in pieces of `size`, of random sizes from 0 to 40 for None."""
    sizes = random.Random(5)
    while codes:
        count = sizes.randint(0, 40) if size is None else size
        yield codes[:count]
        codes = codes[count:]


def streamed(dit, codes, size=None, **options):
    stream = stream_of(dit, **options)
    return torch.cat([stream.push(piece) for piece in arrivals(codes, size)] + [stream.finish()], -1)


@cache
def whole(length):
    return whole_decode(small_dit(), some_codes(length), FOUR_EVALUATIONS)


@pytest.mark.parametrize("size", [1, 5, 12, 48, None])
@pytest.mark.parametrize("length", LENGTHS)
def test_stream_equals_whole_decode(length, size) -> None:
    mel = streamed(small_dit(), some_codes(length), size)
    assert mel.shape == (1, 80, 2 * length)
    assert relative(mel, whole(length)) <= 1e-12


@pytest.mark.parametrize("length", LENGTHS)
def test_stream_equals_whole_decode_in_float32_at_the_default_steps(length) -> None:
    dit, codes, times = small_dit(torch.float32), some_codes(length), time_grid(10)
    assert relative(streamed(dit, codes, times=times), whole_decode(dit, codes, times)) <= 2e-6


@pytest.mark.parametrize("length", [1, 12, 61])
def test_rk4_equals_the_references_solver(length) -> None:
    codes, times = some_codes(length), time_grid(4)
    mel = streamed(small_dit(), codes, 12, solver="rk4", times=times)
    assert relative(mel, whole_decode(small_dit(), codes, times, solver="rk4")) <= 1e-12


def test_stream_equals_whole_decode_on_weights_of_plain_variance() -> None:
    dit = small_token2wav(torch.float64, 1.0).code2wav_dit_model
    codes = some_codes(61)
    assert relative(streamed(dit, codes, 5), whole_decode(dit, codes, FOUR_EVALUATIONS)) <= 1e-12


def test_without_guidance_the_null_branch_is_not_computed() -> None:
    dit, branches = small_dit(), set()
    counting = dit.proj_out.register_forward_hook(lambda module, args, output: branches.add(len(output)))
    mel = streamed(dit, some_codes(61), guidance=0.0)
    counting.remove()
    assert branches == {1}
    assert relative(mel, whole_decode(dit, some_codes(61), FOUR_EVALUATIONS, guidance=0.0)) <= 1e-12


def test_the_first_block_hears_one_block_ahead_per_evaluation_and_no_further() -> None:
    codes = some_codes(72)
    first_block = whole_decode(small_dit(), codes, FOUR_EVALUATIONS)[..., :24]

    def change_when_block_changes(block: int) -> float:
        others = codes[: 12 * block] + some_codes(12, seed=9) + codes[12 * (block + 1) :]
        return (whole_decode(small_dit(), others, FOUR_EVALUATIONS)[..., :24] - first_block).abs().max().item()

    assert change_when_block_changes(4) > 1e-8
    assert change_when_block_changes(5) == 0


def test_first_mel_comes_with_the_stated_code() -> None:
    stream, codes, heard = stream_of(small_dit(), times=time_grid(10)), some_codes(200), 0
    frames = 0
    while not frames:
        frames = stream.push(codes[heard : heard + 1]).shape[-1]
        heard += 1
    assert (heard, frames) == (first_mel_codes(evaluations=9), 24)


@pytest.mark.parametrize("size", [1, 5, 48])
def test_each_frame_passes_each_layer_once_per_evaluation(size) -> None:
    dit, rows = small_dit(), [0] * 5
    hooks = []
    for index, layer in enumerate(dit.transformer_blocks):

        def count(module, args, output, index=index) -> None:
            rows[index] += output.shape[0] * output.shape[1]

        hooks.append(layer.ff.register_forward_hook(count))
    streamed(dit, some_codes(100), size)
    for hook in hooks:
        hook.remove()
    branches, evaluations, frames = 2, 4, 200
    assert rows == [branches * evaluations * frames] * 5


def test_state_does_not_grow() -> None:
    stream, codes = stream_of(small_dit(torch.float32)), some_codes(1400)
    held = []
    for piece in (codes[:300], codes[300:336], codes[336:1392], codes[1392:]):
        stream.push(piece)
        held.append(held_bytes(stream))
    assert len(set(held)) == 1


def test_speech_may_be_longer_than_the_reference_can_decode() -> None:
    """The reference refuses more than 16,384 codes (32,768 frames, 5.5 minutes)."""
    codes = some_codes(16_500)
    stream = stream_of(small_dit(torch.float32), times=(0.0, 1.0), guidance=0.0)
    frames = sum(stream.push(codes[start : start + 1500]).shape[-1] for start in range(0, len(codes), 1500))
    assert frames + stream.finish().shape[-1] == 2 * len(codes)


def test_the_noise_is_torchs_whatever_the_arrivals() -> None:
    dit = copy.deepcopy(small_dit(torch.float32))
    torch.nn.init.zeros_(dit.proj_out.weight)
    torch.nn.init.zeros_(dit.proj_out.bias)
    for size in (1, 13, 61, None):
        assert torch.equal(streamed(dit, some_codes(61), size).mT, noise_of(SEED, 122))


def test_two_streams_at_once_share_nothing() -> None:
    dit, voices = small_dit(), (some_speaker(3), some_speaker(8))
    texts = some_codes(61, seed=1), some_codes(61, seed=2)
    alone = [streamed(dit, text, 12, seed=i, speaker=voices[i]) for i, text in enumerate(texts)]
    streams = [stream_of(dit, seed=i, speaker=voices[i]) for i in (0, 1)]
    pieces: list[list[torch.Tensor]] = [[], []]
    for turn in zip(*(arrivals(text, 12) for text in texts), strict=True):
        for i, piece in enumerate(turn):
            pieces[i].append(streams[i].push(piece))
    for i in (0, 1):
        assert torch.equal(torch.cat([*pieces[i], streams[i].finish()], -1), alone[i])


@pytest.mark.parametrize("stranger", [-1, 8194, 8296])
def test_a_code_outside_the_table_keeps_its_place_and_is_reported(stranger, caplog) -> None:
    codes = some_codes(30)
    codes[17] = stranger
    mel = streamed(small_dit(), codes)
    codes[17] = NULL_CODE
    assert torch.equal(mel, streamed(small_dit(), codes))
    assert f"codec id {stranger} is outside the table of 8194" in caplog.text


def test_the_last_row_of_the_table_is_a_code_like_others() -> None:
    codes = [*some_codes(13), 8193]
    assert relative(streamed(small_dit(), codes), whole_decode(small_dit(), codes, FOUR_EVALUATIONS)) <= 1e-12


def test_no_codes_make_no_frames() -> None:
    assert stream_of(small_dit()).finish().shape == (1, 80, 0)


def test_the_rotary_phase_is_still_right_after_an_hour() -> None:
    dit, hour = small_dit(torch.float32), 360_000
    rotary = _Rotary(dit)
    rotary.draw(torch.empty(1, hour, 0))
    cos = rotary.draw(torch.empty(1, 24, 0))[:, : dit.rotary_embed.inv_freq.numel()]
    angle = torch.arange(hour, hour + 24, dtype=torch.float64)[:, None] * dit.rotary_embed.inv_freq.double()
    assert (cos - angle.cos()).abs().max() < 1e-6
