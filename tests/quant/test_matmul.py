from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from awq_by_hand import random_stored, weight_by_hand
from on_this_cpu import INT4_CPU, needs_int4_cpu
from torch import Tensor

from lowvram.errors import BackendError, UnsupportedQuantError
from lowvram.quant import int4_cpu
from lowvram.quant.matmul import BACKENDS, BORROWED, BY_NAME, Backend, choose_backend

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3.5e-4, torch.bfloat16: 3e-3}
SERVED = [
    ("reference", torch.float64),
    ("reference", torch.float32),
    ("reference", torch.float16),
    ("reference", torch.bfloat16),
    pytest.param("int4-cpu", torch.bfloat16, marks=needs_int4_cpu),
]
SHAPES = [  # inputs, outputs, group size
    (96, 40, 32),
    (200, 24, 8),
    (128, 1024, 128),
    (256, 192, 64),
    (8192, 192, 128),  # dequantized in two slices, the second one shorter
    (3584, 512, 128),  # k_proj and v_proj of the 7B thinker
]
MANY_ROWS = int4_cpu.UNPACK_FROM_ROWS + 5


def packed(backend: Backend, stored: tuple[Tensor, Tensor, Tensor], group_size: int) -> dict[str, Tensor]:
    """The backend's own weights, each filled with ones to start from."""
    in_features, out_features = len(stored[0]), stored[2].shape[1]
    layout = backend.layout(in_features, out_features, group_size, torch.bfloat16)
    weights = {name: torch.ones(spec.shape, dtype=spec.dtype) for name, spec in layout.items()}
    backend.pack(*stored, group_size, weights)
    return weights


def random_input(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), SERVED)
def test_products_are_as_close_to_exact_as_the_dtype_allows(name: str, dtype: torch.dtype, shape: tuple[int, int, int]):
    in_features, out_features, group_size = shape
    stored = random_stored(in_features, out_features, group_size)
    backend = choose_backend(CPU, dtype, name)
    weights = packed(backend, stored, group_size)
    exact_weight = weight_by_hand(stored, group_size)
    for rows in (1, 3, MANY_ROWS):
        x = random_input(rows, in_features, dtype=dtype)
        product = backend.matmul(x, weights, group_size)
        exact = x.double() @ exact_weight.t()
        assert product.shape == exact.shape and product.dtype == dtype
        assert (product - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@pytest.mark.parametrize(("name", "dtype"), SERVED)
def test_products_are_the_same_bits_every_time(name: str, dtype: torch.dtype):
    stored = random_stored(256, 192, 64)
    for rows in (1, MANY_ROWS):
        x = random_input(rows, 256, dtype=dtype)
        first, second = (choose_backend(CPU, dtype, name) for _ in range(2))
        product = first.matmul(x, packed(first, stored, 64), 64)
        assert torch.equal(product, second.matmul(x, packed(second, stored, 64), 64))


@pytest.mark.parametrize("group_size", [32, 48])
@pytest.mark.parametrize("name", ["reference", INT4_CPU])
def test_inputs_of_any_shape_and_stride_give_the_rows_products(name: str, group_size: int):
    backend = choose_backend(CPU, torch.bfloat16, name)
    weights = packed(backend, random_stored(96, 64, group_size), group_size)
    rows = random_input(6, 96, dtype=torch.bfloat16)
    product = backend.matmul(rows, weights, group_size)
    strided = rows.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(backend.matmul(strided, weights, group_size), product)
    assert torch.equal(backend.matmul(rows.t().contiguous().t(), weights, group_size), product)
    assert torch.equal(backend.matmul(rows.view(2, 3, 96), weights, group_size), product.view(2, 3, 64))
    assert torch.equal(backend.matmul(rows[:1], weights, group_size)[0], backend.matmul(rows[0], weights, group_size))
    assert backend.matmul(rows[:0].view(2, 0, 96), weights, group_size).shape == (2, 0, 64)


@pytest.mark.parametrize("name", ["reference", INT4_CPU])
@pytest.mark.parametrize("shape", [(2, 128), (2, 32), (1, 65), (3, 4, 16)])
def test_an_input_of_another_size_is_refused(name: str, shape: tuple[int, ...]):
    backend = choose_backend(CPU, torch.bfloat16, name)
    weights = packed(backend, random_stored(64, 64, 32), 32)
    with pytest.raises(RuntimeError, match=r"shape .* is invalid for input of size"):
        backend.matmul(random_input(*shape, dtype=torch.bfloat16), weights, 32)


@pytest.mark.parametrize(("name", "dtype"), SERVED)
def test_an_input_is_left_as_it_was_and_a_product_is_the_caller_s(name: str, dtype: torch.dtype):
    backend = choose_backend(CPU, dtype, name)
    weights = packed(backend, random_stored(64, 64, 32), 32)
    for rows in (1, MANY_ROWS):
        x = random_input(rows, 64, dtype=dtype)
        kept, product = x.clone(), backend.matmul(x, weights, 32)
        product_kept = product.clone()
        backend.matmul(random_input(rows, 64, dtype=dtype, seed=1), weights, 32)
        assert torch.equal(x, kept) and torch.equal(product, product_kept)


@pytest.mark.parametrize("name", ["reference", INT4_CPU])
def test_a_backend_serves_linears_of_all_sizes_in_turn(name: str):
    backend = choose_backend(CPU, torch.bfloat16, name)
    for in_features in (64, 512, 64):
        stored = random_stored(in_features, 64, 32)
        x = random_input(MANY_ROWS, in_features, dtype=torch.bfloat16)
        exact = x.double() @ weight_by_hand(stored, 32).t()
        product = backend.matmul(x, packed(backend, stored, 32), 32)
        assert (product - exact).norm() <= TOLERANCE[torch.bfloat16] * exact.norm()


@pytest.mark.parametrize("name", ["reference", INT4_CPU])
def test_threads_may_share_a_backend(name: str):
    backend = choose_backend(CPU, torch.bfloat16, name)
    x = random_input(MANY_ROWS, 1024, dtype=torch.bfloat16)
    layers = [packed(backend, random_stored(1024, 256, 128, seed), 128) for seed in range(4)]
    alone = [backend.matmul(x, weights, 128) for weights in layers]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda i: backend.matmul(x, layers[i % 4], 128), range(32)))
    assert all(torch.equal(product, alone[i % 4]) for i, product in enumerate(together))


