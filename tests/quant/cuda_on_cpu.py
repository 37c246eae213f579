"""CUDA kernels on the CPU: their source is compiled as C++ beside a header that plays the GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

SHIM = Path(__file__).with_name("cuda_on_cpu.h")
ARGUMENTS = ctypes.c_longlong * 9
"""No kernel takes more 64-bit integers; one that takes fewer leaves the others unread."""


class CpuLaunch:
    """Stands in for the card: runs a kernel to its end at once."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.started: list[str] = []

    def __call__(self, kernel: str, grid: tuple[int, int], threads: int, *arguments: int) -> None:
        self.started.append(kernel)
        function = ctypes.cast(self._library[kernel], ctypes.c_void_p)
        self._library.launch(function, *grid, threads, ARGUMENTS(*arguments))


def compile_for_cpu(folder: Path, source: str) -> CpuLaunch:
    """`source` as C++; skips the test where there is no compiler that can read the header."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++, to run the CUDA source on the CPU")
    if _compile(compiler, folder / "probe", "").returncode:
        pytest.skip(f"needs _Float16, ucontext and -march=native, which {compiler} lacks here")
    done = _compile(compiler, folder / "kernels", source)
    assert done.returncode == 0, done.stderr
    return CpuLaunch(ctypes.CDLL(str(folder / "kernels.so")))


def _compile(compiler: str, path: Path, source: str) -> subprocess.CompletedProcess[str]:
    path.with_suffix(".cpp").write_text(source, encoding="utf-8")
    options = ["-std=c++17", "-O1", "-march=native", "-fPIC", "-shared", "-w", "-include", str(SHIM)]
    command = [compiler, *options, str(path.with_suffix(".cpp")), "-o", str(path.with_suffix(".so"))]
    return subprocess.run(command, capture_output=True, text=True)
