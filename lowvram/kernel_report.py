"""A device -> the code that would multiply by 4- and 8-bit weights there, and why that code, with nothing new compiled.

`quant.matmul` and `quant.int8_matmul` choose for real, and compile and try out what they must. This says beforehand
what it would come to; only whether a CUDA kernel compiles and is right on a card is not known before a model is opened.
What is kept compiled is tried out here too, and made again where it is damaged.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from .errors import BackendError
from .quant import int8_cpu, native
from .quant.compiled import COMPILERS, CSource
from .quant.cuda import CudaBackend
from .quant.int4_cpu import Int4CpuBackend
from .quant.int8 import SlicesBackend
from .quant.int8_cpu import Int8CpuBackend
from .quant.int8_cuda import Int8CudaBackend
from .quant.int8_matmul import INT8_BACKENDS, READABLE_TOO, Int8Backend
from .quant.matmul import BACKENDS, BORROWED, Backend
from .quant.nvrtc import no_cuda_core
from .quant.reference import ReferenceBackend
from .quant.trial import BROKEN
from .quant.triton_backend import TritonBackend

AnyBackend = Backend | Int8Backend


@dataclass(frozen=True)
class KernelReport:
    """The kernel that serves unless another is named, why no better one does, and whether its code is compiled on this
    machine already, will be, or why not (empty: it needs no compiling)."""

    kernel: str
    reason: str
    compiled: str = ""


@dataclass(frozen=True)
class OwnKernel:
    """A kernel of ours for CPUs: its source and who tries it out; for what model; what torch calls the processors that
    can have its instructions; and what serves in its place."""

    source: CSource
    load: Callable[[Path], object]
    model: str
    processors: tuple[str, ...]
    instead: str


OWN_INT4 = OwnKernel(native.SOURCE, native.load_kernel, "a 4-bit model", ("AVX512",), "torch's own code")
OWN_INT8 = OwnKernel(int8_cpu.SOURCE, int8_cpu.load_kernel, "an 8-bit model", ("AVX2", "AVX512"), SlicesBackend.name)


def report_kernel(device: torch.device, dtype: torch.dtype) -> KernelReport:
    """What would multiply by 4-bit weights in `dtype` on `device`."""
    return _best(BACKENDS, device, dtype)


def report_int8_kernel(device: torch.device, dtype: torch.dtype) -> KernelReport:
    """What would multiply by 8-bit weights."""
    if report_kernel(device, dtype).kernel == ReferenceBackend.name:
        return KernelReport(SlicesBackend.name, READABLE_TOO)
    return _best(INT8_BACKENDS, device, dtype)


def report_absent_card() -> KernelReport:
    """What would multiply by 4-bit weights on a CUDA card that is not here."""
    if obstacle := _no_cuda_core():
        return KernelReport(ReferenceBackend.name, obstacle)
    return KernelReport(CudaBackend.name, "cuda-core is installed", _compiled(CudaBackend))


def report_int8_on_absent_card() -> KernelReport:
    """What would multiply by 8-bit weights there."""
    if _no_cuda_core():
        return KernelReport(SlicesBackend.name, READABLE_TOO)
    return KernelReport(Int8CudaBackend.name, "cuda-core is installed", _compiled(Int8CudaBackend))


def report_by_name() -> dict[str, str]:
    """The kernels that serve only where they are asked for: by name, whether what they take is installed, and what
    whoever asks should know. Nothing is imported."""
    known = {TritonBackend.name: (TritonBackend.name, "")}
    known |= {backend.name: (backend.package, backend.caveat) for backend in BORROWED}
    return {name: "; ".join(filter(None, (_installed(package, name), note))) for name, (package, note) in known.items()}


def report_compiled(cache_folder: Path | None = None, own: OwnKernel = OWN_INT4) -> str:
    """Whether a CPU's kernel of ours is compiled: yes, not yet, or why it will not be."""
    refusal = _refusal(own, cache_folder)
    if built := _built(own, cache_folder):
        return f"yes, but it does not serve: {refusal}; {own.instead} does" if refusal else f"yes, kept at {built}"
    if refusal:
        return f"no: {refusal}; {own.instead} serves"
    return f"not yet: {_compiler()} will do it when {own.model} is first opened"


def _built(own: OwnKernel, cache_folder: Path | None) -> Path | None:
    """Where it is kept, if it is compiled."""
    try:
        built = own.source.compiled_file(cache_folder)
    except BackendError:
        return None
    return built if os.path.exists(built) else None  # unlike Path.exists, also where nobody may look


def _refusal(own: OwnKernel, cache_folder: Path | None = None) -> str:
    """Why it does not serve, or will not; it is tried out where it is compiled."""
    if torch.backends.cpu.get_cpu_capability() not in own.processors:
        return f"it takes a processor with {own.processors[0]}"
    try:
        built = own.source.compiled_file(cache_folder)
        if os.path.exists(built):
            own.load(built.parent)
        elif not _compiler():
            return f"there is no C compiler here ({', '.join(COMPILERS)})"
    except BackendError as refusal:
        return refusal.reason
    return ""


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def _best(backends: Sequence[type[AnyBackend]], device: torch.device, dtype: torch.dtype) -> KernelReport:
    passed_over: list[str] = []
    for backend in backends:
        obstacle = _obstacle(backend, device, dtype)
        if not obstacle:
            return KernelReport(backend.name, "; ".join(passed_over) or "the fastest here", _compiled(backend))
        passed_over.append(f"{backend.name} was passed over: {obstacle}")
    raise AssertionError("the last backend serves everywhere")


def _obstacle(backend: type[AnyBackend], device: torch.device, dtype: torch.dtype) -> str:
    """Why it cannot serve there. What might have to be compiled first is not tried out."""
    if backend in (CudaBackend, Int8CudaBackend) and device.type == "cuda":
        return _no_cuda_core()
    if backend is Int8CpuBackend and device.type == "cpu":
        return _refusal(OWN_INT8)
    return backend.obstacle(device, dtype)


def _compiled(backend: type[AnyBackend]) -> str:
    if backend is Int4CpuBackend:
        return report_compiled()
    if backend is Int8CpuBackend:
        return report_compiled(own=OWN_INT8)
    if backend in (CudaBackend, Int8CudaBackend):
        model = "a 4-bit model" if backend is CudaBackend else "an 8-bit model"
        return f"when {model} is first opened on the card, and kept"
    return ""


def _installed(package: str, extra: str) -> str:
    return "installed" if find_spec(package) else f"not installed: pip install 'lowvram[{extra}]'"


def _no_cuda_core() -> str:
    """Why cuda.core cannot be used, or nothing. It is imported: what is installed may be broken, or be hidden by a file
    of the user's that is called cuda.py."""
    try:
        import cuda.core  # noqa: F401
    except BROKEN as missing:
        return no_cuda_core(missing)
    return ""
