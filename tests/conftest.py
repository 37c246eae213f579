"""What most tests stand on: a tiny complete checkpoint, and a runtime opened on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantized Omni in the published layout."""
    from lowvram.demo import TINY, build_demo

    folder = tmp_path_factory.mktemp("demo")
    build_demo(folder, size=TINY)
    return folder


@pytest.fixture
def omni(demo: Path) -> Iterator:
    """A runtime on the tiny Omni, in float32 on the CPU, without a budget."""
    from lowvram.runtime import OmniRuntime

    with OmniRuntime.open(demo, device="cpu", dtype="float32") as runtime:
        yield runtime
