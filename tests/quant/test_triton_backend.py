"""The Triton kernel, run on the CPU by Triton's interpreter: where Triton is installed, and TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from awq_by_hand import random_stored, weight_by_hand
from torch import Tensor

from lowvram.errors import BackendError
from lowvram.quant import triton_backend
from lowvram.quant.matmul import choose_backend
from lowvram.quant.reference import ReferenceBackend
from lowvram.quant.trial import TOLERANCE as TRIAL_TOLERANCE
from lowvram.quant.triton_backend import FEW_ROWS, TritonBackend

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3.5e-4, torch.bfloat16: 8e-3}
"""As the other backends', but for bfloat16: the interpreter cuts where a card rounds."""

SHAPES = [(96, 40, 32), (128, 136, 64), (256, 192, 128), (3584, 64, 128)]


@pytest.fixture
def kernel() -> ModuleType:
    """The kernel's module, interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter must be chosen from the start: TRITON_INTERPRET=1 pytest ...")
    from lowvram.quant import triton_kernel

    return triton_kernel


def weights_of(stored: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("qweight", "qzeros", "scales"), stored, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_as_close_to_exact_as_the_dtype_allows(
    kernel: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype
):
    in_features, out_features, group_size = shape
    stored = random_stored(in_features, out_features, group_size)
    for rows in (1, 3, 17):
        x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
        product = TritonBackend().matmul(x, weights_of(stored), group_size)
        exact = x.double() @ weight_by_hand(stored, group_size).t()
        assert product.shape == exact.shape and product.dtype == dtype
        assert (product - exact).norm() <= TOLERANCE[dtype] * exact.norm()


def test_a_row_has_the_same_bits_whatever_rows_come_with_it(kernel: ModuleType):
    weights, x = weights_of(random_stored(128, 72, 64)), torch.randn(20, 128).half()
    product = TritonBackend().matmul(x, weights, 64)
    assert torch.equal(TritonBackend().matmul(x, weights, 64), product)
    assert torch.equal(TritonBackend().matmul(x[18:19], weights, 64), product[18:19])


def test_inputs_of_any_shape_and_stride_give_the_rows_products(kernel: ModuleType):
    weights, rows = weights_of(random_stored(96, 64, 32)), torch.randn(6, 96).half()
    product = TritonBackend().matmul(rows, weights, 32)
    assert torch.equal(TritonBackend().matmul(rows.repeat_interleave(2, dim=1)[:, ::2], weights, 32), product)
    assert torch.equal(TritonBackend().matmul(rows.view(2, 3, 96), weights, 32), product.view(2, 3, 64))
    assert TritonBackend().matmul(rows[:0].view(2, 0, 96), weights, 32).shape == (2, 0, 64)


@pytest.mark.parametrize(("group_size", "rows"), [(48, 2), (32, FEW_ROWS + 1)])
def test_odd_groups_and_many_rows_are_left_to_the_reference(kernel: ModuleType, group_size: int, rows: int):
    weights, x = weights_of(random_stored(96, 64, group_size)), torch.randn(rows, 96)
    reference = choose_backend(CPU, torch.float32, "reference")
    assert torch.equal(TritonBackend().matmul(x, weights, group_size), reference.matmul(x, weights, group_size))


def test_the_backend_serves_where_its_kernel_is_right(kernel: ModuleType):
    assert choose_backend(CPU, torch.float16, "triton").name == "triton"


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales"])
def test_the_self_test_notices_a_misread_tensor(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch, leaf: str):
    right = kernel.multiply

    def slips(rows: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, run: int) -> Tensor:
        stored = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        return right(rows, *(stored | {leaf: stored[leaf].roll(1, 0)}).values(), group_size, run)

    monkeypatch.setattr(kernel, "multiply", slips)
    assert triton_backend.self_test(TritonBackend().matmul, CPU, torch.float32) > TRIAL_TOLERANCE
    assert "is wrong on this machine" in TritonBackend.obstacle(CPU, torch.float32)


@pytest.mark.parametrize("wrong_rows", [1, 33])
def test_the_self_test_notices_what_is_no_number_in_either_product(wrong_rows: int):
    def slips(x: Tensor, weights: Mapping[str, Tensor], group_size: int) -> Tensor:
        product = ReferenceBackend().matmul(x, weights, group_size)
        return product.fill_(torch.nan) if len(x) == wrong_rows else product

    assert not triton_backend.self_test(slips, CPU, torch.float32) < TRIAL_TOLERANCE


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "triton.errors", None)
    with pytest.raises(BackendError, match=r"kernel triton cannot be used: triton cannot be imported .*pip install"):
        choose_backend(torch.device("cuda", 0), torch.float16, "triton")


def test_a_triton_that_is_there_and_broken_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libtriton.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
            del sys.modules[name]
        obstacle = TritonBackend.obstacle(torch.device("cuda", 0), torch.float16)
    assert obstacle.startswith("triton cannot be imported (libtriton.so: cannot open shared object file)")


def test_a_cpu_is_not_a_card(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="runs on a graphics card, not on the CPU"):
        choose_backend(CPU, torch.float16, "triton")


def test_nothing_chooses_it_by_itself(kernel: ModuleType):
    assert choose_backend(CPU, torch.float16).name == "reference"


def test_a_dtype_it_does_not_compute_in_is_named():
    obstacle = TritonBackend.obstacle(torch.device("cuda", 0), torch.float64)
    assert obstacle == "it computes in float16, bfloat16 and float32, not in float64"
