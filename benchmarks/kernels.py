"""Every way to multiply by 4- or 8-bit weights, at the model's shapes -> its speed beside a 16-bit linear's and plain
reading's.

    python benchmarks/kernels.py [--bits 8] [--shape 3584x18944] [--rows 1 2 ...] [--threads 1 2] [-o X.json]
                                 [--picture X.png]

All ways, and a plain read of memory, take turns within a round, so that a busy machine slows all alike: ratios are
medians over rounds of what was timed side by side. On a CPU llama.cpp is one of them where `llama-cpp-python` is
installed, with weights of its own of as many bits (Q4_K, Q8_0). As in decoding, 256 MiB of other weights pass before
the same come again. GB/s count the bytes in which a backend holds the weights, once for each product, whatever else it
moves.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from bandwidth import BUFFER_BYTES, PlainRead, fastest_read, seconds
from ggml_product import fits, products, version
from harness import card_lines, make_card, write_result
from kernels_picture import draw
from torch import Tensor

from lowvram.device import DTYPES, Device, choose_dtype, open_device
from lowvram.errors import LowVRAMError
from lowvram.graphs import open_recorder
from lowvram.quant.cuda import CudaBackend
from lowvram.quant.int4_cpu import Int4CpuBackend
from lowvram.quant.int8 import SlicesBackend, int8_layout
from lowvram.quant.int8_cpu import Int8CpuBackend
from lowvram.quant.int8_cuda import Int8CudaBackend
from lowvram.quant.int8_matmul import Int8Backend
from lowvram.quant.matmul import Backend
from lowvram.quant.reference import ReferenceBackend
from lowvram.quant.triton_backend import TritonBackend

ROWS = (1, 2, 4, 8, 16, 64, 256, 512)
SHAPES = ((3584, 3584), (3584, 512), (3584, 18944), (18944, 3584))
"""Of the 7B thinker, inputs x outputs: q and o, k and v, gate and up, down."""

CPU_THREADS, CARD_THREADS = (1, 2), (1,)
GROUP_SIZE = 128
ALWAYS, NEVER = 0, 2**31
LINEAR, READ, GGML = "16-bit linear", "plain read", "llama.cpp"

MOST_COPIES = 512
"""Of one linear's weights: enough for 256 MiB of the model's smallest."""

ROUNDS, MOST_ROUNDS, CELL_S = 5, 40, 0.5
"""What is short is repeated beyond the least number of rounds, until it has taken `CELL_S` or the most of them."""

Shape = tuple[int, int]


@dataclass(frozen=True)
class Way:
    """One way to multiply: a call for each copy of the weights, and what one copy weighs."""

    calls: Sequence[Callable[[Tensor], Tensor]]
    weight_bytes: int


@dataclass(frozen=True)
class Cell:
    """One way at one shape, number of threads and number of rows: medians over rounds, and quartiles (25 %, 75 %).

    `speedup` compares with the 16-bit linear and `read_share` with the plain read, each in the same round.
    """

    shape: str
    threads: int
    rows: int
    way: str
    weight_bytes: int
    rounds: int
    ms: float
    ms_quartiles: tuple[float, float]
    speedup: float
    speedup_quartiles: tuple[float, float]
    gb_per_s: float
    read_gb_per_s: float
    read_share: float
    gflop_per_s: float


@dataclass(frozen=True)
class Bench:
    """Where and in which precision to multiply, the least number of rounds, and how wide the weights are."""

    device: torch.device
    dtype: torch.dtype
    rounds: int
    bits: int = 4


def backends(device: torch.device, dtype: torch.dtype) -> dict[str, Backend]:
    """What can multiply there; a backend with several ways of its own appears once for each."""
    found: dict[str, Backend] = {}
    if not Int4CpuBackend.obstacle(device, dtype):
        compiled = Int4CpuBackend()
        found |= {"int4-cpu compiled": compiled} if compiled.compiled else {}
        found["int4-cpu packed"] = Int4CpuBackend(unpack_from_rows=NEVER, load=None)
        found["int4-cpu unpacked"] = Int4CpuBackend(unpack_from_rows=ALWAYS, load=None)
    if not CudaBackend.obstacle(device, dtype):
        found["int4-cuda packed"] = CudaBackend(few_rows=NEVER)
        found["int4-cuda unpacked"] = CudaBackend(few_rows=ALWAYS)
    if not TritonBackend.obstacle(device, dtype):
        found["triton"] = TritonBackend()
    return {**found, "reference": ReferenceBackend()}


def int8_backends(device: torch.device, dtype: torch.dtype) -> dict[str, Int8Backend]:
    """The same for 8 bits."""
    found: dict[str, Int8Backend] = {}
    if not Int8CpuBackend.obstacle(device, dtype):
        found["int8-cpu"] = Int8CpuBackend(few_rows=NEVER)
    if not Int8CudaBackend.obstacle(device, dtype):
        found["int8-cuda packed"] = Int8CudaBackend(few_rows=NEVER)
        found["int8-cuda unpacked"] = Int8CudaBackend(few_rows=ALWAYS)
    return {**found, "int8-slices": SlicesBackend()}


def ways(shape: Shape, bench: Bench) -> dict[str, Way]:
    """A 16-bit linear and every backend on random weights."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(shape[1], shape[0], generator=generator).to(bench.device, bench.dtype)
    packed = _int4_ways if bench.bits == 4 else _int8_ways
    others = {GGML: _ggml_way(dense, bench.bits)} if _ggml_serves(shape, bench) else {}
    return {LINEAR: _in_copies(_dense_product, {"weight": dense}), **packed(shape, bench, generator), **others}


