"""Write a checkpoint of a published model's true shape, with the demo's random weights in place of its own.

    python benchmarks/synthetic.py DIR [--shape 7b-awq|7b|3b] [--seed 0]

Names, shapes, dtypes, ids and sharding are as published, so that loading, memory and speed can be measured without the
model; what it says means nothing. Memory stays flat while up to 22 GB are written.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from lowvram.demo import DemoSize, build_demo

SIZE_7B = DemoSize(
    vocab_size=152064,
    first_special_id=151643,
    hidden=3584,
    intermediate=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    group_size=128,
    vision_hidden=1280,
    vision_intermediate=3420,
    vision_layers=32,
    vision_heads=16,
    full_attention_layers=(7, 15, 23, 31),
    audio_hidden=1280,
    audio_layers=32,
    audio_heads=20,
    codes=8192,
    talker_hidden=896,
    talker_intermediate=18944,
    talker_layers=24,
    talker_heads=12,
    talker_kv_heads=4,
    talker_head_dim=128,
    dit_hidden=1024,
    dit_layers=22,
    dit_heads=16,
    look_ahead_layers=(10,),
    look_backward_layers=(0, 20),
    speaker_channels=256,
    vocoder_channels=1536,
    shard_bytes=5_000_000_000,
)
"""Qwen2.5-Omni-7B."""

SIZE_3B = replace(
    SIZE_7B,
    vocab_size=151936,
    hidden=2048,
    intermediate=11008,
    layers=36,
    heads=16,
    kv_heads=2,
    talker_intermediate=4864,
    talker_heads=14,
    talker_kv_heads=2,
    talker_head_dim=64,
)
"""Qwen2.5-Omni-3B. Its talker is taken to have the shape of Qwen2.5-0.5B."""

SHAPES = {
    "7b-awq": (SIZE_7B, True, "float16"),
    "7b": (SIZE_7B, False, "bfloat16"),
    "3b": (SIZE_3B, False, "bfloat16"),
}


def peak_rss_bytes() -> int | None:
    """This process's largest resident set so far; None where the system does not keep it."""
    if sys.platform == "win32":
        return None
    import resource

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def main() -> None:
    """Parse the command line, write, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--shape", choices=SHAPES, default="7b-awq")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    size, quantized, dtype = SHAPES[arguments.shape]
    started = time.perf_counter()
    build_demo(arguments.folder, seed=arguments.seed, quantized=quantized, dtype=dtype, size=size)
    seconds = time.perf_counter() - started
    written_bytes = sum(path.stat().st_size for path in arguments.folder.glob("*.safetensors"))
    peak = peak_rss_bytes()
    print(
        f"{arguments.shape}: {written_bytes / 1e9:.2f} GB of weights in {seconds:.0f} s"
        + (f", peak RSS {peak / 2**30:.2f} GiB" if peak else "")
    )


if __name__ == "__main__":
    main()
