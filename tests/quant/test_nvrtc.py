from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from lowvram.quant import cuda, int8_cuda
from lowvram.quant.cuda import CudaBackend
from lowvram.quant.int8_cuda import Int8CudaBackend
from lowvram.quant.nvrtc import Source, load_kernels, obstacle_on

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
CARD = torch.device("cuda")

both_sources = pytest.mark.parametrize("source", [cuda.SOURCE, int8_cuda.SOURCE], ids=lambda source: source.name)
both_backends = pytest.mark.parametrize("backend", [CudaBackend, Int8CudaBackend])

needs_nvrtc = pytest.mark.skipif(
    find_spec("cuda") is None or find_spec("cuda.core") is None, reason="needs cuda-core and NVRTC (the dev extra)"
)

# ---- sources, compiled for cards that need not be there


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@both_sources
def test_it_compiles_for_every_card_without_spilling_a_register(source: Source, arch: str):
    from cuda.core import Program, ProgramOptions

    log = StringIO()
    options = ProgramOptions(arch=arch, std="c++17", ptxas_options=["-v"])
    Program(source.text, "c++", options).compile("cubin", logs=log)
    report = log.getvalue()
    assert set(re.findall(r"entry function '(\w+)'", report)) == set(source.kernels)
    assert re.findall(r"(\d+) bytes spill", report) == ["0"] * 2 * len(source.kernels)
    used = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", report, re.DOTALL)
    most = {"1": 64, "4": 128}  # by the rows of a block: 1024 threads share a core's registers, or 512
    assert all(int(registers) <= most.get(name.rpartition("_")[2], 64) for name, registers in used)


@needs_nvrtc
@both_sources
def test_compiled_kernels_are_kept_for_the_next_process(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    first = source.compile("sm_86")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == first.code]
    assert source.compile("sm_86").code == first.code


@needs_nvrtc
def test_what_is_kept_can_be_replaced_where_it_turns_out_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    code = cuda.SOURCE.compile("sm_86").code
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    kept.write_bytes(code[:1000])
    assert cuda.SOURCE.compile("sm_86").code == code[:1000]  # taken as it is: that it is damaged, a driver finds out
    assert cuda.SOURCE.compile("sm_86", anew=True).code == kept.read_bytes() == code


@needs_nvrtc
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card, whose driver refuses it")
@both_sources
def test_what_the_driver_cannot_read_is_compiled_again(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    major, minor = torch.cuda.get_device_capability()
    source.compile(f"sm_{major}{minor}")
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    kept.write_bytes(b"damaged")
    load_kernels.cache_clear()
    load_kernels(source, torch.device("cuda", torch.cuda.current_device()))
    assert len(kept.read_bytes()) > 10_000


@needs_nvrtc
def test_a_cache_that_cannot_be_written_to_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "file"))
    assert len(cuda.SOURCE.compile("sm_86").code) > 10_000


@needs_nvrtc
def test_a_user_without_a_home_folder_has_no_cache(monkeypatch: pytest.MonkeyPatch):
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME", "USERPROFILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it does for a user whom the system does not know
    assert len(cuda.SOURCE.compile("sm_86").code) > 10_000


# ---- where they cannot serve


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", torch.float16, "runs on a CUDA card, not on cpu"),
        ("cuda", torch.float32, "computes in float16 and bfloat16, not in float32"),
    ],
)
@both_backends
def test_it_says_where_it_cannot_serve(
    backend: type[CudaBackend | Int8CudaBackend], device: str, dtype: torch.dtype, reason: str
):
    assert reason in backend.obstacle(torch.device(device), dtype)


@both_backends
def test_without_cuda_core_it_says_what_to_install(
    backend: type[CudaBackend | Int8CudaBackend], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cuda.core._utils.cuda_utils", None)
    assert "pip install 'lowvram[cuda]'" in backend.obstacle(CARD, torch.float16)


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("cuda.py", "", "'cuda' is not a package"),  # a script of the user's, in the folder where Python starts
        ("cuda.py", "print card", "Missing parentheses"),
        ("cuda.py", "card = cards[0]", "name 'cards' is not defined"),
        ("cuda/core/__init__.py", "raise OSError('nvrtc64.dll is missing')", "nvrtc64.dll is missing"),
        ("cuda/core/__init__.py", "raise ValueError('numpy.dtype size changed')", "numpy.dtype size changed"),
        ("cuda/core/__init__.py", "raise RuntimeError('CUDA 11 is too old')", "CUDA 11 is too old"),
    ],
)
def test_a_cuda_core_that_is_there_and_broken_is_not_used(
    module: str, source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / module).write_text(source)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.syspath_prepend(tmp_path)
    with patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
            del sys.modules[name]
        obstacle = CudaBackend.obstacle(CARD, torch.float16)
    assert obstacle.startswith("cuda-core cannot be imported (") and reason in obstacle


@needs_nvrtc
@both_backends
def test_a_card_on_which_the_kernel_is_wrong_is_left_to_others(
    backend: type[CudaBackend | Int8CudaBackend], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys.modules[backend.__module__], "self_test", lambda *_: 0.25)
    assert backend.obstacle(CARD, torch.float16) == "its kernel is wrong on this machine, by 25.0%"


@needs_nvrtc
def test_a_kernel_is_tried_whatever_an_applications_default_device_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with torch.device("meta"):
        assert obstacle_on(CARD, torch.float16, lambda: float(torch.zeros(1))) == ""
