from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cuda_on_cpu import CpuLaunch, compile_for_cpu
from int8_by_hand import random_stored, weight_by_hand
from torch import Tensor

from lowvram.errors import BackendError
from lowvram.quant import int8_cuda
from lowvram.quant.int8_cuda import FEW_ROWS, SOURCE, Int8CudaBackend, self_test
from lowvram.quant.reference import Workspace
from lowvram.quant.trial import TOLERANCE as TRIAL_TOLERANCE

TOLERANCE = {torch.float16: 3.5e-4, torch.bfloat16: 3e-3}
SHAPES = [  # inputs, outputs, group size
    (16, 1, 16),  # one run, one column
    (96, 10, 48),  # a last block of two columns
    (896, 12, 128),  # two warps, the talker's inputs
    (3584, 32, 128),  # a slice of the thinker's q_proj: seven whole warps
    (4640, 6, 32),  # more than the most warps take at once
    (18944, 8, 128),  # a slice of its down_proj
]
ROW_COUNTS = (1, 2, 4, 5, FEW_ROWS, FEW_ROWS + 1)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> CpuLaunch:
    return compile_for_cpu(tmp_path_factory.mktemp("kernel"), SOURCE.text)


def on_cpu(launch: CpuLaunch) -> Int8CudaBackend:
    return Int8CudaBackend(load=lambda _: launch)


def random_input(rows: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)


def error(product: Tensor, x: Tensor, stored: tuple[Tensor, Tensor], group_size: int) -> float:
    """Relative to the product with the weight written out by hand."""
    exact = x.double() @ weight_by_hand(*stored, group_size).t()
    return float((product.double() - exact).norm() / exact.norm())


# ---- the source, run on the CPU


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_as_close_to_exact_as_the_dtype_allows(
    launch: CpuLaunch, shape: tuple[int, int, int], dtype: torch.dtype
):
    in_features, out_features, group_size = shape
    stored = random_stored(*shape)
    for rows in ROW_COUNTS:
        x = random_input(rows, in_features, dtype)
        product = on_cpu(launch).matmul(x, *stored, group_size)
        assert (product.shape, product.dtype) == ((rows, out_features), dtype)
        assert error(product, x, stored, group_size) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_has_the_same_bits_whatever_rows_come_with_it(launch: CpuLaunch, dtype: torch.dtype):
    stored = random_stored(4640, 6, 32)
    x = random_input(FEW_ROWS, 4640, dtype)
    alone = torch.cat([on_cpu(launch).matmul(row, *stored, 32) for row in x.split(1)])
    for rows in range(1, FEW_ROWS + 1):
        assert torch.equal(on_cpu(launch).matmul(x[:rows], *stored, 32), alone[:rows])


@pytest.mark.parametrize("rows", [1, FEW_ROWS + 1])
def test_an_input_in_another_dtype_is_refused(rows: int):
    with pytest.raises(BackendError, match="it computes in float16 and bfloat16, not in float32") as caught:
        Int8CudaBackend().matmul(torch.zeros(rows, 96), *random_stored(96, 10, 48), 48)
    assert caught.value.backend == "int8-cuda"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_unpacked_weights_are_the_stored_ones_rounded_once(launch: CpuLaunch, dtype: torch.dtype):
    stored = random_stored(320, 72, 32)
    product = on_cpu(launch).matmul(torch.eye(320, dtype=dtype), *stored, 32)
    assert torch.equal(product, weight_by_hand(*stored, 32).t().to(dtype))


