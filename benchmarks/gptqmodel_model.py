"""transformers' and gptqmodel's side of `awq_checkpoints.py`, run by its own Python: reads a checkpoint -> logits.

    python gptqmodel_model.py CHECKPOINT IDS.json LOGITS.pt

Of gptqmodel's kernels the one in plain torch computes, which every machine has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AwqConfig, Qwen2_5OmniForConditionalGeneration


def main(checkpoint: str, ids: str, logits: str) -> None:
    backend: Any = "torch_awq"
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float16, quantization_config=AwqConfig(backend=backend), device_map="cpu"
    )
    packed = [name for name, module in model.named_modules() if hasattr(module, "qweight")]
    assert packed and all(name.startswith("thinker.model.") and ".layers." in name for name in packed), packed
    with torch.inference_mode():
        found = model.thinker(input_ids=torch.tensor([json.loads(Path(ids).read_text())])).logits[0]
    torch.save(found.float(), logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
