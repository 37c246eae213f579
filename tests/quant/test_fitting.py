from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowvram.quant import fitting
from lowvram.quant.cuda import CudaBackend
from lowvram.quant.fitting import Fitter
from lowvram.quant.int8 import SlicesBackend
from lowvram.quant.linear import AWQLinear, Int8Linear
from lowvram.quant.reference import ReferenceBackend
from lowvram.quant.scheme import AWQScheme, Int8Scheme, Scheme

FOUR, EIGHT = AWQScheme(32, "pack-quantized"), Int8Scheme(64)


CPU = torch.device("cpu")


def fitter(scheme: Scheme, **shapes: tuple[int, ...]) -> Fitter:
    """For stored tensors whose names have `__` where published ones have a dot."""
    stored = {name.replace("__", "."): SimpleNamespace(shape=shape) for name, shape in shapes.items()}
    return Fitter(stored, scheme, ReferenceBackend(), CPU, torch.float32)


def test_the_words_of_a_row_tell_how_wide_a_linear_is():
    layers = nn.ModuleDict({name: nn.Linear(64, 8) for name in ("narrow", "wide", "plain")})
    fitter((FOUR, EIGHT), a__narrow__weight_packed=(8, 8), a__wide__weight_packed=(8, 16)).fit(layers, "a.")
    assert [type(linear) for linear in layers.values()] == [AWQLinear, Int8Linear, nn.Linear]
    assert (layers["narrow"].group_size, layers["wide"].group_size) == (32, 64)


def test_what_is_stored_elsewhere_is_not_fitted():
    layers = nn.ModuleDict({"wide": nn.Linear(64, 8)})
    fitter((EIGHT,), b__wide__weight_packed=(8, 16), a__wide__weight=(8, 64)).fit(layers, "a.")
    assert type(layers["wide"]) is nn.Linear


def test_a_bias_is_fitted_where_the_library_or_the_file_has_one():
    linears = nn.ModuleDict({"own": nn.Linear(64, 8), "none": nn.Linear(64, 8, bias=False)})
    linears["stored"] = nn.Linear(64, 8, bias=False)
    packed = {f"{name}__weight_packed": (8, 16) for name in linears}
    fitter((EIGHT,), **packed, stored__bias=(8,)).fit(linears, "")
    assert [linear.bias is not None for linear in linears.values()] == [True, False, True]


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [((), "torch"), ((FOUR,), "reference"), ((EIGHT,), "int8-slices"), ((FOUR, EIGHT), "reference and int8-slices")],
)
def test_what_multiplies_is_named(scheme: Scheme, kernel: str):
    assert fitter(scheme).kernel == kernel


def test_8_bits_get_a_kernel_of_their_own_choosing(monkeypatch: pytest.MonkeyPatch):
    class Best(SlicesBackend):
        name = "int8-best"

    monkeypatch.setattr(fitting, "choose_int8", lambda device, dtype, four_bits: Best())
    assert fitter((FOUR, EIGHT)).kernel == "reference and int8-best"


def test_without_8_bits_no_kernel_for_them_is_looked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fitting, "choose_int8", None)
    assert Fitter({}, (FOUR,), CudaBackend(), CPU, torch.bfloat16).kernel == "int4-cuda"
