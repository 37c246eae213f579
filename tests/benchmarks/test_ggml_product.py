"""Products by ggml, where its package is installed."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def ggml() -> ModuleType:
    import ggml_product

    return ggml_product


def test_a_row_must_divide_into_ggmls_blocks(ggml: ModuleType):
    assert [ggml.fits(features) for features in (256, 3584, 18944, 128, 300)] == [True, True, True, False, False]


def test_without_its_package_there_is_no_version(ggml: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ggml, "find_spec", lambda _: None)
    assert ggml.version.__wrapped__() is None


@pytest.mark.parametrize(("bits", "error"), [(4, 0.1), (8, 0.01)])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_every_copy_multiplies_by_the_same_weights(ggml: ModuleType, bits: int, error: float, rows: int):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is compiled when it is installed")
    generator = torch.Generator().manual_seed(0)
    dense, x = torch.randn(64, 512, generator=generator), torch.randn(rows, 512, generator=generator)
    one, other = ggml.products(dense, bits, copies=2)
    exact, found = x @ dense.T, one(x).clone()
    assert (found - exact).norm() < error * exact.norm()
    assert torch.equal(other(x), found)
