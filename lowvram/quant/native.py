"""`native.c` -> a product of bfloat16 rows and torch's packed 4-bit blocks, compiled on this machine by its C compiler.

An accelerator on which nothing depends: `load_kernel` says why there is none (no compiler, a processor without the
bfloat16 instructions of AVX-512, which AMD has from Zen 4 and Intel's servers from Sapphire Rapids on, or a torch whose
threads it cannot use).
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BackendError
from ..user_cache import user_cache
from .packing import MAX_NIBBLE

Multiply = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""rows [M, K] bfloat16, bytes [N, K/2], (scale, zero) pairs [K/G, N, 2] bfloat16, G -> [M, N] bfloat16: all contiguous,
G even, N a multiple of 64."""

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-shared", "-fPIC", "-x", "c", "-")
COMPILE_S = 60

MAPS = Path("/proc/self/maps")
"""Which libraries this process has loaded, on Linux."""

TEAM_FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")

BLOCK_COLUMNS = 64
"""How many columns torch's AVX-512 kernel packs together; those of other machines pack 32 or 16."""

MIDPOINT = 8
"""The nibble that torch's format takes for 0."""

SELF_TEST_TOLERANCE = 0.01
"""Three times the error that bfloat16 explains, and far below what a misread nibble makes."""


def load_kernel(cache_folder: Path | None = None) -> Multiply:
    """The kernel, compiled now or before into `cache_folder` (the user's cache) and tried out.

    Raises BackendError when it cannot be had on this machine, with the reason.
    """
    library, team = _library(str(cache_folder or user_cache())), _torch_team()
    if not library.lowvram_supported():
        raise _refusal("this processor has no AVX-512 instructions for bfloat16")
    multiply = partial(_multiply, library, team)
    if (error := self_test(multiply)) > SELF_TEST_TOLERANCE:
        raise _refusal(f"what was compiled is wrong by {error:.1%}")
    return multiply


def compiled_file(cache_folder: Path) -> Path:
    """Where the kernel is, or will be, kept: one file for each source and kind of machine."""
    key = hashlib.sha256(b"\0".join((_source(), *map(str.encode, (*FLAGS, platform.machine()))))).hexdigest()[:16]
    return cache_folder / f"int4-{key}.so"


def self_test(multiply: Multiply) -> float:
    """The largest relative error, over several blocks and groups, for numbers of rows that the kernel treats apart."""
    generator = torch.Generator()
    generator.seed()  # other numbers each time: where a kernel forgets to write may lie what an earlier test left there
    columns, inputs, group_size = 3 * BLOCK_COLUMNS, 128, 32
    packed = torch.randint(0, 256, (columns, inputs // 2), generator=generator, dtype=torch.uint8)
    pairs = torch.randn(inputs // group_size, columns, 2, generator=generator).bfloat16()
    rows = torch.randn(7, inputs, generator=generator).bfloat16()
    exact = rows.double() @ _unpacked(packed, pairs, group_size)
    products = [multiply(rows[:n], packed, pairs, group_size).double() for n in (1, 2, 4, 7)]
    return max(float((y - exact[: len(y)]).norm() / exact[: len(y)].norm()) for y in products)


def in_blocks(packed: Tensor) -> Tensor:
    """Torch's bytes for AVX-512 [n, K/2] as [n/64, K, 32]: byte j holds columns j (low) and j + 32 of its block."""
    return packed.view(len(packed) // BLOCK_COLUMNS, -1, BLOCK_COLUMNS // 2)


class _Team(ctypes.Structure):
    """What `native.c` calls a Team."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("parallel", "thread", "size"))


class _Product(ctypes.Structure):
    """What `native.c` calls a Product."""

    _fields_ = (
        ("team", ctypes.POINTER(_Team)),
        *((name, ctypes.c_void_p) for name in ("x", "group_sums", "packed", "pairs", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "columns", "group_size")),
    )


def _multiply(
    library: ctypes.CDLL, team: _Team, rows: Tensor, packed: Tensor, pairs: Tensor, group_size: int
) -> Tensor:
    """See `Multiply`. As many threads as torch uses share the columns."""
    n_rows, inputs = rows.shape
    columns = len(packed)
    group_sums = rows.unflatten(1, (-1, group_size)).sum(-1, dtype=torch.float32)
    out = rows.new_empty(n_rows, columns)
    addresses = (tensor.data_ptr() for tensor in (rows, group_sums, packed, pairs, out))
    product = _Product(ctypes.pointer(team), *addresses, n_rows, inputs, columns, group_size)
    library.lowvram_multiply(ctypes.byref(product), torch.get_num_threads())
    return out


@cache
def _torch_team() -> _Team:
    """Of the OpenMP that torch has loaded; another library may have brought one of its own."""
    try:
        lines = MAPS.read_text(encoding="utf-8").splitlines()
        loaded = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}
        nearest = min(loaded, key=lambda path: (not path.startswith(str(Path(torch.__file__).parent)), path))
        functions = [getattr(ctypes.CDLL(nearest), name) for name in TEAM_FUNCTIONS]
    except (OSError, ValueError, AttributeError) as error:
        raise _refusal(f"torch's OpenMP threads cannot be reached: {error}") from error
    return _Team(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))


@cache
def _library(cache_folder: str) -> ctypes.CDLL:
    compiled = compiled_file(Path(cache_folder))
    try:
        if not compiled.exists():
            _compile(_source(), compiled)
        library = ctypes.CDLL(str(compiled))
    except OSError as error:
        raise _refusal(f"it cannot be kept in {cache_folder} or loaded from there: {error}") from error
    library.lowvram_multiply.argtypes = (ctypes.POINTER(_Product), ctypes.c_uint)
    library.lowvram_multiply.restype = None
    return library


def _source() -> bytes:
    return files(__package__).joinpath("native.c").read_bytes()


def _compile(source: bytes, compiled: Path) -> None:
    """Into place in one step: another process may be looking for it."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise _refusal(f"there is no C compiler here: none of {', '.join(COMPILERS)} was found")
    compiled.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=compiled.parent) as folder:
        fresh = Path(folder) / compiled.name
        try:
            done = subprocess.run(
                [compiler, *FLAGS, "-o", str(fresh)], input=source, capture_output=True, timeout=COMPILE_S
            )
        except subprocess.TimeoutExpired as error:
            raise _refusal(f"{compiler} was not done after {COMPILE_S} s") from error
        if done.returncode:
            raise _refusal(f"{compiler} fails: {_first_line(done.stderr)}")
        fresh.replace(compiled)


def _first_line(stderr: bytes) -> str:
    return next(iter(stderr.decode(errors="replace").splitlines()), "it says nothing")


def _refusal(reason: str) -> BackendError:
    return BackendError(f"the compiled 4-bit kernel does not serve: {reason}", backend="int4-cpu", reason=reason)


def _unpacked(packed: Tensor, pairs: Tensor, group_size: int) -> Tensor:
    """The weight [K, N] in float64."""
    blocks = in_blocks(packed)
    steps = torch.cat((blocks & MAX_NIBBLE, blocks >> 4), dim=-1).double() - MIDPOINT
    scale, zero = pairs.double().repeat_interleave(group_size, dim=0).unbind(-1)
    return steps.transpose(0, 1).flatten(1) * scale + zero
