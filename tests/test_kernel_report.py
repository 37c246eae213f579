from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from lowvram.errors import BackendError
from lowvram.kernel_report import report_absent_card, report_compiled, report_kernel
from lowvram.quant.matmul import choose_backend
from lowvram.quant.native import COMPILERS, compiled_file, load_kernel

CPU = torch.device("cpu")

needs_avx512 = pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="this processor has no AVX-512"
)
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C compiler here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_that_is_told_is_the_one_that_is_chosen(dtype: torch.dtype):
    told, chosen = report_kernel(CPU, dtype), choose_backend(CPU, dtype)
    assert (told.kernel, told.reason) == (chosen.name, chosen.reason)


@needs_avx512
@needs_compiler
def test_looking_compiles_nothing(tmp_path: Path):
    assert report_compiled(tmp_path).startswith("not yet: ")
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
        assert report_compiled(tmp_path) == f"yes, kept at {compiled_file(tmp_path)}"
    assert list(tmp_path.iterdir()) == [compiled_file(tmp_path)]


@pytest.mark.parametrize(("installed", "kernel"), [(True, "int4-cuda"), (False, "reference")])
def test_a_card_takes_its_own_kernel_where_cuda_core_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, kernel: str
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
    assert there.kernel == elsewhere.kernel == kernel
    assert ("pip install 'lowvram[cuda]'" in there.reason) != installed
