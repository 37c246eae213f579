"""The exact modes against the reference's forward, over every length and pattern of arrival that has ever gone wrong.

    python benchmarks/speech_parity.py

A small DiT whose blocks hear each other, by Euler's rule: in float64, where a slip of one frame would show, and in
float32, as the model runs. The tests walk a part of this grid at each commit.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from latency import PARAMS, SEED, euler, load, noise_of, some_speaker
from torch import Tensor

from lowvram.demo import DemoSize
from lowvram.token2wav.conditioning import Conditioning, prepare
from lowvram.token2wav.dit import StreamingDiT, SystolicDiT, WavefrontDiT
from lowvram.token2wav.ode import solver_stages, time_grid

LENGTHS = (1, 2, 10, 11, 12, 13, 19, 20, 23, 24, 25, 48, 59, 60, 61, 100, 333)
SIZES = (1, 5, 12, 48, None)
"""Codes that come at a time; None is from 0 to 40, at random."""

WAYS: dict[str, type[StreamingDiT]] = {"exact": WavefrontDiT, "offload": SystolicDiT}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
COUPLING = 4.0
"""How much louder than the demo's the layers that look at their neighbours are."""


def coupled_dit(dtype: torch.dtype) -> Any:
    size = DemoSize()
    dit: Any = load(size).code2wav_dit_model.to(dtype)
    for index in (*size.look_ahead_layers, *size.look_backward_layers):
        dit.transformer_blocks[index].attn.to_out[0].weight.data *= COUPLING
    return dit


def arrivals(codes: list[int], size: int | None) -> Iterator[list[int]]:
    sizes = random.Random(SEED)
    while codes:
        count = sizes.randint(0, 40) if size is None else size
        yield codes[:count]
        codes = codes[count:]


def streamed(stream: StreamingDiT, codes: list[int], size: int | None) -> Tensor:
    return torch.cat([stream.push(piece) for piece in arrivals(codes, size)] + [stream.finish()], -1)


def worst_errors(dtype: torch.dtype) -> dict[str, float]:
    """The largest relative error of each way over the grid."""
    dit, worst = coupled_dit(dtype), dict.fromkeys(WAYS, 0.0)
    stages = solver_stages(PARAMS.solver, time_grid(PARAMS.steps))
    conditioning: Conditioning = prepare(dit, some_speaker(), stages, guidance=PARAMS.guidance)
    for length in LENGTHS:
        codes = torch.randint(0, DemoSize().codes, (length,), generator=torch.Generator().manual_seed(SEED)).tolist()
        whole = euler(dit, codes, noise_of(length).to(dtype), PARAMS.steps, some_speaker())
        for (name, way), size in product(WAYS.items(), SIZES):
            mel = streamed(way(dit, conditioning, seed=SEED), codes, size)
            worst[name] = max(worst[name], float((mel - whole).norm() / whole.norm()))
    return worst


def main() -> int:
    """Print the worst error of each way; returns 1 if one is beyond its tolerance."""
    failed = False
    for dtype, tolerance in TOLERANCE.items():
        for way, error in worst_errors(dtype).items():
            failed |= error > tolerance
            cases = len(LENGTHS) * len(SIZES)
            print(f"{way:<8} {dtype!s:<14} {cases} cases, worst relative error {error:.1e} (allowed {tolerance:.0e})")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
