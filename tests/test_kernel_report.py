from __future__ import annotations

import importlib
import logging
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from lowvram.doctor import examine, report_lines
from lowvram.errors import BackendError
from lowvram.kernel_report import (
    OWN_INT8,
    report_absent_card,
    report_by_name,
    report_compiled,
    report_int8_kernel,
    report_int8_on_absent_card,
    report_kernel,
)
from lowvram.quant.compiled import COMPILERS
from lowvram.quant.int8_matmul import choose_int8
from lowvram.quant.matmul import BORROWED, BY_NAME, choose_backend
from lowvram.quant.native import SOURCE, load_kernel

CPU = torch.device("cpu")

needs_avx512 = pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="this processor has no AVX-512"
)
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C compiler here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_that_is_told_is_the_one_that_is_chosen(dtype: torch.dtype):
    told, chosen = report_kernel(CPU, dtype), choose_backend(CPU, dtype)
    assert (told.kernel, told.reason) == (chosen.name, chosen.reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_and_so_is_the_one_for_8_bits(dtype: torch.dtype, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        chosen = choose_int8(CPU, dtype, choose_backend(CPU, dtype))
    told = report_int8_kernel(CPU, dtype)
    assert told.kernel == chosen.name
    assert caplog.messages[-1] == f"8-bit weights on cpu: kernel {told.kernel}, {told.reason}"


@needs_avx512
@needs_compiler
def test_looking_compiles_nothing(tmp_path: Path):
    assert report_compiled(tmp_path).startswith("not yet: ")
    assert report_compiled(tmp_path, OWN_INT8).endswith(" will do it when an 8-bit model is first opened")
    assert not list(tmp_path.iterdir())


@needs_avx512
def test_without_a_compiler_there_will_be_no_compiled_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert report_compiled(tmp_path).startswith("no: there is no C compiler here")


@needs_avx512
@needs_compiler
def test_what_was_compiled_is_found_and_tried(tmp_path: Path):
    try:
        load_kernel(tmp_path)
    except BackendError as refusal:
        assert refusal.reason in report_compiled(tmp_path)
    else:
        assert report_compiled(tmp_path) == f"yes, kept at {SOURCE.compiled_file(tmp_path)}"
    assert list(tmp_path.iterdir()) == [SOURCE.compiled_file(tmp_path)]


@pytest.mark.parametrize(
    ("installed", "kernel", "int8"), [(True, "int4-cuda", "int8-cuda"), (False, "reference", "int8-slices")]
)
def test_a_card_takes_its_own_kernels_where_cuda_core_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, kernel: str, int8: str
):
    if installed:
        (tmp_path / "cuda" / "core").mkdir(parents=True)
        (tmp_path / "cuda" / "core" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with patch.dict(sys.modules):
        for module in ("cuda", "cuda.core"):
            sys.modules.pop(module, None)
        there, elsewhere = report_kernel(torch.device("cuda", 0), torch.float16), report_absent_card()
        of_int8 = report_int8_kernel(torch.device("cuda", 0), torch.float16), report_int8_on_absent_card()
    assert there.kernel == elsewhere.kernel == kernel
    assert [report.kernel for report in of_int8] == [int8, int8]
    assert ("pip install 'lowvram[cuda]'" in there.reason) != installed


@pytest.mark.parametrize("installed", [True, False])
def test_what_serves_by_name_is_told_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
):
    packages = ("triton", "awq", "gptqmodel")
    for package in packages if installed else ():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with patch.dict(sys.modules):
        for package in packages:
            sys.modules.pop(package, None)
        told = report_by_name()
    assert list(told) == [backend.name for backend in (*BY_NAME, *BORROWED)]
    for name, state in told.items():
        assert state.startswith("installed" if installed else f"not installed: pip install 'lowvram[{name}]'")


def test_what_whoever_asks_for_a_kernel_should_know_is_told():
    told = report_by_name()
    assert [told[backend.name].endswith(f"; {backend.caveat}") for backend in BORROWED] == [True] * len(BORROWED)


def test_doctor_has_a_line_for_each_kernel_that_serves_by_name():
    lines = report_lines(examine())
    assert {f"--kernel {name}: {state}" for name, state in report_by_name().items()} <= set(lines)
