from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lowvram.quant.reference import ReferenceBackend
from lowvram.quant.trial import TOLERANCE, awq_error, complaint, largest_error

CPU = torch.device("cpu")


def test_each_product_is_judged_by_its_own_rows_and_the_worst_counts():
    exact = torch.ones(4, 3)
    assert largest_error([exact[:1], 1.5 * exact[:2], exact], exact) == 0.5


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_what_is_no_number_in_any_product_makes_the_error_none(wrong: int):
    exact = torch.ones(4, 3)
    products = [exact[:n].clone() for n in (1, 2, 4)]
    products[wrong][0, 0] = torch.nan
    error = largest_error(products, exact)
    assert error != error and complaint("its kernel", error) == "its kernel is wrong on this machine, by nan%"


def test_a_kernel_within_the_tolerance_serves():
    assert complaint("its kernel", TOLERANCE) == ""
    assert complaint("its kernel", 0.25) == "its kernel is wrong on this machine, by 25.0%"


@pytest.mark.parametrize("leaf", [None, "qweight", "qzeros", "scales"])
def test_a_misread_tensor_is_an_error_and_a_right_product_none(leaf: str | None):
    asked: list[int] = []

    def multiply(x: Tensor, weights: Mapping[str, Tensor], group_size: int) -> Tensor:
        asked.append(len(x))
        misread = {leaf: weights[leaf].roll(1, 0)} if leaf else {}
        return ReferenceBackend().matmul(x, {**weights, **misread}, group_size)

    error = awq_error(multiply, CPU, torch.float32, (96, 24, 32), rows=(1, 2, 5))
    assert error > TOLERANCE if leaf else error < 3e-6
    assert asked == [1, 2, 5]
