from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from int8_by_hand import random_stored, weight_by_hand
from torch import Tensor

from lowvram.errors import BackendError
from lowvram.quant import compiled, int8_cpu
from lowvram.quant.compiled import CSource
from lowvram.quant.int8_cpu import FEW_ROWS, SOURCE, Int8CpuBackend, load_kernel, self_test
from lowvram.quant.trial import complaint

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3.5e-4, torch.bfloat16: 3e-3}
SHAPES = [  # inputs, outputs, group size
    (8, 5, 8),
    (96, 7, 24),  # one piece, and a last one of three columns
    (256, 40, 128),
    (3584, 64, 128),  # a slice of the thinker's q_proj
    (18944, 8, 128),  # a slice of its down_proj
]
SLIPS = {
    "the number that stands for 0": ("_mm_set1_epi8(-128)", "_mm_set1_epi8(-127)"),
    "the next group's scale": ("* groups + group]", "* groups + (group + 1) % groups]"),
    "the neighbour's scale": ("p->scales[(column + c)", "p->scales[column"),
    "a row's inputs": ("x + r * inputs", "x"),
    "a sum that nobody counts": ("(v[6] + v[7])", "v[6]"),
    "the second half of the columns": ("c < COLUMNS; c += columns", "c < columns; c += columns"),
    "columns that fill no piece": ("c < there", "c < there - 1"),
    "one row after the last four": ("row, COLUMNS, 1); break", "row, COLUMNS, 0); break"),
    "the second of two rows": ("row, COLUMNS, 2)", "row, COLUMNS, 1)"),
    "the third of three rows": ("row, HALF, 3)", "row, HALF, 2)"),
}
NOT_FOR_THIS_MACHINE = re.compile("no C compiler here|no AVX2, FMA or F16C|OpenMP threads cannot be reached")
"""Refusals that say nothing against the kernel. That it does not compile, or is wrong, is a failure."""


@pytest.fixture(scope="module")
def backend() -> Int8CpuBackend:
    try:
        return Int8CpuBackend()
    except BackendError as refusal:
        if NOT_FOR_THIS_MACHINE.search(str(refusal)):
            pytest.skip(str(refusal))
        raise


def random_input(rows: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_as_close_to_exact_as_the_dtype_allows(
    backend: Int8CpuBackend, shape: tuple[int, int, int], dtype: torch.dtype
):
    stored = random_stored(*shape)
    for rows in (0, 1, 2, 3, 4, 5, FEW_ROWS, FEW_ROWS + 1):
        x = random_input(rows, shape[0], dtype)
        exact = x.double() @ weight_by_hand(*stored, shape[2]).t()
        product = backend.matmul(x, *stored, shape[2])
        assert product.dtype == dtype and product.shape == exact.shape
        assert (product.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_an_applications_default_dtype_makes_no_kernel_wrong(
    backend: Int8CpuBackend, default_dtype: Callable[[torch.dtype], None], dtype: torch.dtype
):
    default_dtype(dtype)
    assert complaint("it", self_test(backend._multiply)) == ""


def test_a_row_has_the_same_bits_whatever_comes_with_it_and_on_any_number_of_threads(backend: Int8CpuBackend):
    stored = random_stored(256, 43, 32)
    x = random_input(7, 256, torch.float32)
    together = backend.matmul(x, *stored, 32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            for n in range(1, 8):
                assert torch.equal(torch.cat([backend.matmul(rows, *stored, 32) for rows in x.split(n)]), together)
    finally:
        torch.set_num_threads(before)


def test_inputs_of_any_shape_and_stride_give_the_rows_products(backend: Int8CpuBackend):
    stored = random_stored(96, 10, 32)
    rows = random_input(6, 96, torch.bfloat16)
    product = backend.matmul(rows, *stored, 32)
    for same in (rows.repeat_interleave(2, dim=1)[:, ::2], rows.t().contiguous().t()):
        assert torch.equal(backend.matmul(same, *stored, 32), product)
    assert torch.equal(backend.matmul(rows.view(2, 3, 96), *stored, 32), product.view(2, 3, 10))
    assert torch.equal(backend.matmul(rows[0], *stored, 32), product[0])


@pytest.mark.parametrize(("rows", "group_size"), [(FEW_ROWS + 1, 32), (1, 12)])
def test_many_rows_and_odd_groups_are_dequantized_in_slices(
    backend: Int8CpuBackend, monkeypatch: pytest.MonkeyPatch, rows: int, group_size: int
):
    monkeypatch.setattr(backend, "_multiply", None)
    stored = random_stored(96, 10, group_size)
    x = random_input(rows, 96, torch.float32)
    exact = x.double() @ weight_by_hand(*stored, group_size).t()
    assert (backend.matmul(x, *stored, group_size) - exact).norm() <= 3e-6 * exact.norm()


@pytest.mark.parametrize(("right", "wrong"), SLIPS.values(), ids=SLIPS)
def test_a_kernel_with_a_slip_is_refused(
    backend: Int8CpuBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, right: str, wrong: str
):
    source = SOURCE.text.decode()
    assert right in source
    monkeypatch.setattr(CSource, "text", source.replace(right, wrong).encode())
    with pytest.raises(BackendError, match="what was compiled is wrong by"):
        load_kernel(tmp_path)


def test_elsewhere_it_says_why_it_does_not_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert Int8CpuBackend.obstacle(torch.device("cuda"), torch.bfloat16) == "it runs on the CPU, not on cuda"
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(int8_cpu, "load_kernel", lambda: load_kernel(tmp_path))
    assert "none of no-such-compiler was found" in Int8CpuBackend.obstacle(CPU, torch.bfloat16)


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler here")
def test_a_processor_without_the_instructions_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    source = b"int lowvram_supported(void) { return 0; }\nvoid lowvram_multiply(void) {}\n"
    monkeypatch.setattr(CSource, "text", source)
    with pytest.raises(BackendError, match="this processor has no AVX2, FMA or F16C instructions"):
        load_kernel(tmp_path)
