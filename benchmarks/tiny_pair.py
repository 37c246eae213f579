"""A tiny checkpoint in 16 bit, and the same weights rounded to AWQ's 4 bits: two models whose distance is known to be
small and not zero, for trying out what compares them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from lowvram.demo import TINY, DemoSize, build_demo
from lowvram.quant.packing import pack_awq, stored_layout


def build_pair(folder: Path, *, seed: int = 0, size: DemoSize = TINY) -> tuple[Path, Path]:
    """Write both below `folder`; returns the 16-bit one and the 4-bit one, rounded to nearest."""
    whole, rounded = folder / "16-bit", folder / "4-bit"
    build_demo(whole, seed=seed, size=size, quantized=False)
    build_demo(rounded, seed=seed, size=size, quantized=True)
    for path in rounded.glob("model*.safetensors*"):
        path.unlink()
    save_file(dict(_rounded(whole, size.group_size)), rounded / "model.safetensors")
    return whole, rounded


def _rounded(folder: Path, group_size: int) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.startswith("thinker.model.layers.") and name.endswith("_proj.weight"):
                out_features, in_features = tensor.shape
                base, leaves = name.removesuffix("weight"), stored_layout(in_features, out_features, group_size)
                yield from zip((base + leaf for leaf in leaves), pack_awq(tensor, group_size), strict=True)
            else:
                yield name, tensor
