from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.errors import OptionError
from lowvram.kv_cache import Int8Heads, Int8KVCache, KVCache, Stretch, spreading_turn
from lowvram.offload.meter import LiveBytes
from lowvram.options import Limits

CPU, META = torch.device("cpu"), torch.device("meta")
KINDS = pytest.mark.parametrize("kind", [KVCache, Int8KVCache])


def cache(max_tokens: int = 6, kind: type[KVCache] = KVCache, device: torch.device = CPU) -> KVCache:
    return kind(2, 3, 4, max_tokens, dtype=torch.float32, device=device)


def read(heads: torch.Tensor | Int8Heads) -> torch.Tensor:
    """A cache's keys or values, turned back."""
    if not isinstance(heads, Int8Heads):
        return heads
    stored = heads.read(0, heads.shape[2])
    return stored if heads.turn is None else stored @ heads.turn.mT


def rounded(values: torch.Tensor) -> torch.Tensor:
    """`values` [1, H, n, D] as an 8-bit cache gives them back."""
    _, n_heads, n, width = values.shape
    kv = Int8KVCache(1, n_heads, width, n, dtype=values.dtype, device=CPU)
    return read(kv.update(torch.zeros_like(values), values, 0)[1])


@KINDS
def test_update_returns_all_that_was_appended(kind: type[KVCache]):
    kv, first, second = cache(kind=kind), torch.randn(2, 1, 3, 2, 4), torch.randn(2, 1, 3, 1, 4)
    kv.update(*first, 0)
    keys, values = kv.update(*second, 0)
    for part, heads in enumerate((keys, values)):
        appended = torch.cat([first[part], second[part]], 2)
        error = (read(heads) - appended).norm(dim=-1)
        assert (error <= (0 if kind is KVCache else appended.norm(dim=-1) / 100)).all()


@KINDS
def test_layers_are_separate(kind: type[KVCache]):
    kv = cache(kind=kind)
    kv.update(torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), 0)
    assert (kv.get_seq_length(0), kv.get_seq_length(1)) == (2, 0)


def test_appending_never_moves_what_is_there():
    kv = cache()
    before, _ = kv.update(torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), 1)
    after, _ = kv.update(torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), 1)
    assert before.data_ptr() == after.data_ptr()


@KINDS
def test_bytes_per_token_is_what_a_token_costs(kind: type[KVCache]):
    assert cache(7, kind).n_bytes == 7 * cache(kind=kind).bytes_per_token


def test_8_bits_cost_a_byte_per_element_and_4_per_scale():
    assert cache(kind=Int8KVCache).bytes_per_token == 2 * 2 * 3 * (4 + 4)
    with LiveBytes("meta") as meter:
        thinker_7b = Int8KVCache(28, 4, 128, 1000, dtype=torch.bfloat16, device=META)
    assert thinker_7b.n_bytes == 1000 * 28 * 2 * 4 * (128 + 4)
    assert meter.live_bytes == thinker_7b.n_bytes + 128 * 128 * 4  # the matrix that turns keys


@KINDS
def test_overflow_is_our_own_broken_arithmetic(kind: type[KVCache]):
    with pytest.raises(AssertionError, match="7 positions in a cache of 6"):
        cache(kind=kind).update(torch.ones(1, 3, 7, 4), torch.ones(1, 3, 7, 4), 0)


@KINDS
def test_a_step_that_failed_between_two_layers_can_be_taken_again(kind: type[KVCache]):
    kv, old, failed, again = cache(kind=kind), *torch.randn(3, 2, 1, 3, 2, 4)
    for layer in (0, 1):
        kv.update(*old, layer)
    kv.update(*failed, 0)
    kv.rewind(2)
    assert (kv.get_seq_length(0), kv.get_seq_length(1)) == (2, 2)
    expected = cache(kind=kind)
    for layer in (0, 1):
        expected.update(*old, layer)
        for heads, fresh in zip(kv.update(*again, layer), expected.update(*again, layer), strict=True):
            assert torch.equal(read(heads), read(fresh))


def test_rewinding_to_what_a_layer_has_not_reached_invents_nothing():
    kv = cache()
    kv.update(torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), 0)
    kv.rewind(5)
    assert kv.get_seq_length(0) == 2