def _int4_ways(shape: Shape, bench: Bench, generator: torch.Generator) -> dict[str, Way]:
    in_features, out_features = shape
    groups, words = in_features // GROUP_SIZE, out_features // 8
    qweight, qzeros = (
        torch.randint(-(2**31), 2**31, (rows, words), generator=generator, dtype=torch.int32)
        for rows in (in_features, groups)
    )
    scales = torch.rand(groups, out_features, generator=generator).half() / 1024
    found = {}
    for name, backend in backends(bench.device, bench.dtype).items():
        layout = backend.layout(in_features, out_features, GROUP_SIZE, bench.dtype)
        weights = {leaf: torch.empty(of.shape, dtype=of.dtype, device=bench.device) for leaf, of in layout.items()}
        backend.pack(qweight, qzeros, scales, GROUP_SIZE, weights)
        found[name] = _in_copies(partial(_packed_product, backend), weights)
    return found


def _int8_ways(shape: Shape, bench: Bench, generator: torch.Generator) -> dict[str, Way]:
    layout = int8_layout(*shape, GROUP_SIZE)
    packed = torch.randint(-(2**31), 2**31, layout["weight_packed"].shape, generator=generator, dtype=torch.int32)
    scales = torch.rand(layout["weight_scale"].shape, generator=generator).half() / 1024
    weights = {"packed": packed.to(bench.device), "scales": scales.to(bench.device)}
    found = int8_backends(bench.device, bench.dtype)
    return {name: _in_copies(partial(_int8_product, backend), weights) for name, backend in found.items()}


def measure(
    shapes: Iterable[Shape], rows: Sequence[int], reads: Mapping[int, PlainRead], bench: Bench
) -> Iterator[Cell]:
    """Every shape by the numbers of threads in `reads` and the numbers of rows, as they come."""
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        found = ways(shape, bench)
        for threads, read in reads.items():
            for n in rows:
                x = torch.randn(n, shape[0], generator=generator).to(bench.device, bench.dtype)
                with torch_threads(threads), torch.inference_mode():
                    yield from _cells(shape, threads, found, x, read, bench.rounds)


