"""The int4-cuda backend: decodes from AWQ's own tensors with a kernel that is compiled on the user's machine.

NVRTC, which comes with CUDA builds of torch, compiles `awq.cu` at first use, and NVIDIA's cuda.core starts it: no C++
compiler and no toolkit are needed. A few rows are multiplied straight from the packed words; for more of them a slice
of columns at a time is unpacked in 16 bit for cuBLAS. One packed copy serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, Protocol

import torch
from torch import Tensor

from .packing import NIBBLES_PER_WORD, TensorSpec, pack_awq, unpack_awq
from .reference import ReferenceBackend, Workspace

FEW_ROWS = 16
"""Up to here rows are multiplied from the packed words: every 4 of them take a pass over half a byte per weight, of
which all but the first find it in the cache; unpacking moves 4.5 bytes. By this arithmetic, not by measurement."""

ROWS_PER_BLOCK = (1, 4)
SUFFIX = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
KERNELS = tuple(
    name
    for suffix in SUFFIX.values()
    for name in (*(f"multiply_{suffix}_{rows}" for rows in ROWS_PER_BLOCK), f"unpack_{suffix}")
)

RUN, TILE_WORDS, SLICES = 32, 8, 64
UNPACK_WORDS, UNPACK_RUNS = 32, 8
"""How `awq.cu` divides the work: see there."""

SLICE_WEIGHTS = 2**23
"""Weights unpacked at once: 16 MiB, so that the largest linear of the 7B thinker takes nine slices."""

ALIGNMENT_BYTES = 16
"""The kernel reads eight inputs at once."""

SELF_TEST_TOLERANCE = 0.01
"""Three times the error that bfloat16 explains, and far below what a misread nibble makes."""


class Launch(Protocol):
    """Starts a kernel of `awq.cu` on the current stream: `grid` blocks of `threads`, given addresses and integers."""

    def __call__(self, kernel: str, grid: tuple[int, int], threads: int, *arguments: int) -> None: ...


class CudaBackend:
    """Multiplies by `awq.cu`, which `load` compiles once for each card; see `matmul.Backend`.

    It never waits for the card, and allocates nothing but its result and, for many rows, a slice: once it has run, it
    can be captured in a CUDA graph. Linears with groups that are no multiple of 32 are left to the reference backend.
    """

    name = "int4-cuda"

    def __init__(
        self, reason: str = "", load: Callable[[torch.device], Launch] | None = None, few_rows: int = FEW_ROWS
    ) -> None:
        self.reason = reason
        self._few_rows = few_rows
        self._load = load or load_kernels
        self._loaded: dict[torch.device, Launch] = {}
        self._reference = ReferenceBackend()
        self._workspace = Workspace()

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot serve here, or nothing: it must compile for this card and compute a small linear rightly."""
        if device.type != "cuda":
            return f"it runs on a CUDA card, not on {device}"
        if dtype not in SUFFIX:
            return f"it computes in float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
        if not torch.cuda.is_available():
            return "torch finds no CUDA card"
        try:
            from cuda.core._utils.cuda_utils import CUDAError  # what cuda.core raises has no public name
        except ImportError as missing:
            return f"cuda-core cannot be imported ({missing}): pip install 'lowvram[cuda]'"
        try:
            error = self_test(CudaBackend(), device, dtype)
        except (CUDAError, RuntimeError) as failure:
            return f"its kernel fails on this machine: {failure}"
        return "" if error < SELF_TEST_TOLERANCE else f"its kernel is wrong on this machine, by {error:.1%}"

    def layout(
        self, in_features: int, out_features: int, group_size: int, dtype: torch.dtype
    ) -> Mapping[str, TensorSpec]:
        """AWQ's own tensors."""
        return self._reference.layout(in_features, out_features, group_size, dtype)

    def pack(self, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, out: Mapping[str, Tensor]) -> None:
        """Copy AWQ's tensors."""
        self._reference.pack(qweight, qzeros, scales, group_size, out)

    def matmul(self, x: Tensor, weights: Mapping[str, Tensor], group_size: int) -> Tensor:
        """x [..., K] float16 or bfloat16 -> [..., N], a new tensor."""
        if group_size % RUN:
            return self._reference.matmul(x, weights, group_size)
        stored = weights["qweight"], weights["qzeros"], weights["scales"]
        in_features, words = stored[0].shape
        rows = x.reshape(-1, in_features).contiguous()
        if rows.data_ptr() % ALIGNMENT_BYTES:
            rows = rows.clone()
        out = rows.new_empty(len(rows), words * NIBBLES_PER_WORD)
        if len(rows) > self._few_rows:
            self._unpack_and_multiply(rows, *stored, group_size, out)
        elif len(rows):
            self._multiply(rows, *stored, group_size, out)
        return out.view(*x.shape[:-1], out.shape[1])

    def _multiply(
        self, rows: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, out: Tensor
    ) -> None:
        """rows [M, K] times the packed weight -> out [M, N]."""
        in_features, words = qweight.shape
        per_block = ROWS_PER_BLOCK[len(rows) > 1]
        self._launch_on(rows.device)(
            f"multiply_{SUFFIX[rows.dtype]}_{per_block}",
            (_blocks(len(rows), per_block), _blocks(words, TILE_WORDS)),
            TILE_WORDS * SLICES,
            *_addresses(rows, qweight, qzeros, scales, out),
            *(len(rows), in_features, words, group_size),
        )

    def _unpack_and_multiply(
        self, rows: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, out: Tensor
    ) -> None:
        """The same, a slice of columns at a time."""
        in_features, words = qweight.shape
        launch, kernel = self._launch_on(rows.device), f"unpack_{SUFFIX[rows.dtype]}"
        step = max(1, SLICE_WEIGHTS // in_features // NIBBLES_PER_WORD)
        for first, columns in zip(range(0, words, step), out.split(step * NIBBLES_PER_WORD, dim=1), strict=True):
            weight = self._workspace.take((in_features, columns.shape[1]), rows.dtype, rows.device)
            n_words = columns.shape[1] // NIBBLES_PER_WORD
            launch(
                kernel,
                (_blocks(n_words, UNPACK_WORDS), _blocks(in_features, UNPACK_RUNS * RUN)),
                UNPACK_WORDS * UNPACK_RUNS,
                *_addresses(qweight, qzeros, scales, weight),
                *(first, n_words, in_features, words, group_size),
            )
            torch.mm(rows, weight, out=columns)

    def _launch_on(self, device: torch.device) -> Launch:
        if device not in self._loaded:
            self._loaded[device] = self._load(device)
        return self._loaded[device]


def load_kernels(device: torch.device) -> Launch:
    """Compile `awq.cu` for a card, or take it from the user's cache, and load it.

    Raises ImportError without cuda.core, and what cuda.core raises when the card or its driver is too old or too new.
    """
    from cuda.core import Device, LaunchConfig, launch

    card = Device(device.index)
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        card.set_current()
        code = compile_kernels(f"sm_{major}{minor}")
        kernels = {name: code.get_kernel(name) for name in KERNELS}

    def start(kernel: str, grid: tuple[int, int], threads: int, *arguments: int) -> None:
        with torch.cuda.device(device):
            card.set_current()  # a thread in which torch has not used the card yet has no context
            launch(torch.cuda.current_stream(), LaunchConfig(grid=grid, block=threads), kernels[kernel], *arguments)

    return start


def compile_kernels(arch: str) -> Any:
    """`awq.cu` as cuda.core's ObjectCode for `arch` (such as sm_86), which need not be this machine's.

    Kept in cuda.core's cache below XDG_CACHE_HOME, LOCALAPPDATA or ~/.cache under a key of source, options and NVRTC's
    version; where that cannot be written to, compiled anew each time (one to two seconds on a CPU).
    """
    from cuda.core import Program, ProgramOptions
    from cuda.core.utils import FileStreamProgramCache

    source = files(__package__).joinpath("awq.cu").read_text(encoding="utf-8")
    program = Program(source, "c++", ProgramOptions(name="awq", arch=arch, std="c++17"))
    try:
        return program.compile("cubin", cache=FileStreamProgramCache())
    except OSError:
        return program.compile("cubin")


def self_test(backend: CudaBackend, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of a small linear, both ways: one with a second tile and slices of two runs."""
    generator = torch.Generator().manual_seed(0)
    group_size, in_features, out_features = RUN, (SLICES + 2) * RUN, (TILE_WORDS + 1) * NIBBLES_PER_WORD
    stored = pack_awq(torch.randn(out_features, in_features, generator=generator), group_size)
    x = torch.randn(FEW_ROWS + 1, in_features, generator=generator).to(dtype)
    exact = x.float() @ unpack_awq(*stored, group_size, torch.float32).t()
    weights = dict(zip(("qweight", "qzeros", "scales"), (tensor.to(device) for tensor in stored), strict=True))
    products = [backend.matmul(x[:rows].to(device), weights, group_size).cpu() for rows in (1, FEW_ROWS, len(x))]
    return max(float((y - exact[: len(y)]).norm() / exact[: len(y)].norm()) for y in products)


def _addresses(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _blocks(n: int, per_block: int) -> int:
    return -(-n // per_block)
