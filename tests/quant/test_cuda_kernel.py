from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from awq_by_hand import random_stored, weight_by_hand
from cuda_on_cpu import CpuLaunch, compile_for_cpu
from torch import Tensor

from lowvram.quant import cuda
from lowvram.quant.cuda import FEW_ROWS, SOURCE, CudaBackend, self_test
from lowvram.quant.matmul import choose_backend
from lowvram.quant.packing import stored_layout
from lowvram.quant.reference import Workspace
from lowvram.quant.trial import TOLERANCE as TRIAL_TOLERANCE

TOLERANCE = {torch.float16: 3.5e-4, torch.bfloat16: 3e-3}
SHAPES = [  # inputs, outputs, group size
    (32, 8, 32),  # one word, one run
    (96, 72, 32),  # a second tile of one word
    (192, 200, 64),
    (2176, 72, 128),  # slices with one and with two runs
    (256, 64, 256),
    (3584, 512, 128),  # k_proj and v_proj of the 7B thinker
    (18944, 128, 128),  # a slice of its down_proj
]
ROW_COUNTS = (1, 2, 4, 5, FEW_ROWS, FEW_ROWS + 1)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> CpuLaunch:
    return compile_for_cpu(tmp_path_factory.mktemp("kernel"), SOURCE.text)


def on_cpu(launch: CpuLaunch) -> CudaBackend:
    return CudaBackend(load=lambda _: launch)


def named(stored: tuple[Tensor, Tensor, Tensor]) -> Mapping[str, Tensor]:
    return dict(zip(("qweight", "qzeros", "scales"), stored, strict=True))


def random_input(rows: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)


def error(product: Tensor, x: Tensor, stored: tuple[Tensor, Tensor, Tensor], group_size: int) -> float:
    """Relative to the product with the weight written out by hand."""
    exact = x.double() @ weight_by_hand(stored, group_size).t()
    return float((product.double() - exact).norm() / exact.norm())


# ---- the source, run on the CPU


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_as_close_to_exact_as_the_dtype_allows(
    launch: CpuLaunch, shape: tuple[int, int, int], dtype: torch.dtype
):
    in_features, out_features, group_size = shape
    stored = random_stored(in_features, out_features, group_size)
    for rows in ROW_COUNTS if in_features < 3000 else (1, 3, FEW_ROWS + 1):
        x = random_input(rows, in_features, dtype)
        product = on_cpu(launch).matmul(x, named(stored), group_size)
        assert (product.shape, product.dtype) == ((rows, out_features), dtype)
        assert error(product, x, stored, group_size) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_has_the_same_bits_whatever_rows_come_with_it(launch: CpuLaunch, dtype: torch.dtype):
    weights = named(random_stored(2176, 72, 64))
    x = random_input(FEW_ROWS, 2176, dtype)
    alone = torch.cat([on_cpu(launch).matmul(row, weights, 64) for row in x.split(1)])
    for rows in range(1, FEW_ROWS + 1):
        assert torch.equal(on_cpu(launch).matmul(x[:rows], weights, 64), alone[:rows])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_unpacked_weights_are_the_stored_ones_rounded_once(launch: CpuLaunch, dtype: torch.dtype):
    stored = random_stored(320, 72, 32)
    rows = torch.eye(320, dtype=dtype)
    product = on_cpu(launch).matmul(rows, named(stored), 32)
    assert torch.equal(product, weight_by_hand(stored, 32).t().to(dtype))


def test_a_linear_is_unpacked_in_slices_that_need_not_be_equal(launch: CpuLaunch, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "SLICE_WEIGHTS", 96 * 24)
    stored = random_stored(96, 64, 32)
    x = random_input(FEW_ROWS + 1, 96, torch.float16)
    launch.started.clear()
    assert error(on_cpu(launch).matmul(x, named(stored), 32), x, stored, 32) <= TOLERANCE[torch.float16]
    assert launch.started == ["unpack_float16"] * 3


def test_all_slices_are_unpacked_into_one_workspace(launch: CpuLaunch, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "SLICE_WEIGHTS", 96 * 24)
    taken, take = [], Workspace.take
    monkeypatch.setattr(Workspace, "take", lambda *wanted: taken.append(take(*wanted)) or taken[-1])
    on_cpu(launch).matmul(random_input(FEW_ROWS + 1, 96, torch.float16), named(random_stored(96, 64, 32)), 32)
    assert [space.numel() for space in taken] == [96 * 24]


