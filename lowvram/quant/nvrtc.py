"""A CUDA source of this folder -> its kernels, compiled on the user's machine and ready to start on a card.

NVRTC, which comes with CUDA builds of torch, compiles a source at first use, and NVIDIA's cuda.core starts its kernels:
no C++ compiler and no toolkit are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Protocol

import torch
from torch import Tensor

from .trial import BROKEN, complaint, dtype_obstacle

FLOATS = "floats.cu"
"""What every source begins with."""

SUFFIX = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""How kernels' names end."""

ROWS_PER_BLOCK = (1, 4)
"""One kernel is for a decode step, the other for a few rows."""

ALIGNMENT_BYTES = 16
"""Kernels read eight inputs at once."""


class Launch(Protocol):
    """Starts a kernel on the current stream: `grid` blocks of `threads`, given addresses and integers."""

    def __call__(self, kernel: str, grid: tuple[int, int], threads: int, *arguments: int) -> None: ...


@dataclass(frozen=True)
class Source:
    """The file `name` of this folder, which has `multiply` and `unpack` kernels for either dtype."""

    name: str

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of its kernels."""
        return tuple(
            name
            for suffix in SUFFIX.values()
            for name in (*(f"multiply_{suffix}_{rows}" for rows in ROWS_PER_BLOCK), f"unpack_{suffix}")
        )

    @property
    def text(self) -> str:
        """All of it that a compiler needs."""
        return "".join(files(__package__).joinpath(name).read_text(encoding="utf-8") for name in (FLOATS, self.name))

    def compile(self, arch: str, *, anew: bool = False) -> Any:
        """cuda.core's ObjectCode for `arch` (such as sm_86), which need not be this machine's.

        Kept in cuda.core's cache below XDG_CACHE_HOME, LOCALAPPDATA or ~/.cache under a key of source, options and
        NVRTC's version; where that cannot be written to, compiled each time (one to two seconds on a CPU). `anew` does
        not trust what is kept, and replaces it.
        """
        from cuda.core import Program, ProgramOptions
        from cuda.core.utils import FileStreamProgramCache, make_program_cache_key

        text, options = self.text, ProgramOptions(name=self.name, arch=arch, std="c++17")
        program = Program(text, "c++", options)
        try:
            kept = FileStreamProgramCache()
            if anew:
                with suppress(KeyError):
                    del kept[make_program_cache_key(code=text, code_type="c++", options=options, target_type="cubin")]
            return program.compile("cubin", cache=kept)
        except (OSError, RuntimeError):  # the latter where the user has no home folder
            return program.compile("cubin")


@cache
def load_kernels(source: Source, device: torch.device) -> Launch:
    """Compile a source for a card, or take it from the user's cache, and load it, once in a process.

    Raises ImportError without cuda.core, and what cuda.core raises when the card or its driver is too old or too new.
    """
    from cuda.core import Device, LaunchConfig, Stream, launch
    from cuda.core._utils.cuda_utils import CUDAError  # what cuda.core raises has no public name

    card = Device(device.index)
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        card.set_current()
        try:
            kernels = _kernels(source, source.compile(f"sm_{major}{minor}"))
        except CUDAError:  # the driver cannot read it: what is kept may be damaged
            kernels = _kernels(source, source.compile(f"sm_{major}{minor}", anew=True))

    stream_of = cache(Stream.from_handle)  # given torch's own, cuda.core warns at each launch; those never end

    def start(kernel: str, grid: tuple[int, int], threads: int, *arguments: int) -> None:
        with torch.cuda.device(device):
            card.set_current()  # a thread in which torch has not used the card yet has no context
            stream = stream_of(torch.cuda.current_stream().cuda_stream)
            launch(stream, LaunchConfig(grid=grid, block=threads), kernels[kernel], *arguments)

    return start


def _kernels(source: Source, code: Any) -> dict[str, Any]:
    return {name: code.get_kernel(name) for name in source.kernels}


def obstacle_on(device: torch.device, dtype: torch.dtype, self_test: Callable[[], float]) -> str:
    """Why a source's kernels cannot serve there, or nothing: `self_test` runs them and gives their relative error."""
    if device.type != "cuda":
        return f"it runs on a CUDA card, not on {device}"
    if obstacle := dtype_obstacle(dtype, SUFFIX):
        return obstacle
    if not torch.cuda.is_available():
        return "torch finds no CUDA card"
    try:
        from cuda.core._utils.cuda_utils import CUDAError
    except BROKEN as missing:
        return no_cuda_core(missing)
    try:
        with torch.device("cpu"):  # an application may have set another default
            return complaint("its kernel", self_test())
    except (CUDAError, *BROKEN) as failure:
        return f"its kernel fails on this machine: {failure}"


def no_cuda_core(missing: BaseException) -> str:
    """What to say where importing cuda.core raises `missing`."""
    return f"cuda-core cannot be imported ({missing}): pip install 'lowvram[cuda]', or 'lowvram[cuda12]' for CUDA 12"


def aligned_rows(x: Tensor, in_features: int) -> Tensor:
    """x [..., K] as contiguous rows [M, K] that kernels can read."""
    rows = x.reshape(-1, in_features).contiguous()
    return rows.clone() if rows.data_ptr() % ALIGNMENT_BYTES else rows


def addresses(*tensors: Tensor) -> tuple[int, ...]:
    """Where each begins."""
    return tuple(tensor.data_ptr() for tensor in tensors)


def blocks(n: int, per_block: int) -> int:
    """How many blocks of work `n` pieces fill."""
    return -(-n // per_block)