@KINDS
def test_a_cache_resumes_where_another_was_however_long_either_is(kind: type[KVCache]):
    old, new, heads = cache(9, kind), cache(5, kind), torch.randn(2, 2, 1, 3, 4, 4)
    for layer in range(2):
        old.update(*heads[layer], layer)
    kept = old.first(3)
    old.rewind(0)
    for layer in range(2):
        old.update(*torch.randn(2, 1, 3, 4, 4), layer)  # what is kept is a copy
    new.resume(kept, 2)
    assert [new.get_seq_length(layer) for layer in range(2)] == [2, 2]
    afresh, more = cache(5, kind), torch.randn(2, 1, 3, 1, 4)
    for layer in range(2):
        afresh.update(*heads[layer, ..., :2, :], layer)
        for ours, expected in zip(new.update(*more, layer), afresh.update(*more, layer), strict=True):
            assert torch.equal(read(ours), read(expected))


@KINDS
def test_a_cache_that_moves_keeps_its_size_and_length_and_leaves_nothing_behind(kind: type[KVCache]):
    kv = cache(kind=kind)
    kv.update(torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), 0)
    n_bytes = kv.n_bytes
    with LiveBytes() as host:
        kv.move(META)
    assert {store.device for store in kv._stores} == {META}
    assert (kv.n_bytes, kv.get_seq_length()) == (n_bytes, 2)
    assert host.peak_bytes == 0


@KINDS
def test_only_what_is_filled_travels(kind: type[KVCache]):
    """`meta` has no bytes to give back, so what arrives shows which places were written."""

    class Copied(torch.utils._python_dispatch.TorchDispatchMode):
        n_bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                assert args[1].is_contiguous(), "a copy with gaps is staged in new memory"
                self.n_bytes += args[1].nbytes
            return func(*args, **(kwargs or {}))

    kv = cache(100, kind)
    for layer in (0, 1):
        kv.update(torch.ones(1, 3, 5, 4), torch.ones(1, 3, 5, 4), layer)
    with Copied() as copied:
        kv.move(META)
    assert copied.n_bytes == 5 * kv.bytes_per_token


@KINDS
def test_moving_to_where_it_is_copies_nothing(kind: type[KVCache]):
    kv = cache(kind=kind)
    before = [store.data_ptr() for store in kv._stores]
    kv.move(CPU)
    assert [store.data_ptr() for store in kv._stores] == before


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_no_element_is_off_by_more_than_1_in_254_of_its_heads_largest(seed: int, magnitude: float, dtype: torch.dtype):
    heads = torch.randn(1, 3, 5, 16, generator=torch.Generator().manual_seed(seed)) * 2.0**magnitude
    heads[0, 1] *= 1e-3  # a quiet head beside loud ones: a neighbour's scale would silence it
    heads = heads.clamp(-6e4, 6e4).to(dtype)
    largest = heads.float().abs().amax(-1, keepdim=True)
    reading = torch.finfo(dtype).eps / 2 * largest + torch.finfo(dtype).smallest_normal
    error = (rounded(heads).float() - heads.float()).abs()
    assert (error <= largest / 254 * (1 + 1e-5) + reading).all()


def test_the_largest_element_of_a_head_is_kept_exactly():
    heads = torch.tensor([[[[0.1, -8.0, 3.0]]]])
    assert rounded(heads)[0, 0, 0, 1] == -8


def test_rounding_is_to_nearest_and_never_shifts_the_mean():
    heads = torch.randn(1, 1, 2000, 16, generator=torch.Generator().manual_seed(0))
    assert (rounded(heads) - heads).mean().abs() < 1e-4


def test_heads_of_zeros_stay_zeros():
    assert torch.equal(rounded(torch.zeros(1, 2, 3, 4)), torch.zeros(1, 2, 3, 4))


def test_slices_are_read_where_they_lie():
    heads = torch.randn(1, 3, 10, 4)
    kv = Int8KVCache(1, 3, 4, 10, dtype=torch.float32, device=CPU)
    _, values = kv.update(heads, heads, 0)
    assert torch.equal(values.read(3, 7), rounded(heads)[:, :, 3:7])


