from __future__ import annotations

import pytest
import torch

from lowvram.quantize.agreement import ByToken, HeadComparison, agreements
from lowvram.quantize.options import Agreement

HIDDEN = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) * 3
HEAD = torch.randn(100, 16, generator=torch.Generator().manual_seed(1))


def compare(hidden: torch.Tensor, rows: int) -> ByToken:
    comparison = HeadComparison(hidden)
    for part in HEAD.split(rows):
        comparison.add(part)
    return comparison.by_token()


def plain(other: int) -> Agreement:
    """The definition, with all logits at once."""
    p, q = ((HIDDEN[i] @ HEAD.T).double().log_softmax(-1) for i in (0, other))
    same = p.argmax(-1) == q.argmax(-1)
    return Agreement(float((p.exp() * (p - q)).sum(-1).mean()), float(same.double().mean()))


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_slices_of_the_head_give_what_the_whole_of_it_gives(rows: int):
    for other, found in enumerate(agreements([compare(HIDDEN, rows)]), start=1):
        assert found.kl_divergence == pytest.approx(plain(other).kl_divergence, rel=1e-5)
        assert found.top1 == plain(other).top1


def test_tokens_compared_in_parts_count_alike():
    whole, parts = compare(HIDDEN, 100), [compare(part, 100) for part in HIDDEN.split((2, 3), dim=1)]
    for one, other in zip(agreements([whole]), agreements(parts), strict=True):
        assert one.top1 == other.top1
        assert one.kl_divergence == pytest.approx(other.kl_divergence, rel=1e-5)


def test_all_models_but_the_first_may_have_another_head():
    other_head = HEAD + 0.05 * torch.randn(HEAD.shape, generator=torch.Generator().manual_seed(2))
    comparison = HeadComparison(HIDDEN[:1].expand(2, -1, -1))
    for rows, others in zip(HEAD.split(7), other_head.split(7), strict=True):
        comparison.add(rows, others)
    p, q = ((HIDDEN[0] @ head.T).double().log_softmax(-1) for head in (HEAD, other_head))
    (found,) = agreements([comparison.by_token()])
    assert found.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_a_model_agrees_with_itself():
    (itself,) = agreements([compare(HIDDEN[:1].expand(2, -1, -1), 10)])
    assert itself.top1 == 1 and itself.kl_divergence == pytest.approx(0, abs=1e-9)


def test_a_slice_is_small_however_many_tokens_there_are():
    comparison = HeadComparison(torch.zeros(3, 4096, 8))
    assert comparison.slice_rows * 3 * 4096 <= 2**23