def test_a_linear_is_unpacked_in_slices_that_need_not_be_equal(launch: CpuLaunch, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(int8_cuda, "SLICE_WEIGHTS", 96 * 24)
    stored = random_stored(96, 64, 32)
    x = random_input(FEW_ROWS + 1, 96, torch.float16)
    launch.started.clear()
    assert error(on_cpu(launch).matmul(x, *stored, 32), x, stored, 32) <= TOLERANCE[torch.float16]
    assert launch.started == ["unpack_float16"] * 3


def test_all_slices_are_unpacked_into_one_workspace(launch: CpuLaunch, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(int8_cuda, "SLICE_WEIGHTS", 96 * 24)
    taken, take = [], Workspace.take
    monkeypatch.setattr(Workspace, "take", lambda *wanted: taken.append(take(*wanted)) or taken[-1])
    on_cpu(launch).matmul(random_input(FEW_ROWS + 1, 96, torch.float16), *random_stored(96, 64, 32), 32)
    assert [space.numel() for space in taken] == [96 * 24]


def test_a_decode_step_has_a_kernel_of_its_own(launch: CpuLaunch):
    stored = random_stored(32, 8, 32)
    launch.started.clear()
    for rows in (1, 2, FEW_ROWS, FEW_ROWS + 1):
        on_cpu(launch).matmul(random_input(rows, 32, torch.bfloat16), *stored, 32)
    assert launch.started == ["multiply_bfloat16_1", "multiply_bfloat16_4", "multiply_bfloat16_4", "unpack_bfloat16"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 65504.0, 6e-8])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_extreme_inputs_come_out_as_torch_has_them(launch: CpuLaunch, dtype: torch.dtype, value: float):
    stored = random_stored(32, 8, 32)
    x = torch.zeros(1, 32, dtype=dtype)
    x[0, 7] = value
    exact = (x.float() @ weight_by_hand(*stored, 32).t().float()).to(dtype)
    product = on_cpu(launch).matmul(x, *stored, 32)
    if value == value and abs(value) != float("inf"):
        assert torch.equal(product, exact)
    else:
        assert not product.isfinite().any()


SLIPS = {
    "the number that stands for 0": ("8388736.0f", "8388735.0f"),
    "the order of bytes": ("0x7440 | i", "0x7440 | i ^ 1"),
    "the order of words": ("word[(half + i) / 4]", "word[(half + i) / 4 ^ 1]"),
    "the order of inputs": ("i % 2 * 16);", "(i + 1) % 2 * 16);"),
    "the next group": ("groups + k / group_size", "groups + (k / group_size + 1) % groups"),
    "the neighbour's scales": ("scales[column[c] * groups", "scales[column[0] * groups"),
    "columns and rows": ("threadIdx.x / ROWS;", "threadIdx.x / ROWS ^ 1;"),
    "inputs that two threads count": ("k += blockDim.x * RUN", "k += (blockDim.x - WARP) * RUN"),
    "a warp that nobody counts": ("warp < blockDim.x / WARP", "warp < blockDim.x / WARP - 1"),
    "a lane that nobody counts": ("other > 0", "other > 1"),
    "threads that do not wait": ("__syncthreads();", ""),
    "the scale of unpacked weights": ("eight / (group_size / 8)", "eight / group_size"),
}


@pytest.mark.parametrize(("right", "wrong"), SLIPS.values(), ids=SLIPS)
def test_a_slip_in_the_kernel_is_seen_by_its_self_test(tmp_path: Path, right: str, wrong: str):
    assert right in SOURCE.text
    source = SOURCE.text.replace(right, wrong).replace("KERNELS(bfloat16, BFloat16)", "")  # half the time to compile
    slipped = on_cpu(compile_for_cpu(tmp_path, source))
    assert not self_test(slipped, torch.device("cpu"), torch.float16) <= TRIAL_TOLERANCE


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_kernel_without_slips_passes_its_self_test(launch: CpuLaunch, dtype: torch.dtype):
    assert self_test(on_cpu(launch), torch.device("cpu"), dtype) < TRIAL_TOLERANCE / 3


# ---- the backend around it


def test_inputs_of_any_shape_stride_and_address_give_the_rows_products(launch: CpuLaunch):
    stored = random_stored(96, 10, 32)
    rows = random_input(6, 96, torch.float16)
    product = on_cpu(launch).matmul(rows, *stored, 32)
    shifted = torch.cat((rows.new_zeros(1), rows.flatten()))[1:].view(6, 96)
    assert shifted.data_ptr() % 16 == 2
    for same in (shifted, rows.repeat_interleave(2, dim=1)[:, ::2], rows.t().contiguous().t()):
        assert torch.equal(on_cpu(launch).matmul(same, *stored, 32), product)
    assert torch.equal(on_cpu(launch).matmul(rows.view(2, 3, 96), *stored, 32), product.view(2, 3, 10))
    assert torch.equal(on_cpu(launch).matmul(rows[0], *stored, 32), product[0])
    assert on_cpu(launch).matmul(rows[:0].view(2, 0, 96), *stored, 32).shape == (2, 0, 10)


def test_groups_that_a_run_of_inputs_would_straddle_are_dequantized_in_slices(launch: CpuLaunch):
    stored = random_stored(96, 40, 24)
    x = random_input(1, 96, torch.float16)
    launch.started.clear()
    assert error(on_cpu(launch).matmul(x, *stored, 24), x, stored, 24) <= TOLERANCE[torch.float16]
    assert not launch.started
