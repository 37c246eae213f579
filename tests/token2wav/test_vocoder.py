"""The streaming vocoder against the reference's forward over the whole utterance."""

import copy
from functools import cache

import pytest
import torch
from scarce_memory import NoRoom, passing
from small_models import small_token2wav
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lowvram.token2wav.vocoder import StreamingVocoder
from lowvram.token2wav.windows import VOCODER_REACH_FRAMES

HOP = 240


def small_vocoder(dtype=torch.float64):
    return small_token2wav(dtype).code2wav_bigvgan_model


def some_mel(frames, dtype=torch.float64):
    """Log-mel from loud to below the vocoder's floor of -115 dB."""
    return (torch.randn(1, 80, frames, generator=torch.Generator().manual_seed(6)) * 4 - 4).to(dtype)


@cache
def whole(frames):
    with torch.no_grad():
        return small_vocoder()(some_mel(frames)).reshape(-1)


def streamed(mel, size, vocoder=None):
    stream = StreamingVocoder(vocoder or small_vocoder())
    pieces = [stream.push(piece, last=False) for piece in mel.split(size, -1)]
    return torch.cat([*pieces, stream.push(mel[..., :0], last=True)])


def streamed_in_pieces(mel, size):
    """As `streamed`, but for the last piece, which is known to be the last."""
    stream, pieces = StreamingVocoder(small_vocoder()), mel.split(size, -1)
    return torch.cat([stream.push(piece, last=piece is pieces[-1]) for piece in pieces])


@pytest.mark.parametrize("frames", [1, 2, 20, 21, 33, 34, 35, 68, 69, 96])
@pytest.mark.parametrize("size", [7, 96])
def test_stream_equals_whole(frames, size) -> None:
    sound = streamed(some_mel(frames), size)
    assert len(sound) == HOP * frames
    assert (sound - whole(frames)).abs().max() <= 1e-12


@pytest.mark.parametrize("frames", [1, 2, 21, 35])
def test_stream_equals_whole_frame_by_frame(frames) -> None:
    assert (streamed(some_mel(frames), 1) - whole(frames)).abs().max() <= 1e-12


def test_a_long_stream_with_pieces_of_any_size_equals_whole() -> None:
    sizes = [1] * 10 + [7, 0, 24, 96, 1, 7, 0, 24, 96, 68]
    stream, pieces = StreamingVocoder(small_vocoder()), some_mel(sum(sizes)).split(sizes, -1)
    assert sum(sizes) == 333
    sound = torch.cat([stream.push(piece, last=index == len(pieces) - 1) for index, piece in enumerate(pieces)])
    assert (sound - whole(333)).abs().max() <= 1e-12


def test_sound_lags_the_mel_by_the_receptive_field() -> None:
    stream, mel = StreamingVocoder(small_vocoder()), some_mel(VOCODER_REACH_FRAMES)
    assert len(stream.push(mel[..., :-1], last=False)) == 0
    assert len(stream.push(mel[..., -1:], last=False)) == HOP * VOCODER_REACH_FRAMES - 8029  # 33.454 frames


def test_no_sample_that_was_given_out_hears_what_came_later() -> None:
    mel, other = some_mel(96), some_mel(96)
    other[..., 60:] = 1.0
    early = StreamingVocoder(small_vocoder()).push(mel[..., :60], last=False)
    assert len(early) > 26 * HOP
    assert torch.equal(early, StreamingVocoder(small_vocoder()).push(other[..., :60], last=False))


@pytest.mark.parametrize("frames", [60, 180])
def test_the_work_is_that_of_the_whole_decode_and_of_less_than_two_frames_more(frames) -> None:
    with torch.no_grad(), FlopCounterMode(display=False) as whole_work:
        small_vocoder()(some_mel(frames))
    with FlopCounterMode(display=False) as stream_work:
        streamed(some_mel(frames), 20)
    assert 1 <= stream_work.get_total_flops() / whole_work.get_total_flops() < (frames + 2) / frames


class Convolutions(TorchDispatchMode):
    """What a library prepares a kernel for: shapes of inputs and weights, and how they are convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            x, weight, _, *how = args
            self.kinds.add((x.shape, weight.shape, str(how)))
        return func(*args, **(kwargs or {}))


def test_libraries_meet_few_more_lengths_at_the_ends_than_in_between() -> None:
    stream, kinds = StreamingVocoder(small_vocoder()), []
    for index, piece in enumerate(some_mel(116).split(48, -1)):
        with Convolutions() as convolutions:
            stream.push(piece, last=index == 2)
        kinds.append(len(convolutions.kinds))
    beginning, between, end = kinds
    assert max(beginning, end) < 2.5 * between  # 3.6 where each layer has its own


def test_state_depends_neither_on_length_nor_on_arrivals() -> None:
    held = set()
    for frames, size in ((120, 40), (120, 120), (240, 120)):
        stream = StreamingVocoder(small_vocoder(torch.float32))
        for piece in some_mel(frames, torch.float32).split(size, -1):
            stream.push(piece, last=False)
        held.add(stream.state_bytes)
    assert len(held) == 1


def test_between_pushes_no_weight_is_held() -> None:
    block, pieces = passing(small_vocoder()), []
    with block as vocoder:
        stream = StreamingVocoder(vocoder)
    for index, piece in enumerate(some_mel(96).split(24, -1)):
        with block:
            pieces.append(stream.push(piece, last=index == 3))
    assert (block.uses, block.left_behind) == (5, 0)
    assert torch.equal(torch.cat(pieces), streamed_in_pieces(some_mel(96), 24))


@pytest.mark.parametrize("operators", [0, 40, 300, 500, 700])
def test_a_push_that_found_no_room_can_be_taken_back(operators) -> None:
    stream, pieces = StreamingVocoder(small_vocoder()), []
    for index, piece in enumerate(some_mel(96).split(24, -1)):
        snapshot = stream.snapshot()
        with pytest.raises(torch.OutOfMemoryError), NoRoom(operators):
            stream.push(piece, last=index == 3)
        stream.restore(snapshot)
        pieces.append(stream.push(piece, last=index == 3))
    assert torch.equal(torch.cat(pieces), streamed_in_pieces(some_mel(96), 24))


def test_loud_sound_is_clipped_as_in_the_reference() -> None:
    assert whole(96).abs().max() == streamed(some_mel(96), 96).abs().max() == 1


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_a_frame_that_is_no_number_is_nan_as_far_as_it_is_heard(odd) -> None:
    healthy, mel = streamed(some_mel(120), 24), some_mel(120)
    mel[:, 3, 60] = odd
    sound = streamed(mel, 24)
    heard = slice((60 - VOCODER_REACH_FRAMES) * HOP, (61 + VOCODER_REACH_FRAMES) * HOP)
    assert sound[60 * HOP : 61 * HOP].isnan().all()
    sound[heard] = healthy[heard]
    assert torch.equal(sound, healthy)


def test_samples_beyond_float32_are_nan_and_not_the_loudest() -> None:
    vocoder = copy.deepcopy(small_vocoder(torch.float32))
    vocoder.conv_post.weight.data.zero_()[0, 0, 3] = 3e38  # one factor: a sum of infinities may be NaN by itself
    assert streamed(some_mel(40, torch.float32), 40, vocoder).isnan().any()


def test_no_frames_make_no_samples() -> None:
    assert len(StreamingVocoder(small_vocoder()).push(some_mel(0), last=True)) == 0
