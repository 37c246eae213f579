from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lowvram.errors import CheckpointError
from lowvram.options import TALKER_SAMPLING, SamplingParams
from lowvram.sampling import Recitation, Sampler

CPU = torch.device("cpu")


def sampler(params: SamplingParams, vocab_size: int = 50, **rest: object) -> Sampler:
    return Sampler(params, vocab_size=vocab_size, device=CPU, **{"seed": 0, **rest})


def reference_distribution(params: SamplingParams, logits: torch.Tensor, ids: list[int], suppressed: list[int]):
    """The modelling library's own processors, in the order in which its `generate` builds them."""
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
            SuppressTokensLogitsProcessor(suppressed),
            TemperatureLogitsWarper(params.temperature),
            TopKLogitsWarper(params.top_k),
            TopPLogitsWarper(params.top_p),
        ]
    )
    return chain(torch.tensor([ids]), logits[None].clone())[0].softmax(-1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(1, 60),
    top_p=st.floats(0.05, 0.99),
    penalty=st.floats(0.5, 2),
)
def test_distribution_is_the_references(seed: int, temperature: float, top_k: int, top_p: float, penalty: float):
    torch.manual_seed(seed)
    logits, ids = torch.randn(50) * 4, torch.randint(0, 50, (8,)).tolist()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    ours = sampler(params, suppressed=[3], seen=torch.tensor(ids)).distribution(logits)
    torch.testing.assert_close(ours, reference_distribution(params, logits, ids, [3]))


def test_greedy_takes_the_likeliest_that_is_not_suppressed():
    logits = torch.zeros(50).index_put_((torch.tensor([7, 9]),), torch.tensor([5.0, 4.0]))
    assert sampler(SamplingParams())(logits) == 7
    assert sampler(SamplingParams(), suppressed=[7])(logits) == 9


def test_a_drawn_id_is_penalized_from_then_on():
    draw = sampler(SamplingParams(repetition_penalty=2.0))
    logits = torch.zeros(50).index_put_((torch.tensor([7, 9]),), torch.tensor([5.0, 4.0]))
    assert [draw(logits), draw(logits)] == [7, 9]


def test_a_seed_gives_the_same_draws_whatever_else_draws():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    first, second = sampler(TALKER_SAMPLING, seed=5), sampler(TALKER_SAMPLING, seed=5)
    draws = []
    for _ in range(20):
        torch.rand(3)
        draws.append((first(logits), second(logits)))
    assert all(a == b for a, b in draws)


def test_draws_follow_the_distribution():
    draw = sampler(SamplingParams(temperature=1.0), vocab_size=3)
    logits = torch.tensor([0.0, 1.0, 2.0])
    counts = torch.bincount(torch.tensor([draw(logits) for _ in range(4000)]), minlength=3) / 4000
    torch.testing.assert_close(counts, logits.softmax(-1), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 5e-324])
def test_the_coldest_draw_is_among_the_likeliest(temperature: float):
    logits = torch.zeros(50).index_put_((torch.tensor([7, 8, 9]),), torch.tensor([5.0, 5.0, 6.0]))
    draw = sampler(SamplingParams(temperature=temperature), suppressed=[9])
    assert draw.distribution(logits)[[7, 8]].tolist() == [0.5, 0.5]
    assert {draw(logits) for _ in range(40)} == {7, 8}


def test_the_hottest_draw_is_uniform_over_what_is_not_suppressed():
    hottest = sampler(SamplingParams(temperature=1e300), suppressed=[9]).distribution(torch.arange(50.0))
    assert hottest[9] == 0 and hottest[hottest > 0].tolist() == pytest.approx([1 / 49] * 49)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_filtered_in_float32(dtype: torch.dtype):
    logits = torch.randn(50).to(dtype)
    torch.testing.assert_close(
        sampler(TALKER_SAMPLING).distribution(logits), sampler(TALKER_SAMPLING).distribution(logits.float())
    )


