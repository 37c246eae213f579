"""What the reference's own way of running 7B-AWQ must hold, traced, beside the peaks that its authors published.

    python benchmarks/reference_memory.py [--json] [-o results/reference-memory.json]

transformers' own modules run on tensors without data (torch's `meta` device): the vision tower on the whole clip at
once, then the thinker on the whole prompt at once, with every layer's hidden states and every position's logits, as
its `generate` asks for them when it is to speak. The published low-VRAM mode has one module on the card at a time, so
the larger of the two peaks is the turn's. Nothing here is measured on a card.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import card_lines, make_card, write_result
from synthetic import SIZE_7B
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniVisionEncoder,
)
from transformers.utils import logging
from transformers.vision_utils import get_vision_position_ids

from lowvram import attention
from lowvram.demo.config import omni_config
from lowvram.offload.meter import LiveBytes
from lowvram.quant.linear import AWQLinear
from lowvram.quant.reference import ReferenceBackend

PUBLISHED = {15: 11.77, 30: 17.84, 60: 30.31}
"""Seconds of video -> peak in "GB", AWQ row of the table in Qwen2.5-Omni's README. They are GiB: see `compare`."""

FRAME = (48, 64)
TOKENS_PER_FRAME_PAIR, SOUND_TOKENS_PER_S, TEXT_TOKENS = 768, 25, 60
DTYPE = torch.float16
UNMASKED = "reference-memory"
"""Stands for flash attention 2, with which the table was made: no mask, no scores in memory."""


def prompt_tokens(seconds: int) -> int:
    """A video at 2 frames a second and the most tokens a frame may have, with its sound and a short question."""
    return seconds * (TOKENS_PER_FRAME_PAIR + SOUND_TOKENS_PER_S) + TEXT_TOKENS


def trace_vision(config: Any, seconds: int) -> int:
    """Peak bytes of the vision tower on the whole clip, its weights included."""
    with torch.device("meta"):
        tower: Any = Qwen2_5OmniVisionEncoder(config)
        tower.to(DTYPE).eval()
        pixels = torch.empty(seconds * FRAME[0] * FRAME[1], 3 * 2 * 14 * 14, dtype=DTYPE)
    grid = torch.tensor([[seconds, *FRAME]], device="cpu")
    positions = get_vision_position_ids(grid, config.spatial_merge_size).to("meta")  # the rest may stay on the host
    ledger = _ledger(tower.parameters(), [pixels, positions])
    with torch.inference_mode(), ledger:
        tower(pixels, grid_thw=grid, position_ids=positions)
    return ledger.peak_bytes


def trace_thinker(config: Any, tokens: int) -> int:
    """Peak bytes of the thinker on the whole prompt: 4-bit layers, and 16-bit embeddings and head."""
    with torch.device("meta"):
        thinker: Any = Qwen2_5OmniThinkerForConditionalGeneration(config)
        thinker.to(DTYPE).eval()
        layers_and_norm = thinker.get_decoder()
        _quantize(layers_and_norm.layers)
        embeds = torch.empty(1, tokens, config.text_config.hidden_size, dtype=DTYPE)
        positions = torch.zeros(3, 1, tokens, dtype=torch.long)
    ledger = _ledger([*layers_and_norm.parameters(), *thinker.lm_head.parameters()], [embeds])
    with torch.inference_mode(), ledger:
        thinker(inputs_embeds=embeds, position_ids=positions, use_cache=True, output_hidden_states=True)
    return ledger.peak_bytes


def compare() -> list[dict[str, Any]]:
    """A row per published clip: tokens, traced peaks by module, and the published figure read as GiB and as GB.

    Which of the two the table means is not said there. Read as GiB, all three figures agree with the trace; read as
    GB, none does.
    """
    config = thinker_config()
    rows = []
    for seconds, published in PUBLISHED.items():
        tokens = prompt_tokens(seconds)
        peaks = {"vision": trace_vision(config.vision_config, seconds), "thinker": trace_thinker(config, tokens)}
        peak_bytes = max(peaks.values())
        rows.append(
            {
                "seconds": seconds,
                "prompt_tokens": tokens,
                "traced_bytes": peaks,
                "published": published,
                "traced_over_published_as_gib": peak_bytes / (published * 2**30),
                "traced_over_published_as_gb": peak_bytes / (published * 10**9),
            }
        )
    return rows


def table(rows: Iterable[dict[str, Any]]) -> str:
    """For people."""
    lines = ["clip   tokens   vision GiB  thinker GiB   published  traced/published as GiB, as GB"]
    for row in rows:
        vision, thinker = (row["traced_bytes"][module] / 2**30 for module in ("vision", "thinker"))
        as_gib, as_gb = row["traced_over_published_as_gib"], row["traced_over_published_as_gb"]
        lines.append(
            f"{row['seconds']:3d} s {row['prompt_tokens']:8,} {vision:12.2f} {thinker:12.2f} {row['published']:11.2f}"
            f" {as_gib:18.3f} {as_gb:12.3f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace, print, and keep the result if asked; returns the exit code."""
    parser = argparse.ArgumentParser(description="The reference's peak memory, traced, beside what was published.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file, too")
    chosen = parser.parse_args(arguments)
    logging.set_verbosity_error()
    card = make_card("none: traced on tensors without data", model="Qwen2.5-Omni-7B-AWQ, its published shape")
    result: dict[str, Any] = {"card": card, "rows": compare()}
    if chosen.output:
        write_result(chosen.output, result)
    print(json.dumps(result) if chosen.json else "\n".join([*card_lines(card), "", table(result["rows"])]))
    return 0


def thinker_config() -> Any:
    """The published thinker's config, its attention as memory-bounded as flash attention 2."""
    AttentionInterface.register(UNMASKED, _flash)
    AttentionMaskInterface.register(UNMASKED, lambda *_, **__: None)
    published = omni_config(SIZE_7B, user_id=872, quantized=True, dtype="float16")["thinker_config"]
    config: Any = Qwen2_5OmniThinkerConfig.from_dict(published)
    for part in (config, config.text_config, config.vision_config, config.audio_config):
        part._attn_implementation = UNMASKED
    return config


def _flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: None, scaling: float | None = None, **__: object
) -> tuple[Tensor, None]:
    """The library's calling convention: heads second in, positions second out, no weights returned."""
    out = attention.attend(query, key, value, causal=bool(getattr(module, "is_causal", False)), scale=scaling)
    return out.transpose(1, 2), None


def _quantize(layers: nn.Module) -> None:
    """4-bit linears of AWQ's layout; their products dequantize a slice at a time."""
    for path, linear in list(layers.named_modules()):
        if isinstance(linear, nn.Linear):
            shape = linear.in_features, linear.out_features
            fitted = AWQLinear(
                *shape, bias=linear.bias is not None, group_size=128, backend=ReferenceBackend(), dtype=DTYPE
            )
            layers.set_submodule(path, fitted)


def _ledger(weights: Iterable[Tensor], inputs: Iterable[Tensor]) -> LiveBytes:
    """A ledger that counts what is there before the run."""
    ledger = LiveBytes("meta")
    ledger.track(*weights, *inputs)
    return ledger


if __name__ == "__main__":
    sys.exit(main())
