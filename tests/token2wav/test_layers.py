"""A layer taken apart: windows attended together, and products of half precision among float32 rows."""

import copy

import pytest
import torch
from small_models import conditioning_of, relative, small_dit, some_codes, streamed
from test_conditioning import is_read_again
from torch import nn

from lowvram.token2wav.dit import SystolicDiT, WavefrontDiT
from lowvram.token2wav.layers import Heads, attend
from lowvram.token2wav.ode import time_grid

PRECISIONS = [pytest.param(torch.float16, 6e-4, id="float16"), pytest.param(torch.bfloat16, 4e-3, id="bfloat16")]


def decoded(dit: nn.Module, way=WavefrontDiT) -> torch.Tensor:
    return streamed(way(dit, conditioning_of(dit, time_grid(10)), seed=7), some_codes(100), 48)


def is_in_a_layer(name: str) -> bool:
    """The weights that are best kept in half precision: nearly all of them, by bytes."""
    return ".attn." in name or ".ff." in name


def with_products_in(dtype: torch.dtype, dit: nn.Module, is_half=is_in_a_layer) -> nn.Module:
    dit = copy.deepcopy(dit)
    for name, weight in dit.named_parameters():
        if is_half(name):
            weight.data = weight.data.to(dtype)
    return dit


def test_windows_of_several_sizes_are_each_attended_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(24, 24), (24, 48), (24, 24), (5, 29), (24, 48)]
    windows = [
        Heads(*(torch.randn(2, 4, frames, 16, generator=generator) for frames in (queries, keys, keys)))
        for queries, keys in sizes
    ]
    alone = torch.cat([nn.functional.scaled_dot_product_attention(*window) for window in windows], -2)
    torch.testing.assert_close(attend(windows), alone)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(
    ("way", "is_half"), [(WavefrontDiT, is_in_a_layer), (SystolicDiT, is_in_a_layer), (WavefrontDiT, is_read_again)]
)
def test_products_in_half_precision_cost_as_much_accuracy_as_stated(dtype, tolerance, way, is_half) -> None:
    dit = small_dit(torch.float32)
    mel = decoded(with_products_in(dtype, dit, is_half), way)
    assert mel.dtype == torch.float32
    assert tolerance / 20 < relative(mel, decoded(dit, way)) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_keys_and_values_are_kept_in_the_products_precision(dtype, tolerance) -> None:
    streams = [
        WavefrontDiT(dit, conditioning_of(dit, time_grid(10)), seed=7)
        for dit in (small_dit(torch.float32), with_products_in(dtype, small_dit(torch.float32)))
    ]
    for stream in streams:
        stream.push(some_codes(240))
    assert streams[1].state_bytes < 0.8 * streams[0].state_bytes