def test_a_draw_that_fails_is_as_if_it_had_not_been_tried(monkeypatch: pytest.MonkeyPatch):
    params, logits = replace(TALKER_SAMPLING, temperature=1.0), torch.randn(50)
    undisturbed, disturbed = sampler(params), sampler(params)
    for name in ("exponential_", "softmax", "masked_fill_"):

        def runs_out(*args: object, **options: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("no room")

        with monkeypatch.context() as broken, pytest.raises(torch.OutOfMemoryError):
            broken.setattr(torch.Tensor, name, runs_out)
            disturbed(logits)
        assert [disturbed(logits) for _ in range(5)] == [undisturbed(logits) for _ in range(5)]


@pytest.mark.parametrize("seed", range(20))
def test_draws_are_those_of_torch_multinomial_with_the_same_seed(seed: int):
    draw, generator = sampler(SamplingParams(temperature=1.0), seed=seed), torch.Generator().manual_seed(seed)
    for _ in range(5):
        logits = torch.randn(50) * 3
        weights = draw.distribution(logits)
        assert draw(logits) == int(torch.multinomial(weights, 1, generator=generator))


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "seed", "draws"), [(torch.float16, 152_064, 20, 1), (torch.bfloat16, 2, 0, 1100)], ids=str
)
def test_random_numbers_are_float32_whatever_an_applications_default_dtype_is(
    default_dtype: Callable[[torch.dtype], None], dtype: torch.dtype, vocab_size: int, seed: int, draws: int
):
    """In float16 one of them would be 0, and the id's score infinite; in bfloat16 two of them would be equal."""
    logits = torch.zeros(vocab_size)
    draw, again = (sampler(SamplingParams(temperature=1.0), vocab_size, seed=seed) for _ in range(2))
    expected = [draw(logits) for _ in range(draws)]
    default_dtype(dtype)
    assert [again(logits) for _ in range(draws)] == expected


@pytest.mark.parametrize("params", [TALKER_SAMPLING, SamplingParams(repetition_penalty=1.1)], ids=["drawn", "greedy"])
def test_of_a_draw_only_its_result_is_waited_for(params: SamplingParams):
    draw, logits = sampler(params, suppressed=[3]), torch.randn(50)
    draw(logits)
    with torch.autograd.profiler.profile() as profiled:  # sees what operators ask for inside, too
        draw(logits)
    asked = {event.key: event.count for event in profiled.key_averages()}
    assert asked["aten::_local_scalar_dense"] == 1


def test_choosing_changes_nothing_until_it_is_settled():
    draw, logits = sampler(replace(TALKER_SAMPLING, repetition_penalty=5.0)), torch.randn(50)
    draw.prepare()
    chosen = {int(draw.choose(logits)) for _ in range(5)}
    assert len(chosen) == 1
    draw.prepare()
    assert draw.settle(draw.choose(logits)) in chosen


def test_a_recitation_says_its_ids_whatever_is_likely():
    recite = Recitation([3, 1, 2])
    assert [recite(torch.eye(5)[4]) for _ in range(3)] == [3, 1, 2]


DRAWS = {"greedy": SamplingParams(repetition_penalty=1.1), "drawn": TALKER_SAMPLING}


@pytest.mark.parametrize("params", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_logit_that_is_nan_or_infinite_ends_the_drawing(params: SamplingParams, odd: float, dtype: torch.dtype):
    logits = torch.randn(50, dtype=dtype).index_fill_(0, torch.tensor([31]), odd)
    with pytest.raises(CheckpointError, match="thinker cannot choose a token") as refused:
        sampler(params, suppressed=[3])(logits)
    assert refused.value.tensor == "thinker." and "--dtype" in refused.value.hint


@pytest.mark.parametrize("params", DRAWS.values(), ids=DRAWS)
def test_logits_of_minus_infinity_are_never_drawn_and_end_nothing(params: SamplingParams):
    logits = torch.full((50,), -torch.inf).index_fill_(0, torch.tensor([8]), -3.0)
    assert sampler(params)(logits) == 8


def test_the_talkers_logits_are_called_its_own():
    with pytest.raises(CheckpointError, match="the talker cannot"):
        sampler(TALKER_SAMPLING, stage="talker")(torch.full((50,), torch.nan))


def test_after_logits_that_were_not_finite_the_draws_go_on_as_if_there_had_been_none():
    undisturbed, disturbed, logits = sampler(TALKER_SAMPLING), sampler(TALKER_SAMPLING), torch.randn(50)
    with pytest.raises(CheckpointError):
        disturbed(torch.full((50,), torch.nan))
    assert [disturbed(logits) for _ in range(5)] == [undisturbed(logits) for _ in range(5)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 2.0, 2.5]), min_size=1, max_size=50))
def test_of_equal_logits_the_first_is_taken(values: list[float]):
    assert sampler(SamplingParams(), vocab_size=len(values))(torch.tensor(values)) == values.index(max(values))
