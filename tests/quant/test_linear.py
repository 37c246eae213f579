from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from awq_by_hand import random_stored, weight_by_hand
from on_this_cpu import INT4_CPU
from torch import nn

from lowvram.errors import BackendError, UnsupportedQuantError
from lowvram.quant.cuda import CudaBackend
from lowvram.quant.int4_cpu import UNPACK_FROM_ROWS, Int4CpuBackend
from lowvram.quant.linear import AWQLinear
from lowvram.quant.matmul import BORROWED, Backend, choose_backend
from lowvram.quant.packing import stored_layout
from lowvram.quant.reference import ReferenceBackend
from lowvram.quant.triton_backend import TritonBackend

CPU = torch.device("cpu")


def skeleton(backend: Backend, dtype: torch.dtype, bias: bool = True) -> AWQLinear:
    return AWQLinear(64, 128, bias=bias, group_size=32, backend=backend, dtype=dtype)


def filled(linear: AWQLinear) -> AWQLinear:
    """The linear with its weights in memory, its bias 0, 1, 2, ..."""
    out = {name: torch.empty_like(parameter, device=CPU) for name, parameter in linear.named_parameters()}
    linear.pack(*random_stored(64, 128, 32), out={name: out[name] for name in linear.packed_names})
    if linear.bias is not None:
        out["bias"].copy_(torch.arange(128))
    for name, tensor in out.items():
        linear.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_linear_holds_no_memory_and_wants_no_gradient(dtype: torch.dtype):
    linear = skeleton(choose_backend(CPU, dtype), dtype)
    assert set(dict(linear.named_parameters())) == {*linear.packed_names, "bias"}
    assert all(p.is_meta and not p.requires_grad for p in linear.parameters())


def test_a_linear_without_bias_has_only_its_packed_parameters():
    linear = skeleton(choose_backend(CPU, torch.float32), torch.float32, bias=False)
    assert tuple(dict(linear.named_parameters())) == linear.packed_names


@pytest.mark.parametrize("name", ["reference", INT4_CPU])
def test_what_is_stored_is_the_checkpoint_s_whatever_the_backend_keeps(name: str):
    linear = skeleton(choose_backend(CPU, torch.bfloat16, name), torch.bfloat16)
    assert dict(linear.stored) == stored_layout(64, 128, 32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_product_and_the_bias(dtype: torch.dtype, tolerance: float, bias: bool):
    linear = filled(skeleton(choose_backend(CPU, dtype), dtype, bias))
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() @ weight_by_hand(random_stored(64, 128, 32), 32).t()
    exact = exact + torch.arange(128) if bias else exact
    y = linear(x)
    assert y.dtype == dtype and y.shape == (2, 5, 128)
    assert (y - exact).norm() <= tolerance * exact.norm()


def test_forward_twice_adds_the_bias_once_each():
    linear = filled(skeleton(choose_backend(CPU, torch.float32), torch.float32))
    x = torch.zeros(1, 64)
    linear(x)
    assert torch.equal(linear(x), torch.arange(128.0).unsqueeze(0))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
@pytest.mark.parametrize("rows", [1, UNPACK_FROM_ROWS])
@pytest.mark.parametrize(
    ("backend", "dtype", "whole"),
    [
        (ReferenceBackend, torch.float32, True),
        (partial(Int4CpuBackend, load=None), torch.bfloat16, True),
        (Int4CpuBackend, torch.bfloat16, False),  # where it is compiled, what is C is left out of the graph
    ],
    ids=["reference", "torch's int4", "int4-cpu"],
)
def test_torch_may_compile_it(backend: Callable[[], Backend], dtype: torch.dtype, whole: bool, rows: int):
    torch.compiler.reset()
    linear = filled(skeleton(backend(), dtype))
    compiled = torch.compile(linear, backend="eager", fullgraph=whole)
    for x in torch.randn(2, rows, 64, generator=torch.Generator().manual_seed(0)).to(dtype):
        assert torch.equal(compiled(x), linear(x))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "backend",
    [Int4CpuBackend, partial(Int4CpuBackend, load=None), CudaBackend, TritonBackend, *BORROWED],
    ids=["int4-cpu", "torch's int4", "int4-cuda", "triton", *(backend.name for backend in BORROWED)],
)
def test_an_input_in_a_dtype_that_its_backend_does_not_serve_is_refused(backend: Callable[[], Backend], compiled: bool):
    torch.compiler.reset()
    linear = filled(skeleton(backend(), torch.bfloat16))
    call = torch.compile(linear, backend="eager") if compiled else linear
    with pytest.raises(BackendError, match=r"it computes in .*float16.*, not in float64") as caught:
        call(torch.zeros(1, 64, dtype=torch.float64))
    assert caught.value.backend == linear.backend.name


def test_sizes_that_awq_cannot_store_are_refused_before_anything_is_read():
    with pytest.raises(UnsupportedQuantError, match="60 outputs"):
        AWQLinear(64, 60, bias=False, group_size=32, backend=choose_backend(CPU, torch.float32), dtype=torch.float32)


def test_its_printed_form_names_sizes_group_and_backend():
    linear = skeleton(choose_backend(CPU, torch.float32), torch.float32)
    assert repr(linear) == "AWQLinear(64, 128, group_size=32, backend=reference)"
