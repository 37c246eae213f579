"""Run a script on torch's own CUDA side without a card: over a runtime that keeps count and computes nothing.

    python benchmarks/stub.py [--vram 12GiB] [--sm 86] benchmarks/memory.py --trace 7b-awq --weights WEIGHTS …
    python benchmarks/stub.py -m lowvram run examples/clip.mp4 --model demo --vram 3GiB

Torch's dispatcher, caching allocator, streams, events and graph capture are the real ones, and so are their refusals;
below them `stub/` stands for the runtime, the driver, cuBLAS and cuDNN. Numbers mean nothing: what is read from the
card is zero, and so is every token. Memory means a lot: what torch takes from the driver is what it would take from a
card, but for the context and what libraries keep to themselves or ask of torch as workspace. Kernels of ours are let
through although their trial finds them wrong. Needs Linux, a C compiler, torch built for CUDA 13 and its allocator
without expandable segments; what was refused, and counts, are told on stderr.
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from lowvram.errors import OptionError
from lowvram.offload.budget import parse_bytes

SOURCES = Path(__file__).parent / "stub"

CALLERS = ("c10_cuda", "torch_cuda", "torch_cuda_linalg", "torch_python", "torch_cpu", "torch_nvshmem")
"""Torch's libraries that call CUDA's."""

STUBBED = ("cuda", "__cuda", "cublas", "cudnn")
"""How the functions begin that are to do nothing, unless `stub/` says more about them."""

HOST_DEFINES = """
#define __host__
#define __device__
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
#define __cudart_builtin__
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
#define CUDARTAPI
#define CUDARTAPI_CDECL
"""
"""Of crt/host_defines.h, which is the compiler's and not among torch's packages, what the runtime's headers need."""

HEADERS = Path("nvidia", "cu13", "include")
"""Of CUDA 13, where torch's packages bring it."""

INSIDE = "LOWVRAM_STUBBED"


def build(folder: Path) -> tuple[Path, Path]:
    """Compile the stub for the torch that is installed; returns what goes before CUDA's libraries, and the driver."""
    packages = _packages()
    headers = folder / "crt" / "host_defines.h"
    headers.parent.mkdir()
    headers.write_text(HOST_DEFINES, encoding="utf-8")
    includes = [folder, packages / HEADERS, packages / "nvidia" / "cudnn" / "include"]
    sources = [SOURCES / "runtime.c", SOURCES / "libraries.c"]
    said = _compile(folder / "said.so", sources, includes)
    rest = folder / "rest.c"
    unsaid = sorted(_wanted(packages / "torch" / "lib") - _symbols(said, "--defined-only"))
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in unsaid), encoding="utf-8")
    whole = _compile(folder / "libstub.so", [*sources, rest], includes)
    return whole, _compile(folder / "libcuda.so.1", [SOURCES / "driver.c"], includes)


def _compile(target: Path, sources: Sequence[Path], includes: Sequence[Path]) -> Path:
    flags = ("-O1", "-shared", "-fPIC", "-w", f"-Wl,-soname,{target.name}")
    included = (f"-I{path}" for path in includes)
    command = [os.environ.get("CC", "cc"), *flags, *included, "-o", str(target), *map(str, sources)]
    subprocess.run(command, check=True)
    return target


def _wanted(libraries: Path) -> set[str]:
    """What torch calls of CUDA."""
    names = set[str]().union(*(_symbols(libraries / f"lib{name}.so", "--undefined-only") for name in CALLERS))
    return {name for name in names if name.startswith(STUBBED)}


def _symbols(library: Path, which: str) -> set[str]:
    printed = subprocess.run(["nm", "-D", which, library], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].partition("@")[0] for line in printed.splitlines()}


def _packages() -> Path:
    """Where torch is installed, and CUDA beside it."""
    found = find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parents[1]


def run_inside(arguments: Sequence[str]) -> None:
    """Run a script, or a module after -m, as its own program, with kernels that compute nothing allowed to serve."""
    from lowvram.quant import trial

    trial.TOLERANCE = 1.0  # what zeros err by
    is_module = arguments[0] == "-m"
    sys.argv = list(arguments[is_module:])
    if is_module:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the stub and run the program over it; returns the program's exit code."""
    parser = argparse.ArgumentParser(description="A program on torch's CUDA side without a card.")
    parser.add_argument("--vram", default="12GiB", help="of the card that is not there (default: %(default)s)")
    parser.add_argument(
        "--sm", type=int, default=86, help="its compute capability, without the point (default: %(default)s)"
    )
    parser.add_argument("-m", dest="is_module", action="store_true", help="the program is a module, no script")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="and its arguments")
    chosen = parser.parse_args(arguments)
    if not chosen.program:
        parser.error("name a program")
    if not (_packages() / HEADERS).is_dir():
        parser.error("this torch is not built for CUDA 13: install one that is, which needs no card")
    try:
        vram_bytes = parse_bytes(chosen.vram)
    except OptionError as error:
        parser.error(str(error))
    with TemporaryDirectory() as folder:
        stub, driver = build(Path(folder))
        environment = os.environ | {
            INSIDE: "1",
            "LD_PRELOAD": str(stub),
            "LD_LIBRARY_PATH": ":".join(filter(None, (str(driver.parent), os.environ.get("LD_LIBRARY_PATH")))),
            "STUB_BYTES": str(vram_bytes),
            "STUB_SM": str(chosen.sm),
        }
        program = (*(["-m"] if chosen.is_module else []), *chosen.program)
        return subprocess.run([sys.executable, __file__, *program], env=environment).returncode


if __name__ == "__main__":
    if INSIDE in os.environ:
        run_inside(sys.argv[1:])
    else:
        sys.exit(main())