def result_of(card: Mapping[str, Any], reads: Mapping[int, PlainRead], cells: Sequence[Cell]) -> dict[str, Any]:
    """What is kept: the card, the plain read by number of threads, and every cell.

    A cell's `matmul_share` compares its GFLOP/s with the most that the 16-bit linear reached with as many threads.
    """
    most = {
        threads: max(cell.gflop_per_s for cell in cells if (cell.threads, cell.way) == (threads, LINEAR))
        for threads in reads
    }
    return {
        "card": card,
        "reads": [
            {
                "threads": threads,
                "how": read.how,
                "gb_per_s": median(cell.read_gb_per_s for cell in cells if cell.threads == threads),
            }
            for threads, read in reads.items()
        ],
        "cells": [{**asdict(cell), "matmul_share": cell.gflop_per_s / most[cell.threads]} for cell in cells],
    }


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """All tables for people."""
    lines = [f"{read['threads']} thread(s): {read['how']} {read['gb_per_s']:.1f} GB/s" for read in result["reads"]]
    lines.append("ms · as multiple of the 16-bit linear · share of that read · share of the best 16-bit GFLOP/s")
    tables: dict[tuple[str, int], dict[int, list[Mapping[str, Any]]]] = {}
    for cell in result["cells"]:
        tables.setdefault((cell["shape"], cell["threads"]), {}).setdefault(cell["rows"], []).append(cell)
    for (shape, threads), by_rows in tables.items():
        names = [cell["way"] for cell in next(iter(by_rows.values()))]
        lines += ["", f"{shape}, {threads} thread(s)", " " * 8 + "".join(f"{name:>30}" for name in names)]
        lines += [f"{rows:>3} rows" + "".join(f"{_words(cell):>30}" for cell in row) for rows, row in by_rows.items()]
    return lines


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch computes with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep and draw the result if asked; returns the exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        _run(chosen)
    except LowVRAMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(chosen: argparse.Namespace) -> None:
    device, load_before = open_device(chosen.device), psutil.getloadavg()[0]
    bench = Bench(device.torch, choose_dtype(chosen.dtype, device.torch, stored="float16"), chosen.rounds, chosen.bits)
    threads = chosen.threads or (CPU_THREADS if device.torch.type == "cpu" else CARD_THREADS)
    reads = {}
    for n in threads:
        with torch_threads(n):
            reads[n] = fastest_read(device.torch)
    cells = list(measure(chosen.shapes or SHAPES, chosen.rows, reads, bench))
    card = make_card(_title(device), **_conditions(bench, load_before))
    result = result_of(card, reads, cells)
    print(json.dumps(result) if chosen.json else "\n".join([*card_lines(card), *table_lines(result)]))
    if chosen.output:
        write_result(chosen.output, result)
    if chosen.picture:
        draw(result, chosen.picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="4- or 8-bit linears beside a 16-bit one and a plain read.")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of a packed weight (default: 4)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: bfloat16, float16 on a card")
    parser.add_argument("--shape", dest="shapes", action="append", type=_shape, help="inputs x outputs, as 3584x18944")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--threads", nargs="+", type=int, help="numbers of CPU threads (default: 1 2; 1 for a card)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="the least number; what is short takes more")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file, too")
    parser.add_argument("--picture", type=Path, help="draw a PNG (needs matplotlib)")
    return parser


def _in_copies(product: Callable[[Mapping[str, Tensor], Tensor], Tensor], weights: Mapping[str, Tensor]) -> Way:
    """A product with so many copies of its weights that no cache holds one until its turn comes again."""
    n_bytes = sum(tensor.nbytes for tensor in weights.values())
    copies = [weights]
    while len(copies) < _copies(n_bytes):
        copies.append({name: tensor.clone() for name, tensor in weights.items()})
    return Way([partial(product, copy) for copy in copies], n_bytes)