@pytest.mark.parametrize("head_dim", [1, 2, 32, 80, 128])
def test_keys_are_turned_by_a_matrix_that_keeps_every_score_and_spreads_every_channel(head_dim: int):
    turn = spreading_turn(head_dim)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(head_dim))
    power_of_two = head_dim & -head_dim
    torch.testing.assert_close(turn.abs().amax(), torch.tensor(power_of_two**-0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_turn_is_as_exact_whatever_an_applications_default_dtype_is(
    default_dtype: Callable[[torch.dtype], None], dtype: torch.dtype
):
    expected = spreading_turn(128)
    default_dtype(dtype)
    assert torch.equal(spreading_turn(128), expected) and expected.dtype is torch.float32


def test_one_loud_channel_does_not_silence_a_keys_others():
    """128 channels, one a hundred times larger: its error alone would be 100/254 = 0.4 in each of the others."""
    keys = torch.randn(1, 1, 50, 128, generator=torch.Generator().manual_seed(0))
    keys[..., 7] += 100
    kv = Int8KVCache(1, 1, 128, 50, dtype=torch.float32, device=CPU)
    error = read(kv.update(keys, keys, 0)[0]) - keys
    assert (
        error.square().mean().sqrt() < 0.03
    )  # (100 / sqrt 128 + 2.8) / 254 / sqrt 3, and not 100 / 254 / sqrt 3 = 0.23


def test_an_unknown_precision_is_refused():
    with pytest.raises(OptionError, match=r"kv 'int4' is unknown \(one of: 16bit, int8\)"):
        Limits(kv="int4")  # type: ignore[arg-type]


def test_the_demo_answers_from_8_bits_and_does_so_again(demo: Path):
    """Its text is even that of the exact cache: two layers do not add up enough rounding to turn a greedy choice."""
    from lowvram.events import Finished
    from lowvram.options import TALKER_SAMPLING, Limits, SamplingParams, SpeechParams
    from lowvram.runtime import OmniRuntime

    def answer(kv: str) -> Finished:
        speech = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=20, seed=3), steps=3)
        with OmniRuntime.open(demo, device="cpu", dtype="float32", limits=Limits(kv=kv)) as omni:
            *_, finished = omni.generate(
                [{"role": "user", "content": "tell a story"}], sampling=SamplingParams(max_tokens=20), speech=speech
            )
            assert omni.plan().kv == kv
        assert isinstance(finished, Finished)
        return finished

    first, second, exact = answer("int8"), answer("int8"), answer("16bit")
    assert (first.text_ids, first.codec_ids) == (second.text_ids, second.codec_ids)
    assert len(first.codec_ids) > 1 and first.text_ids == exact.text_ids


def stretched(n_tokens: int = 3, filled: int = 2) -> tuple[KVCache, Stretch]:
    """A cache of 6 whose memory was NaN, with some positions filled, and the stretch after them."""
    kv = cache()
    kv._stores[0].fill_(torch.nan)
    for layer in (0, 1):
        kv.update(torch.ones(1, 3, filled, 4), torch.ones(1, 3, filled, 4), layer)
    return kv, kv.stretch(n_tokens)


def test_a_stretch_writes_where_a_tensor_says():
    kv, stretch = stretched()
    key, value = torch.randn(2, 1, 3, 1, 4)
    stretch.begin(torch.tensor([1]))
    stretch.update(key, value, 1)
    assert torch.equal(kv._stores[0][1, :, :, :, 3], torch.stack([key, value])[:, :, :, 0])
    assert kv._stores[0][0, :, :, :, 2:5].count_nonzero() == 0


def test_a_stretch_hides_what_comes_after_the_step():
    _, stretch = stretched()
    for slot in range(3):
        stretch.begin(torch.tensor([slot]))
        keys, _ = stretch.update(*torch.randn(2, 1, 3, 1, 4), 0)
        assert keys.bias.flatten().tolist() == [0.0] * (slot + 1) + [-torch.inf] * (2 - slot)


def test_what_a_stretch_hides_is_a_number():
    _, stretch = stretched()
    stretch.begin(torch.tensor([0]))
    for heads in stretch.update(*torch.randn(2, 1, 3, 1, 4), 0):
        assert (heads.past.shape[2], heads.tail.shape[2]) == (2, 3)
        assert heads.past.isfinite().all() and heads.tail.isfinite().all()


def test_rows_of_a_bias_begin_where_kernels_can_read_them():
    _, stretch = stretched()
    stretch.begin(torch.tensor([0]))
    keys, _ = stretch.update(*torch.randn(2, 1, 3, 1, 4), 0)
    assert keys.bias.stride()[:3] == (16, 16, 16)


def test_a_stretch_ends_with_its_cache():
    kv, stretch = stretched(n_tokens=100)
    assert (stretch.start, stretch.stop) == (2, 6)
    for goes_on in (True, True, True, False):
        kv.advance()
        assert kv.goes_on_in(stretch) == goes_on
    with pytest.raises(AssertionError, match="no position is left after 6"):
        kv.stretch(1)


def test_a_stretch_ends_where_the_cache_moves_or_is_rewound_before_it():
    kv, stretch = stretched()
    kv.rewind(1)
    assert not kv.goes_on_in(stretch)
    kv.advance()
    assert kv.goes_on_in(stretch)
    kv.move(META)
    assert not kv.goes_on_in(stretch)
