"""A device -> the code that would multiply by 4-bit weights there, and why that code: known without compiling anything.

`quant.matmul` chooses for real, and compiles and tries out what it must. This says beforehand what it would come to;
only whether a CUDA kernel compiles and is right on a card is not known before a model is opened.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from .errors import BackendError
from .quant.cuda import CudaBackend
from .quant.int4_cpu import Int4CpuBackend
from .quant.matmul import BACKENDS, Backend
from .quant.native import COMPILERS, compiled_file, load_kernel
from .quant.reference import ReferenceBackend
from .user_cache import user_cache

NO_CUDA_CORE = "cuda-core is not installed: pip install 'lowvram[cuda]', or 'lowvram[cuda12]' for CUDA 12"


@dataclass(frozen=True)
class KernelReport:
    """The kernel that serves unless another is named, why no better one does, and whether its code is compiled on this
    machine already, will be, or why not (empty: it needs no compiling)."""

    kernel: str
    reason: str
    compiled: str = ""


def report_kernel(device: torch.device, dtype: torch.dtype) -> KernelReport:
    """What would multiply by 4-bit weights in `dtype` on `device`."""
    passed_over: list[str] = []
    for backend in BACKENDS:
        obstacle = _obstacle(backend, device, dtype)
        if not obstacle:
            return KernelReport(backend.name, "; ".join(passed_over) or "the fastest here", _compiled(backend))
        passed_over.append(f"{backend.name} was passed over: {obstacle}")
    raise AssertionError("the last backend serves everywhere")


def report_absent_card() -> KernelReport:
    """The same of a CUDA card that is not here."""
    if not _has_cuda_core():
        return KernelReport(ReferenceBackend.name, NO_CUDA_CORE)
    return KernelReport(CudaBackend.name, "cuda-core is installed", _compiled(CudaBackend))


def report_compiled(cache_folder: Path | None = None) -> str:
    """Whether the CPU's own kernel is compiled: yes, not yet, or why it will not be."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "no: it takes a processor with AVX-512; torch's own code serves"
    built = compiled_file(cache_folder or user_cache())
    if not built.exists():
        compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None:
            return f"no: there is no C compiler here ({', '.join(COMPILERS)}); torch's own code serves"
        return f"not yet: {compiler} will do it when a 4-bit model is first opened"
    try:
        load_kernel(built.parent)
    except BackendError as refusal:
        return f"yes, but it does not serve: {refusal.reason}; torch's own code does"
    return f"yes, kept at {built}"


def _obstacle(backend: type[Backend], device: torch.device, dtype: torch.dtype) -> str:
    """Why it cannot serve there. A kernel for a card is not tried out: it might have to be compiled first."""
    if backend is CudaBackend and device.type == "cuda":
        return "" if _has_cuda_core() else NO_CUDA_CORE
    return backend.obstacle(device, dtype)


def _compiled(backend: type[Backend]) -> str:
    if backend is Int4CpuBackend:
        return report_compiled()
    if backend is CudaBackend:
        return "when a 4-bit model is first opened on the card, and kept"
    return ""


def _has_cuda_core() -> bool:
    return find_spec("cuda") is not None and find_spec("cuda.core") is not None
