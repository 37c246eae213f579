from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
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
    with pytest.raises(BudgetExceededError, match=r"1\.0 MiB were free when it was opened .*goes on where it stopped"):
        quantize(source, target, device)
    assert card.refusals and not card.live_bytes
    card.capacity_bytes = 2**30
    assert quantize(source, target, device) == quantize(source, tmp_path / "cpu", open_device("cpu"))


LAYER, HEAD = "quantizing layer 1 of 1", "quantizing lm_head"


def run_out(source: Path, target: Path, options: QuantizeOptions, card: Card, *, after: str) -> str:
    """Let the card be full from the first event of a stage on (or, without a stage, from the first event); what is told
    then."""
    device = Device(DEVICE, "a simulated card", card.capacity_bytes)
    with pytest.raises(BudgetExceededError) as caught:
        for event in quantize_checkpoint(source, target, options, device=device):
            if not after or getattr(event, "stage", "") == after:
                card.capacity_bytes = 0
    return str(caught.value)


@pytest.mark.parametrize(
    ("after", "options", "step", "instead"),
    [
        ("copy", replace(OPTIONS, also=("lm_head",)), HEAD, "with --device cpu"),
        ("copy", OPTIONS, LAYER, "with --device cpu"),
        ("copy", replace(OPTIONS, samples=2, sample_tokens=2049), LAYER, "with --sample-tokens 2048 or --device cpu"),
        ("quantize", OPTIONS, "comparing next words", "with --device cpu"),
    ],
)
def test_a_card_that_runs_out_is_told_with_the_step_and_with_what_takes_less(
    tmp_path: Path, card: Card, after: str, options: QuantizeOptions, step: str, instead: str
):
    told = run_out(silent_demo(tmp_path / "source", 1), tmp_path / "new", options, card, after=after)
    assert told.startswith(f"a simulated card ran out of memory while {step}; ")
    assert told.endswith(f"or name a new folder, {instead})")


def test_media_that_do_not_fit_a_card_may_be_given_smaller(tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")
    (tmp_path / "texts.jsonl").write_text('"a few words"')
    monkeypatch.setattr("lowvram.quantize.samples.BUILT_IN", tmp_path / "texts.jsonl")
    options = replace(OPTIONS, calibrate=(str(tmp_path / "picture.png"),), also=("lm_head",))
    told = run_out(silent_demo(tmp_path / "source", 1), tmp_path / "new", options, card, after="")
    assert "while encoding media; " in told
    assert "with smaller pictures and clips in --calibrate or --device cpu" in told
