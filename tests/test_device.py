from __future__ import annotations

import pytest
import torch

from lowvram.device import choose_dtype, open_device
from lowvram.errors import OptionError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_cpu_says_what_it_is_and_what_is_free():
    device = open_device("cpu")
    assert device.torch == CPU
    assert "thread" in device.title
    assert device.free_bytes > 0


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "mps", ""])
def test_other_names_are_refused(name: str):
    with pytest.raises(OptionError, match="auto, cpu, cuda"):
        open_device(name)


@pytest.mark.parametrize(
    ("device", "stored", "chosen"),
    [
        (CPU, "float32", torch.float32),
        (CPU, "float16", torch.bfloat16),
        (CPU, "bfloat16", torch.bfloat16),
        (CPU, None, torch.bfloat16),
        (CUDA, "float16", torch.float16),
    ],
)
def test_auto_is_the_stored_dtype_where_the_device_is_good_at_it(device: torch.device, stored: str | None, chosen):
    assert choose_dtype("auto", device, stored) is chosen


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), torch.float16), ((8, 6), torch.bfloat16)])
def test_bfloat16_needs_an_ampere_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: capability)
    assert choose_dtype("auto", CUDA, "bfloat16") is chosen


def test_a_named_dtype_is_taken_as_it_is():
    assert choose_dtype("float16", CPU, "bfloat16") is torch.float16


def test_an_unknown_dtype_is_refused():
    with pytest.raises(OptionError, match="'int4' is unknown"):
        choose_dtype("int4", CPU, None)
