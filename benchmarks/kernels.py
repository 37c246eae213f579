"""Time of a 4-bit linear by number of rows, beside a 16-bit one of the same size: each kernel, both of its ways.

    python benchmarks/kernels.py [--device auto] [--rows 1 2 ...] [--shape 3584x18944] [--json] [-o kernels.json]

What is compared takes turns within a round, so that a busy machine slows all alike; ratios are medians over rounds of
what was timed side by side. One thread on a CPU. A weight of this size may stay in a large cache between rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from harness import card_lines, make_card, write_result
from torch import Tensor

from lowvram.device import open_device
from lowvram.quant.cuda import CudaBackend
from lowvram.quant.int4_cpu import Int4CpuBackend
from lowvram.quant.matmul import Backend
from lowvram.quant.reference import ReferenceBackend

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SHAPES = ((3584, 18944), (3584, 3584))
"""gate_proj and q_proj of the 7B thinker: inputs, outputs."""

GROUP_SIZE = 128
ALWAYS, NEVER = 0, 2**31
LINEAR = "16-bit linear"

Way = Callable[[Tensor], Tensor]


def backends(device: torch.device, dtype: torch.dtype) -> dict[str, Backend]:
    """What can multiply there; a kernel with two ways of its own appears once for each."""
    found: dict[str, Backend] = {}
    if not Int4CpuBackend.obstacle(device, dtype):
        found["int4-cpu packed"] = Int4CpuBackend(unpack_from_rows=NEVER)
        found["int4-cpu unpacked"] = Int4CpuBackend(unpack_from_rows=ALWAYS)
    if not CudaBackend.obstacle(device, dtype):
        found["int4-cuda packed"] = CudaBackend(few_rows=NEVER)
        found["int4-cuda unpacked"] = CudaBackend(few_rows=ALWAYS)
    return found or {"reference": ReferenceBackend()}


def ways(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    """A 16-bit linear and every backend on random weights."""
    in_features, out_features = shape
    groups, words = in_features // GROUP_SIZE, out_features // 8
    generator = torch.Generator().manual_seed(0)
    qweight, qzeros = (
        torch.randint(-(2**31), 2**31, (rows, words), generator=generator, dtype=torch.int32)
        for rows in (in_features, groups)
    )
    scales = torch.rand(groups, out_features, generator=generator).half() / 1024
    dense = torch.randn(out_features, in_features, generator=generator).to(device, dtype)
    found: dict[str, Way] = {LINEAR: lambda x: torch.nn.functional.linear(x, dense)}
    for name, backend in backends(device, dtype).items():
        layout = backend.layout(in_features, out_features, GROUP_SIZE, dtype)
        weights = {leaf: torch.empty(spec.shape, dtype=spec.dtype, device=device) for leaf, spec in layout.items()}
        backend.pack(qweight, qzeros, scales, GROUP_SIZE, weights)
        found[name] = _bound(backend, weights)
    return found


def compare(found: Mapping[str, Way], x: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each way on `x`, and how many times as fast as the 16-bit linear it was."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 1):
        for name, way in found.items():
            _wait_for(x.device)
            started = time.perf_counter()
            way(x)
            _wait_for(x.device)
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "ms": 1e3 * statistics.median(taken),
            "speedup": statistics.median(a / b for a, b in zip(seconds[LINEAR], taken, strict=True)),
        }
        for name, taken in seconds.items()
    }


def measure(shapes: Iterable[tuple[int, int]], rows: Sequence[int], device_name: str, rounds: int) -> dict[str, Any]:
    """Every shape by every number of rows, with its card."""
    device = open_device(device_name)
    dtype = torch.bfloat16 if device.torch.type == "cpu" else torch.float16
    threads, load = torch.get_num_threads(), round(psutil.getloadavg()[0], 1)
    torch.set_num_threads(1)
    try:
        result = {f"{k}x{n}": _by_rows((k, n), rows, device.torch, dtype, rounds) for k, n in shapes}
    finally:
        torch.set_num_threads(threads)
    conditions = {"dtype": str(dtype), "group_size": GROUP_SIZE, "rounds": rounds, "threads": 1, "load_average": load}
    card = make_card(device.title, **conditions)
    return {"card": card, "shapes": result}


def table_lines(shape: str, by_rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """A shape's table for people."""
    names = list(next(iter(by_rows.values())))
    lines = [f"{shape:12}" + "".join(f"{name:>26}" for name in names)]
    for rows, found in by_rows.items():
        cells = (f"{found[name]['ms']:.2f} ms {found[name]['speedup']:6.2f} x" for name in names)
        lines.append(f"{rows:>5} rows  " + "".join(f"{cell:>26}" for cell in cells))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the result if asked."""
    parser = argparse.ArgumentParser(description="A 4-bit linear by number of rows, beside a 16-bit one.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--shape", dest="shapes", action="append", type=_shape, help="inputs x outputs, as 3584x18944")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file, too")
    chosen = parser.parse_args(arguments)
    result = measure(chosen.shapes or SHAPES, chosen.rows, chosen.device, chosen.rounds)
    if chosen.json:
        print(json.dumps(result))
    else:
        tables = ("\n".join(table_lines(shape, by_rows)) for shape, by_rows in result["shapes"].items())
        print("\n\n".join(["\n".join(card_lines(result["card"])), *tables]))
    if chosen.output:
        write_result(chosen.output, result)
    return 0


def _bound(backend: Backend, weights: Mapping[str, Tensor]) -> Way:
    return lambda x: backend.matmul(x, weights, GROUP_SIZE)


def _by_rows(
    shape: tuple[int, int], rows: Sequence[int], device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    found = ways(shape, device, dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return {
            str(n): compare(found, torch.randn(n, shape[0], generator=generator).to(device, dtype), rounds)
            for n in rows
        }


def _shape(text: str) -> tuple[int, int]:
    in_features, _, out_features = text.partition("x")
    return int(in_features), int(out_features)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    raise SystemExit(main())
