"""A C source of this folder -> its product, compiled on this machine by its C compiler, on torch's own threads.

An accelerator on which nothing depends: whoever asks for it is told why there is none (no compiler, a processor without
the instructions, or a torch whose threads it cannot use).
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

from ..errors import BackendError, LowVRAMError
from ..user_cache import user_cache
from .trial import TOLERANCE

Run = Callable[[ctypes.Structure], None]
"""Computes the product that a structure, the source's own, describes. As many threads as torch uses share it."""

TEAM = "team.c"
"""What every source begins with."""

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-shared", "-fPIC", "-x", "c", "-")
COMPILE_S = 60

MAPS = Path("/proc/self/maps")
"""Which libraries this process has loaded, on Linux."""

TEAM_FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")

DIGEST_BYTES = hashlib.sha256().digest_size
"""A compiled file ends with the digest of all that comes before it, where no loader looks."""


@dataclass(frozen=True)
class CSource:
    """The file `name` of this folder, which serves `backend` where a processor has the `instructions`.

    It has `lowvram_supported()`, and `lowvram_multiply(team, product, threads)`.
    """

    name: str
    backend: str
    instructions: str

    @property
    def text(self) -> bytes:
        """All of it that a compiler needs."""
        return b"".join(files(__package__).joinpath(name).read_bytes() for name in (TEAM, self.name))

    def compiled_file(self, cache_folder: Path | None = None) -> Path:
        """Where it is, or will be, kept (in the user's cache): one file for each text and kind of machine.

        Raises BackendError for a user who has no such folder.
        """
        key = hashlib.sha256(b"\0".join((self.text, *map(str.encode, (*FLAGS, platform.machine()))))).hexdigest()[:16]
        return (cache_folder or self._users_cache()) / f"{self.backend}-{key}.so"

    def load(self, cache_folder: Path | None = None) -> Run:
        """Compile it, now or before, into `cache_folder` (the user's cache).

        Raises BackendError when it cannot be had on this machine, with the reason.
        """
        team, library = _torch_team(self), _library(self, cache_folder or self._users_cache())
        if not library.lowvram_supported():
            raise self.refusal(f"this processor has no {self.instructions}")

        def run(product: ctypes.Structure) -> None:
            library.lowvram_multiply(ctypes.byref(team), ctypes.byref(product), torch.get_num_threads())

        return run

    def _users_cache(self) -> Path:
        try:
            return user_cache()
        except LowVRAMError as error:
            raise self.refusal(str(error.args[0])) from error

    def require(self, error: float) -> None:
        """Raise BackendError where what was compiled has too large a relative error."""
        if not error <= TOLERANCE:
            raise self.refusal(f"what was compiled is wrong by {error:.1%}")

    def refusal(self, reason: str) -> BackendError:
        """What is raised where it does not serve."""
        return BackendError(
            f"the compiled kernel of {self.backend} does not serve: {reason}", backend=self.backend, reason=reason
        )


class _Team(ctypes.Structure):
    """What `team.c` calls a Team."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("parallel", "thread", "size"))


@cache
def _torch_team(source: CSource) -> _Team:
    """Of the OpenMP that torch has loaded; another library may have brought one of its own."""
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        loaded = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}
        nearest = min(loaded, key=lambda path: (not path.startswith(str(Path(torch.__file__).parent)), path))
        functions = [getattr(ctypes.CDLL(nearest), name) for name in TEAM_FUNCTIONS]
    except (OSError, ValueError, AttributeError) as error:
        raise source.refusal(f"torch's OpenMP threads cannot be reached: {error}") from error
    return _Team(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))


@cache
def _library(source: CSource, cache_folder: Path) -> ctypes.CDLL:
    compiled = source.compiled_file(cache_folder)
    try:
        if not _is_whole(compiled):
            _compile(source, compiled)
        library = ctypes.CDLL(str(compiled))
    except OSError as error:
        raise source.refusal(f"it cannot be kept in {cache_folder} or loaded from there: {error}") from error
    library.lowvram_multiply.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
    library.lowvram_multiply.restype = None
    return library


def _is_whole(compiled: Path) -> bool:
    """Whether it is there, as it was written: one that a crash or a full disk cut short could end the process."""
    try:
        content = compiled.read_bytes()
    except FileNotFoundError:
        return False
    return content[-DIGEST_BYTES:] == hashlib.sha256(content[:-DIGEST_BYTES]).digest()


def _compile(source: CSource, compiled: Path) -> None:
    """Into place in one step: another process may be looking for it."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise source.refusal(f"there is no C compiler here: none of {', '.join(COMPILERS)} was found")
    compiled.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=compiled.parent) as folder:
        fresh = Path(folder) / compiled.name
        try:
            done = subprocess.run(
                [compiler, *FLAGS, "-o", str(fresh)], input=source.text, capture_output=True, timeout=COMPILE_S
            )
        except subprocess.TimeoutExpired as error:
            raise source.refusal(f"{compiler} was not done after {COMPILE_S} s") from error
        if done.returncode:
            raise source.refusal(f"{compiler} fails: {_first_line(done.stderr)}")
        with fresh.open("ab") as file:
            file.write(hashlib.sha256(fresh.read_bytes()).digest())
        fresh.replace(compiled)


def _first_line(stderr: bytes) -> str:
    return next(iter(stderr.decode(errors="replace").splitlines()), "it says nothing")
