"""A small model that has learned something: loud channels and structure that random weights do not have."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity.reference import load_reference
from quantized_demo import OPTIONS
from safetensors.torch import load_file, save_file

from lowvram.checkpoint import open_checkpoint
from lowvram.device import open_device
from lowvram.preprocess import Preprocessor
from lowvram.quantize import QuantizeReport, quantize_checkpoint
from lowvram.quantize.samples import gather_runs

STEPS, BATCH, LENGTH = 60, 8, 48


@pytest.fixture(scope="module")
def trained(speaking_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny thinker after a few steps of learning to spell the built-in texts."""
    folder = Path(shutil.copytree(speaking_source, tmp_path_factory.mktemp("trained") / "model"))
    thinker = load_reference(folder).thinker
    opened = open_checkpoint(folder)
    (text,) = gather_runs(Preprocessor(folder, opened.config), (), seed=0)
    with text.inputs() as inputs:
        ids = inputs.input_ids
    learned = {**dict(thinker.get_decoder().named_parameters()), "lm_head": thinker.lm_head.weight}
    optimizer = torch.optim.AdamW(learned.values(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        logits = thinker(input_ids=batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 4, "it has learned nothing"
    published = {f"thinker.model.{name}": value for name, value in learned.items() if name != "lm_head"}
    published["thinker.lm_head.weight"] = learned["lm_head"]
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: published.get(name, old).detach().to(old.dtype) for name, old in tensors.items()}, path)
    return folder


def test_every_layer_of_a_trained_model_loses_less_than_by_rounding_to_nearest(trained: Path, tmp_path: Path):
    options = replace(OPTIONS, samples=128, sample_tokens=64)
    *_, report = quantize_checkpoint(trained, tmp_path / "new", options, device=open_device("cpu"))
    assert isinstance(report, QuantizeReport)
    assert report.held_out_tokens == 16 * 64
    assert all(layer.quantized < layer.rounded for layer in report.layers)