@pytest.mark.parametrize("name", ["reference", INT4_CPU])
def test_a_backend_first_used_in_inference_mode_serves_outside_of_it(name: str):
    backend = choose_backend(CPU, torch.bfloat16, name)
    weights = packed(backend, random_stored(64, 64, 32), 32)
    x = random_input(MANY_ROWS, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        inside = backend.matmul(x, weights, 32)
    assert torch.equal(backend.matmul(x, weights, 32), inside)


@pytest.mark.parametrize("name", ["reference", INT4_CPU])
def test_tensors_that_do_not_belong_together_are_refused(name: str):
    backend = choose_backend(CPU, torch.bfloat16, name)
    qweight, qzeros, scales = random_stored(64, 64, 32)
    weights = packed(backend, (qweight, qzeros, scales), 32)
    with pytest.raises(UnsupportedQuantError, match="qzeros"):
        backend.pack(qweight, qzeros[:1], scales, 32, weights)


@pytest.mark.parametrize("backend", [*BACKENDS, *BY_NAME, *BORROWED])
def test_a_linear_that_awq_cannot_store_has_no_layout(backend: type[Backend]):
    with pytest.raises(UnsupportedQuantError, match="100 inputs"):
        backend().layout(100, 64, 32, torch.bfloat16)


@needs_int4_cpu
def test_bfloat16_on_a_cpu_is_given_to_torch_s_kernel():
    backend = choose_backend(CPU, torch.bfloat16)
    assert (backend.name, backend.reason) == ("int4-cpu", "the fastest here")


def test_other_dtypes_on_a_cpu_are_given_to_the_reference_which_says_why():
    backend = choose_backend(CPU, torch.float32)
    assert backend.name == "reference"
    assert backend.reason.startswith("int4-cpu was passed over: it computes in bfloat16, not in float32; ")


def test_other_devices_are_given_to_the_reference():
    backend = choose_backend(torch.device("cuda", 0), torch.bfloat16)
    assert backend.name == "reference"
    assert "runs on the CPU, not on cuda:0" in backend.reason


def test_an_unknown_name_lists_the_choices():
    names = "int4-cpu, int4-cuda, reference, triton, autoawq, gptqmodel"
    with pytest.raises(BackendError, match=rf"no kernel 'marlin' \(one of: {names}\)"):
        choose_backend(CPU, torch.bfloat16, "marlin")


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_that_serves_by_name_is_chosen_by_itself(device: torch.device, dtype: torch.dtype):
    assert choose_backend(device, dtype).name not in {backend.name for backend in (*BY_NAME, *BORROWED)}


def test_a_name_that_cannot_serve_says_why():
    with pytest.raises(
        BackendError, match="int4-cpu cannot be used: it computes in bfloat16, not in float16"
    ) as caught:
        choose_backend(CPU, torch.float16, "int4-cpu")
    assert caught.value.backend == "int4-cpu"
