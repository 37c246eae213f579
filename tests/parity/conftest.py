"""Small checkpoints of the true structure, ours and the reference side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clips import write_clip
from reference import Pair, load_reference

from lowvram.demo import TINY, build_demo
from lowvram.runtime import OmniRuntime

CHECKPOINTS = [(seed, quantized) for seed in (0, 1, 2) for quantized in (True, False)]


@pytest.fixture(scope="session", params=CHECKPOINTS, ids=lambda p: f"seed{p[0]}-{'awq' if p[1] else '16bit'}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    seed, quantized = request.param
    folder = tmp_path_factory.mktemp("checkpoint")
    build_demo(folder, seed=seed, quantized=quantized, size=TINY)
    with OmniRuntime.open(folder, device="cpu", dtype="float32") as omni:
        yield Pair(omni, load_reference(folder))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A 3-second clip of 192 x 144 pixels at 4 frames a second, with or without sound."""
    folder = tmp_path_factory.mktemp("clips")

    def make(sound: bool) -> Path:
        path = folder / f"{'loud' if sound else 'silent'}.mkv"
        if not path.exists():
            write_clip(path, sound)
        return path

    return make