def _copies(n_bytes: int) -> int:
    return min(MOST_COPIES, 1 + BUFFER_BYTES // n_bytes)


def _ggml_serves(shape: Shape, bench: Bench) -> bool:
    return bench.device.type == "cpu" and version() is not None and fits(shape[0])


def _ggml_way(dense: Tensor, bits: int) -> Way:
    first, *_ = found = products(dense, bits, _copies(dense.numel() * bits // 8))
    return Way(found, first.weight_bytes)


def _dense_product(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weights["weight"])


def _packed_product(backend: Backend, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return backend.matmul(x, weights, GROUP_SIZE)


def _int8_product(backend: Int8Backend, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return backend.matmul(x, weights["packed"], weights["scales"], GROUP_SIZE)


def _cells(
    shape: Shape, threads: int, found: Mapping[str, Way], x: Tensor, read: PlainRead, rounds: int
) -> Iterator[Cell]:
    """Every way at x [M, K]."""
    timers = {READ: partial(seconds, read.work, x.device)} | {name: _timer(way, x) for name, way in found.items()}
    taken_s = _rounds(timers, rounds)
    gflop = 2e-9 * len(x) * shape[0] * shape[1]
    read_gb_per_s = read.n_bytes / taken_s[READ] / 1e9
    for name, way in found.items():
        s = taken_s[name]
        yield Cell(
            f"{shape[0]}x{shape[1]}",
            threads,
            len(x),
            name,
            way.weight_bytes,
            len(s),
            *_spread(1e3 * s),
            *_spread(taken_s[LINEAR] / s),
            gb_per_s=way.weight_bytes / float(np.median(s)) / 1e9,
            read_gb_per_s=float(np.median(read_gb_per_s)),
            read_share=float(np.median(way.weight_bytes / s / 1e9 / read_gb_per_s)),
            gflop_per_s=gflop / float(np.median(s)),
        )


def _timer(way: Way, x: Tensor) -> Callable[[], float]:
    """Measures the seconds of one product. On a CPU the next copy is taken each time. On a card all of them follow one
    another in a CUDA graph, because starting a kernel from Python may take longer than the kernel does."""
    recorder = open_recorder(x.device)
    if recorder is None:
        turns = cycle(way.calls)
        return lambda: seconds(partial(next(turns), x), x.device)

    def all_copies() -> None:
        for call in way.calls:
            call(x)

    all_copies()
    again = recorder.capture(all_copies)
    return lambda: seconds(again, x.device) / len(way.calls)


def _rounds(timers: Mapping[str, Callable[[], float]], least: int) -> dict[str, np.ndarray]:
    """Each timer's seconds, round by round. One round more, the first, only warms up."""
    taken: dict[str, list[float]] = {name: [] for name in timers}
    for timer in timers.values():
        timer()
    began_s, turn = time.perf_counter(), 0
    while turn < least or (turn < MOST_ROUNDS and time.perf_counter() - began_s < CELL_S):
        for name, timer in timers.items():
            taken[name].append(timer())
        turn += 1
    return {name: np.array(found) for name, found in taken.items()}


def _spread(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    low, middle, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return middle, (low, high)


def _words(cell: Mapping[str, Any]) -> str:
    shares = f"{cell['read_share']:5.0%} {cell['matmul_share']:5.0%}"
    return f"{cell['ms']:9.2f} {cell['speedup']:5.2f}x {shares}"


def _title(device: Device) -> str:
    return device.title if device.torch.type != "cpu" else "CPU"  # its number of threads changes in a run


def _conditions(bench: Bench, load_before: float) -> dict[str, Any]:
    return {
        "dtype": str(bench.dtype).removeprefix("torch."),
        "bits": bench.bits,
        "group_size": GROUP_SIZE,
        "least_rounds": bench.rounds,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average_before": round(load_before, 1),
        "load_average_after": round(psutil.getloadavg()[0], 1),
        "llama_cpp": version() or "absent",
        "absent": _absent(bench),
    }


def _absent(bench: Bench) -> dict[str, str]:
    """Kernels that cannot serve here, and why."""
    of_4_bits, of_8_bits = (Int4CpuBackend, CudaBackend, TritonBackend), (Int8CpuBackend, Int8CudaBackend)
    kinds: Any = of_4_bits if bench.bits == 4 else of_8_bits
    reasons = {kind.name: kind.obstacle(bench.device, bench.dtype) for kind in kinds}
    return {name: reason for name, reason in reasons.items() if reason}


def _shape(text: str) -> Shape:
    in_features, _, out_features = text.partition("x")
    return int(in_features), int(out_features)


if __name__ == "__main__":
    raise SystemExit(main())
