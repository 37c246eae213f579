"""Kernels of AutoAWQ and gptqmodel, run on the CPU by Triton's interpreter: where they are installed, and
TRITON_INTERPRET=1. Of TF32, which cards multiply in, the interpreter knows nothing; `test_cuda.py` does."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from awq_by_hand import random_stored, weight_by_hand
from torch import Tensor

from lowvram.errors import BackendError
from lowvram.quant.autoawq_backend import AutoAWQBackend
from lowvram.quant.borrowed import BorrowedBackend, undoing_side_effects
from lowvram.quant.matmul import BORROWED, choose_backend
from lowvram.quant.reference import ReferenceBackend
from lowvram.quant.trial import TOLERANCE as TRIAL_TOLERANCE
from lowvram.quant.triton_backend import FEW_ROWS, self_test

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
TOLERANCE = {torch.float16: 3.5e-4, torch.bfloat16: 3e-3}
SERVED = [(kind, dtype) for kind in BORROWED for dtype in kind.dtypes]
SHAPES = [(96, 40, 32), (128, 136, 64), (256, 192, 128), (3584, 64, 128)]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The test's backends, on a CPU in place of a card: there is none for their packages to make the current one."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter must be chosen from the start: TRITON_INTERPRET=1 pytest ...")
    backend = request.getfixturevalue("backend")
    pytest.importorskip(backend.package, reason=f"{backend.name} is not installed")
    module = importlib.import_module(backend.multiply_packed().__module__)
    monkeypatch.setattr(module, "get_same_device_cm", lambda tensor: nullcontext())


def weights_of(stored: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("qweight", "qzeros", "scales"), stored, strict=True))


def random_input(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), SERVED)
def test_products_are_as_close_to_exact_as_the_dtype_allows(
    backend: type[BorrowedBackend], dtype: torch.dtype, shape: tuple[int, int, int]
):
    in_features, out_features, group_size = shape
    stored = random_stored(in_features, out_features, group_size)
    for rows in (1, 3, 33):
        x = random_input(rows, in_features, dtype=dtype)
        product = backend().matmul(x, weights_of(stored), group_size)
        exact = x.double() @ weight_by_hand(stored, group_size).t()
        assert product.shape == exact.shape and product.dtype == dtype
        assert (product - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("backend", BORROWED)
def test_a_row_has_the_same_bits_whatever_rows_come_with_it(backend: type[BorrowedBackend]):
    weights, x = weights_of(random_stored(128, 72, 64)), random_input(36, 128, dtype=torch.float16)
    product = backend().matmul(x, weights, 64)
    assert torch.equal(backend().matmul(x, weights, 64), product)
    assert torch.equal(backend().matmul(x[34:35], weights, 64), product[34:35])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("backend", BORROWED)
def test_inputs_of_any_shape_and_stride_give_the_rows_products(backend: type[BorrowedBackend]):
    weights, rows = weights_of(random_stored(96, 64, 32)), random_input(6, 96, dtype=torch.float16)
    product = backend().matmul(rows, weights, 32)
    assert torch.equal(backend().matmul(rows.repeat_interleave(2, dim=1)[:, ::2], weights, 32), product)
    assert torch.equal(backend().matmul(rows.view(2, 3, 96), weights, 32), product.view(2, 3, 64))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("backend", BORROWED)
def test_the_self_test_passes_a_right_kernel(backend: type[BorrowedBackend]):
    assert self_test(backend().matmul, CPU, torch.float16) < TRIAL_TOLERANCE


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("place", [0, 1, 2], ids=["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("backend", BORROWED)
def test_the_self_test_notices_a_misread_tensor(
    backend: type[BorrowedBackend], place: int, monkeypatch: pytest.MonkeyPatch
):
    right = backend.multiply

    def slips(self: BorrowedBackend, rows: Tensor, *stored: Tensor) -> Tensor:
        return right(self, rows, *(t.roll(1, 0) if i == place else t for i, t in enumerate(stored)))

    monkeypatch.setattr(backend, "multiply", slips)
    assert self_test(backend().matmul, CPU, torch.float16) > TRIAL_TOLERANCE


@pytest.mark.parametrize(("group_size", "rows"), [(48, 2), (32, FEW_ROWS + 1), (32, 0)])
@pytest.mark.parametrize("backend", BORROWED)
def test_odd_groups_many_rows_and_none_are_left_to_the_reference(
    backend: type[BorrowedBackend], group_size: int, rows: int
):
    weights, x = weights_of(random_stored(96, 64, group_size)), random_input(rows, 96, dtype=torch.float16)
    assert torch.equal(backend().matmul(x, weights, group_size), ReferenceBackend().matmul(x, weights, group_size))


@pytest.mark.parametrize("backend", BORROWED)
def test_weights_lie_on_the_card_as_a_checkpoint_stores_them(backend: type[BorrowedBackend]):
    assert backend().layout(96, 40, 32, torch.float16) == ReferenceBackend().layout(96, 40, 32, torch.float16)


@pytest.mark.parametrize("backend", BORROWED)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    backend: type[BorrowedBackend], monkeypatch: pytest.MonkeyPatch
):
    for module in [name for name in sys.modules if name.startswith(f"{backend.package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, backend.package, None)
    backend.multiply_packed.cache_clear()
    with pytest.raises(BackendError, match=rf"kernel {backend.name} .*pip install 'lowvram\[{backend.name}\]'"):
        choose_backend(CARD, torch.float16, backend.name)


@pytest.mark.parametrize("backend", BORROWED)
def test_a_cpu_is_not_a_card(backend: type[BorrowedBackend]):
    with pytest.raises(BackendError, match="runs on a graphics card, not on the CPU"):
        choose_backend(CPU, torch.float16, backend.name)


def test_a_dtype_it_does_not_compute_in_is_named():
    obstacle = AutoAWQBackend.obstacle(CARD, torch.float32)
    assert obstacle == "it computes in float16 and bfloat16, not in float32"


@pytest.mark.parametrize("backend", BORROWED)
def test_what_whoever_asks_should_know_is_part_of_the_reason(backend: type[BorrowedBackend]):
    assert backend("asked for by name").reason == f"asked for by name; {backend.caveat}"


def test_an_import_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("HF_HOME", "mine")
    variables, filters, root = dict(os.environ), list(warnings.filters), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with undoing_side_effects():
        os.environ.update({"HF_HOME": "theirs", "PYTORCH_ALLOC_CONF": "expandable_segments:True"})
        warnings.simplefilter("ignore")
        root.addHandler(logging.NullHandler())
        root.setLevel(logging.DEBUG)
        print("a banner")
    assert (dict(os.environ), warnings.filters) == (variables, filters)
    assert (root.handlers, root.level) == (handlers, level)
    assert capsys.readouterr() == ("", "a banner\n")
