"""Whole checkpoints between AutoAWQ and this project: it reads ours and thinks the same, and we read what it writes.

    python benchmarks/awq_checkpoints.py --their-python autoawq/bin/python [CHECKPOINT]

Without a checkpoint (a folder), a tiny one is rounded to 4 bits on the spot. AutoAWQ 0.2.9 reads this model with
transformers up to 5.20, so it lives in an environment of its own:

    python -m venv autoawq
    autoawq/bin/pip install "torch<2.14" "transformers==5.20.*" accelerate datasets zstandard setuptools wheel
    autoawq/bin/pip install --no-deps --no-build-isolation autoawq==0.2.9

Needs no GPU. The exit code is 1 where logits differ by more than float16 explains.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
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

HERE = Path(__file__).parent
WORDS = TEXTS[0]

SAME_LOGITS, SAME_KL_NATS = 0.01, 1e-4
"""Relative, in the Euclidean norm, and the mean: theirs are made in float16, ours in float32."""

SMALL_FILES = ("*.json", "*.txt", "spk_dict.pt")


def compare(checkpoint: Path, their_python: str, folder: Path) -> bool:
    """Print how far the two are apart on a checkpoint; whether they agree. `folder` is for what lies between them."""
    ours = our_logits(checkpoint)
    theirs = torch.load(_ask_them(checkpoint, their_python, folder), weights_only=True)
    error = _relative(theirs, ours)
    apart = divergence(ours, theirs).summary()
    print(
        f"AutoAWQ reads it: logits differ by {error:.1e}, KL {apart['kl_mean_nats']:.1e} nats, same top"
        f" {apart['top1_agreement']:.1%} of {apart['positions']}"
    )
    for pattern in SMALL_FILES:  # it writes weights and configs; a tokenizer and voices are not its business
        for path in checkpoint.glob(pattern):
            if not (folder / "copy" / path.name).exists() and "index" not in path.name:
                shutil.copy(path, folder / "copy")
    copied = _relative(our_logits(folder / "copy"), ours)
    print(f"we read what it wrote, all but packed words in float16: logits differ by {copied:.1e}")
    return max(error, copied) <= SAME_LOGITS and apart["kl_mean_nats"] <= SAME_KL_NATS


def our_logits(checkpoint: Path) -> Tensor:
    """Logits [n, V] float32 of the words, computed in float32 on the CPU."""
    with OmniRuntime.open(checkpoint, device="cpu", dtype="float32") as omni:
        hidden = read_words(omni, WORDS)
        with torch.inference_mode(), both_heads(omni, omni) as (head, _):
            return head(hidden)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whole checkpoints between AutoAWQ and this project.")
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a 4-bit checkpoint's folder (default: a tiny one)")
    parser.add_argument("--their-python", required=True, help="the Python of an environment with AutoAWQ")
    chosen = parser.parse_args(arguments)
    logging.set_verbosity_error()
    with TemporaryDirectory() as folder:
        try:
            checkpoint = chosen.checkpoint or build_pair(Path(folder) / "made")[1]
            agree = compare(checkpoint, chosen.their_python, Path(folder))
        except LowVRAMError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    return 0 if agree else 1


def _relative(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


def _ask_them(checkpoint: Path, their_python: str, folder: Path) -> Path:
    """The file with AutoAWQ's logits of the same ids; its copy of the checkpoint lies beside."""
    with OmniRuntime.open(checkpoint, device="cpu") as omni:
        (folder / "ids.json").write_text(json.dumps(omni.preprocessor.tokenize(WORDS)))
    logits, copy = folder / "logits.pt", folder / "copy"
    command = [their_python, str(HERE / "autoawq_model.py"), *map(str, (checkpoint, folder / "ids.json", logits, copy))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LowVRAMError(
            f"AutoAWQ's Python ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}",
            hint="the environment is described at the top of this script",
        )
    return logits


if __name__ == "__main__":
    sys.exit(main())
