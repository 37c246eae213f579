"""Tiny checkpoints in 16 bit, and what quantizing one makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from quantized_demo import OPTIONS, Finished

from lowvram.device import open_device
from lowvram.quantize import quantize_checkpoint


@pytest.fixture(scope="session")
def speaking_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lowvram.demo import TINY, build_demo

    folder = tmp_path_factory.mktemp("demo-16-bit")
    build_demo(folder, size=TINY, quantized=False, dtype="bfloat16")
    return folder


@pytest.fixture(scope="session")
def source(speaking_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but its config says that it is silent, so that it opens in a fraction of the time."""
    folder = Path(shutil.copytree(speaking_source, tmp_path_factory.mktemp("silent") / "demo-16-bit"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"enable_audio_output": False}))
    return folder


@pytest.fixture(scope="session")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("quantized") / "new"
    *_, report = quantize_checkpoint(source, folder, OPTIONS, device=open_device("cpu"))
    return Finished(folder, report)
