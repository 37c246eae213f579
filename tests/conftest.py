"""What most tests stand on: a tiny complete checkpoint, and a runtime opened on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantized Omni in the published layout."""
    from lowvram.demo import TINY, build_demo

    folder = tmp_path_factory.mktemp("demo")
    build_demo(folder, size=TINY)
    return folder


@pytest.fixture(scope="session")
def deep_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with more layers than there are slots, so that some of them pass through when they are streamed."""
    from lowvram.demo import TINY, build_demo

    folder = tmp_path_factory.mktemp("deep-demo")
    build_demo(folder, size=replace(TINY, layers=5, talker_layers=3, audio_layers=4))
    return folder


@pytest.fixture
def omni(demo: Path) -> Iterator:
    """A runtime on the tiny Omni, in float32 on the CPU, without a budget."""
    from lowvram.runtime import OmniRuntime

    with OmniRuntime.open(demo, device="cpu", dtype="float32") as runtime:
        yield runtime


@pytest.fixture
def default_dtype() -> Iterator[Callable[[Any], None]]:
    """Set as an application would, torch's default dtype is float32 again after the test."""
    import torch

    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)
