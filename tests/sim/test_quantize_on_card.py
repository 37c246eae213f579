from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sim.device import DEVICE, Card

from lowvram.demo import TINY, build_demo
from lowvram.device import Device, open_device
from lowvram.errors import BudgetExceededError
from lowvram.quantize import QuantizeOptions, quantize_checkpoint

OPTIONS = QuantizeOptions(group_size=32, samples=4, sample_tokens=32)


def silent_demo(folder: Path, layers: int) -> Path:
    """A tiny 16-bit checkpoint whose config says that it does not speak, so that it opens in a fraction of the time."""
    build_demo(folder, size=replace(TINY, layers=layers), quantized=False, dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"enable_audio_output": False}))
    return folder


def quantize(source: Path, target: Path, device: Device) -> dict[str, bytes]:
    for _ in quantize_checkpoint(source, target, OPTIONS, device=device):
        pass
    return {path.name: path.read_bytes() for path in target.iterdir()}


def test_a_card_writes_what_the_cpu_writes_and_holds_one_layer_at_a_time(tmp_path: Path, card: Card):
    peaks = []
    for layers in (1, 2):
        source = silent_demo(tmp_path / f"{layers}", layers)
        card.peak_bytes = 0
        on_card = quantize(source, tmp_path / f"{layers}-card", Device(DEVICE, "a simulated card", card.capacity_bytes))
        peaks.append(card.peak_bytes)
        assert on_card == quantize(source, tmp_path / f"{layers}-cpu", open_device("cpu"))
    assert peaks[0] == peaks[1]
    assert card.live_bytes == 0


def test_a_card_that_runs_out_stops_a_run_that_can_go_on(tmp_path: Path, card: Card):
    source, target = silent_demo(tmp_path / "source", 2), tmp_path / "new"
    device = Device(DEVICE, "a simulated card", 2**20)
    card.at(300, lambda: setattr(card, "capacity_bytes", 2**16))
    with pytest.raises(BudgetExceededError, match=r"a simulated card ran out of memory, of which 1\.0 MiB were free"):
        quantize(source, target, device)
    assert card.refusals and not card.live_bytes
    card.capacity_bytes = 2**30
    assert quantize(source, target, device) == quantize(source, tmp_path / "cpu", open_device("cpu"))
