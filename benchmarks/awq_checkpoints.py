"""Whole checkpoints beside other readers of AWQ: they read ours and think the same, and we read what AutoAWQ writes.

    python benchmarks/awq_checkpoints.py [--autoawq PYTHON] [--gptqmodel PYTHON] [CHECKPOINT]

Without a checkpoint (a folder), a tiny one is rounded to 4 bits on the spot. Each of the others lives in an environment
of its own, whose Python is named: AutoAWQ 0.2.9 reads this model with transformers up to 5.20,

    python -m venv autoawq
    autoawq/bin/pip install "torch<2.14" "transformers==5.20.*" accelerate datasets zstandard setuptools wheel
    autoawq/bin/pip install --no-deps --no-build-isolation autoawq==0.2.9

and transformers itself by gptqmodel, with what that imports (`gptqmodel/bin/pip install transformers gptqmodel`). They
take for packed whatever the checkpoint's `modules_to_not_convert` does not spare: the one to give to gptqmodel is one
that `lowvram quantize` wrote, and the tiny one says of itself what such a one would. Needs no GPU. The exit code is 1
where logits differ by more than float16 explains.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from agreement import divergence
from prompts import TEXTS
from quality import both_heads
from teacher_forcing import read_words
from tiny_pair import build_pair
from torch import Tensor
from transformers.utils import logging

from lowvram import LowVRAMError, OmniRuntime
from lowvram.quant.recipe import quantization_config

HERE = Path(__file__).parent
WORDS = TEXTS[0]

SAME_LOGITS, SAME_KL_NATS = 0.01, 1e-4
"""Relative, in the Euclidean norm, and the mean: theirs are made in float16, ours in float32."""

SMALL_FILES = ("*.json", "*.txt", "spk_dict.pt")


@dataclass(frozen=True)
class Reader:
    """Another program that reads checkpoints: its name, the Python it lives in, and our script that runs there."""

    name: str
    python: str
    script: str

    def logits(self, checkpoint: Path, folder: Path, *results: Path) -> Tensor:
        """Its logits [n, V] of the words; `results` are what else the script writes."""
        with OmniRuntime.open(checkpoint, device="cpu") as omni:
            (folder / "ids.json").write_text(json.dumps(omni.preprocessor.tokenize(WORDS)))
        logits = folder / "logits.pt"
        given = [checkpoint, folder / "ids.json", logits, *results]
        command = [self.python, str(HERE / self.script), *map(str, given)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise LowVRAMError(
                f"{self.name}'s Python ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}",
                hint="the environment is described at the top of this script",
            )
        return torch.load(logits, weights_only=True)


def beside_autoawq(checkpoint: Path, python: str, folder: Path) -> bool:
    """Print how far it and we are apart on a checkpoint, and on its copy of it; whether both agree."""
    copy, ours = folder / "copy", our_logits(checkpoint)
    reader = Reader("AutoAWQ", python, "autoawq_model.py")
    agree = _same(reader, reader.logits(checkpoint, folder, copy), ours)
    for pattern in SMALL_FILES:  # it writes weights and configs; a tokenizer and voices are not its business
        for path in checkpoint.glob(pattern):
            if not (copy / path.name).exists() and "index" not in path.name:
                shutil.copy(path, copy)
    copied = _relative(our_logits(copy), ours)
    print(f"we read what it wrote, all but packed words in float16: logits differ by {copied:.1e}")
    return agree and copied <= SAME_LOGITS


def beside_gptqmodel(checkpoint: Path, python: str, folder: Path) -> bool:
    """Print how far transformers by gptqmodel and we are apart on a checkpoint; whether they agree."""
    reader = Reader("transformers with gptqmodel", python, "gptqmodel_model.py")
    return _same(reader, reader.logits(checkpoint, folder), our_logits(checkpoint))


def _same(reader: Reader, theirs: Tensor, ours: Tensor) -> bool:
    error, apart = _relative(theirs, ours), divergence(ours, theirs).summary()
    print(
        f"{reader.name} reads it: logits differ by {error:.1e}, KL {apart['kl_mean_nats']:.1e} nats, same top"
        f" {apart['top1_agreement']:.1%} of {apart['positions']}"
    )
    return error <= SAME_LOGITS and apart["kl_mean_nats"] <= SAME_KL_NATS


def our_logits(checkpoint: Path) -> Tensor:
    """Logits [n, V] float32 of the words, computed in float32 on the CPU."""
    with OmniRuntime.open(checkpoint, device="cpu", dtype="float32") as omni:
        hidden = read_words(omni, WORDS)
        with torch.inference_mode(), both_heads(omni, omni) as (head, _):
            return head(hidden)


def tiny_checkpoint(folder: Path) -> Path:
    """A tiny 4-bit checkpoint below `folder`, described as `lowvram quantize` describes what it writes."""
    _, rounded = build_pair(folder)
    path = rounded / "config.json"
    config = json.loads(path.read_text())
    entry = quantization_config(config["quantization_config"]["group_size"])
    path.write_text(json.dumps(config | {"quantization_config": entry}))
    return rounded


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whole checkpoints beside other readers of AWQ.")
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a 4-bit checkpoint's folder (default: a tiny one)")
    parser.add_argument("--autoawq", metavar="PYTHON", help="the Python of an environment with AutoAWQ")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="that of one with transformers and gptqmodel")
    chosen = parser.parse_args(arguments)
    if not (chosen.autoawq or chosen.gptqmodel):
        parser.error("name at least one environment: --autoawq, --gptqmodel")
    logging.set_verbosity_error()
    with TemporaryDirectory() as folder:
        try:
            checkpoint = chosen.checkpoint or tiny_checkpoint(Path(folder) / "made")
            agree = [
                beside(checkpoint, python, Path(folder))
                for beside, python in ((beside_autoawq, chosen.autoawq), (beside_gptqmodel, chosen.gptqmodel))
                if python
            ]
        except LowVRAMError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    return 0 if all(agree) else 1


def _relative(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


if __name__ == "__main__":
    sys.exit(main())
