from __future__ import annotations

import pytest
import torch
from awq_by_hand import random_stored, weight_by_hand
from torch import nn

from lowvram.errors import UnsupportedQuantError
from lowvram.quant.linear import AWQLinear
from lowvram.quant.matmul import Backend, choose_backend
from lowvram.quant.packing import stored_layout

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


@pytest.mark.parametrize("name", ["reference", "int4-cpu"])
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


def test_sizes_that_awq_cannot_store_are_refused_before_anything_is_read():
    with pytest.raises(UnsupportedQuantError, match="60 outputs"):
        AWQLinear(64, 60, bias=False, group_size=32, backend=choose_backend(CPU, torch.float32), dtype=torch.float32)


def test_its_printed_form_names_sizes_group_and_backend():
    linear = skeleton(choose_backend(CPU, torch.float32), torch.float32)
    assert repr(linear) == "AWQLinear(64, 128, group_size=32, backend=reference)"
