from __future__ import annotations

import logging

import pytest
import torch

from lowvram.quant import int8_matmul
from lowvram.quant.cuda import CudaBackend
from lowvram.quant.int8 import SlicesBackend
from lowvram.quant.int8_cpu import Int8CpuBackend
from lowvram.quant.int8_cuda import Int8CudaBackend
from lowvram.quant.int8_matmul import INT8_BACKENDS, choose_int8
from lowvram.quant.reference import ReferenceBackend

CPU = torch.device("cpu")


def test_the_first_that_can_serves_and_the_log_says_why_not_those_before_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(int8_matmul, "INT8_BACKENDS", (Int8CudaBackend, SlicesBackend))
    with caplog.at_level(logging.INFO):
        assert choose_int8(CPU, torch.bfloat16, CudaBackend()).name == "int8-slices"
    assert caplog.messages == [
        "8-bit weights on cpu: kernel int8-slices, int8-cuda was passed over: it runs on a CUDA card, not on cpu"
    ]


def test_a_cpu_takes_its_own_kernel_unless_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch):
    obstacle = Int8CpuBackend.obstacle(CPU, torch.bfloat16)
    assert choose_int8(CPU, torch.bfloat16, CudaBackend()).name == ("int8-slices" if obstacle else "int8-cpu")
    monkeypatch.setattr(Int8CpuBackend, "obstacle", staticmethod(lambda device, dtype: "there is no C compiler"))
    assert choose_int8(CPU, torch.bfloat16, CudaBackend()).name == "int8-slices"


def test_any_other_device_is_served_by_slices():
    assert choose_int8(torch.device("meta"), torch.float16, CudaBackend()).name == "int8-slices"


def test_whoever_multiplies_by_4_bits_in_the_readable_way_does_so_by_8(monkeypatch: pytest.MonkeyPatch):
    for backend in INT8_BACKENDS:
        monkeypatch.setattr(backend, "obstacle", staticmethod(lambda device, dtype: ""))
    assert choose_int8(CPU, torch.bfloat16, ReferenceBackend()).name == "int8-slices"
