"""AutoAWQ's side of `awq_checkpoints.py`, run by its own Python: reads a checkpoint -> logits, and writes it again.

    python autoawq_model.py CHECKPOINT IDS.json LOGITS.pt COPY

It has no CPU path without Intel's extension, so it is told that there is a card, and no Triton, which comes with torch
for CUDA; what then computes on the CPU is its plain path, in float16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from awq import AutoAWQForCausalLM
from awq.modules.linear import gemm


def main(checkpoint: str, ids: str, logits: str, copy: str) -> None:
    gemm.TRITON_AVAILABLE = False
    with patch("awq.models.base.get_best_device", lambda: "cuda:0"):
        loaded = AutoAWQForCausalLM.from_quantized(
            checkpoint, fuse_layers=False, device_map={"": "cpu"}, torch_dtype=torch.float16
        )
    thinker = loaded.model.thinker
    linears = [module for layer in thinker.model.layers for module in layer.modules() if hasattr(module, "qweight")]
    assert linears and all(isinstance(module, gemm.WQLinear_GEMM) for module in linears)
    with torch.inference_mode():
        found = thinker(input_ids=torch.tensor([json.loads(Path(ids).read_text())])).logits[0]
    torch.save(found.float(), logits)
    loaded.save_quantized(copy)


if __name__ == "__main__":
    main(*sys.argv[1:])