def test_a_decode_step_has_a_kernel_of_its_own(launch: CpuLaunch):
    weights = named(random_stored(32, 8, 32))
    launch.started.clear()
    for rows in (1, 2, FEW_ROWS, FEW_ROWS + 1):
        on_cpu(launch).matmul(random_input(rows, 32, torch.bfloat16), weights, 32)
    assert launch.started == ["multiply_bfloat16_1", "multiply_bfloat16_4", "multiply_bfloat16_4", "unpack_bfloat16"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 65504.0, 6e-8])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_extreme_inputs_come_out_as_torch_has_them(launch: CpuLaunch, dtype: torch.dtype, value: float):
    stored = random_stored(32, 8, 32)
    x = torch.zeros(1, 32, dtype=dtype)
    x[0, 7] = value
    exact = (x.float() @ weight_by_hand(stored, 32).t().float()).to(dtype)
    product = on_cpu(launch).matmul(x, named(stored), 32)
    if value == value and abs(value) != float("inf"):
        assert torch.equal(product, exact)
    else:
        assert not product.isfinite().any()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("column % 2 * 4 + column / 2", "column"),  # nibbles in the order of columns
        ("column % 2 * 4 + column / 2", "column / 2 * 2 + column % 2"),
        ("-biased(zeros, c) * scale[c]", "-(biased(zeros, c) + 1) * scale[c]"),  # GPTQ's zero points
        ("k / group_size * words + word", "(k / group_size + 1) % (in_features / group_size) * words + word"),
        ("packed.word[c / 2] >> c % 2 * 16", "packed.word[c / 2] >> (c + 1) % 2 * 16"),  # the neighbour's scale
        ("k += SLICES * RUN", "k += (SLICES - 1) * RUN"),  # runs that two slices count
        ("i < SLICES / PARTS", "i < SLICES / PARTS - 1"),  # a slice that nobody counts
        ("__syncthreads();", ""),
    ],
)
def test_a_slip_in_the_kernel_is_seen_by_its_self_test(tmp_path: Path, right: str, wrong: str):
    assert right in SOURCE.text
    source = SOURCE.text.replace(right, wrong).replace("KERNELS(bfloat16, BFloat16)", "")  # half the time to compile
    slipped = on_cpu(compile_for_cpu(tmp_path, source))
    assert self_test(slipped, torch.device("cpu"), torch.float16) > TRIAL_TOLERANCE


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_kernel_without_slips_passes_its_self_test(launch: CpuLaunch, dtype: torch.dtype):
    assert self_test(on_cpu(launch), torch.device("cpu"), dtype) < TRIAL_TOLERANCE / 3


# ---- the backend around it


def test_inputs_of_any_shape_stride_and_address_give_the_rows_products(launch: CpuLaunch):
    weights = named(random_stored(96, 72, 32))
    rows = random_input(6, 96, torch.float16)
    product = on_cpu(launch).matmul(rows, weights, 32)
    shifted = torch.cat((rows.new_zeros(1), rows.flatten()))[1:].view(6, 96)
    assert shifted.data_ptr() % 16 == 2
    for same in (shifted, rows.repeat_interleave(2, dim=1)[:, ::2], rows.t().contiguous().t()):
        assert torch.equal(on_cpu(launch).matmul(same, weights, 32), product)
    assert torch.equal(on_cpu(launch).matmul(rows.view(2, 3, 96), weights, 32), product.view(2, 3, 72))
    assert torch.equal(on_cpu(launch).matmul(rows[0], weights, 32), product[0])
    assert on_cpu(launch).matmul(rows[:0].view(2, 0, 96), weights, 32).shape == (2, 0, 72)


def test_groups_that_a_run_of_inputs_would_straddle_are_left_to_the_reference(launch: CpuLaunch):
    stored = random_stored(96, 40, 48)
    x = random_input(1, 96, torch.float16)
    launch.started.clear()
    assert error(on_cpu(launch).matmul(x, named(stored), 48), x, stored, 48) <= TOLERANCE[torch.float16]
    assert not launch.started


def test_weights_lie_on_the_card_as_they_are_stored():
    assert CudaBackend().layout(3584, 18944, 128, torch.float16) == stored_layout(3584, 18944, 128)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a card")
def test_without_a_card_the_reference_is_chosen_and_says_why():
    backend = choose_backend(torch.device("cuda", 0), torch.float16)
    assert backend.name == "reference"
    assert "int4-cuda was passed over: torch finds no CUDA card" in backend.reason
