"""Linears that gptqmodel packs, read by us: both formats of GPTQ, symmetric and not -> whether the weights are equal.

    python benchmarks/gptq_interop.py

Needs no GPU, but beside this project `pip install gptqmodel` (tried: 7.6 and 7.7). The exit code is 1 where one bit of
a weight differs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from gptqmodel import QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from torch import Tensor, nn

from lowvram.quant.formats import FORMATS
from lowvram.quant.packing import unpack_awq
from lowvram.quant.scheme import Packing

INPUTS, OUTPUTS, GROUP_SIZE = 256, 96, 64


def packed(symmetric: bool) -> Any:
    """A linear of random weights as gptqmodel packs it, in its newer format."""
    torch.manual_seed(0)
    linear = TorchLinear(
        bits=4,
        group_size=GROUP_SIZE,
        sym=symmetric,
        desc_act=False,
        in_features=INPUTS,
        out_features=OUTPUTS,
        bias=False,
        register_buffers=True,
    )
    groups = INPUTS // GROUP_SIZE
    scales = (torch.rand(OUTPUTS, groups) + 0.1).half().float()
    zeros = torch.full_like(scales, 8) if symmetric else torch.randint(1, 16, (OUTPUTS, groups)).float()
    group_of = torch.arange(INPUTS) // GROUP_SIZE
    levels = torch.randint(16, (OUTPUTS, INPUTS))
    source = nn.Linear(INPUTS, OUTPUTS, bias=False)
    source.weight.data = (levels - zeros[:, group_of]) * scales[:, group_of]
    linear.pack_original(source, scales, zeros, group_of.int())
    linear.post_init()
    return linear


def read(linear: Any, packing: Packing) -> Tensor:
    """Our weights [K, N] of its tensors."""
    tensors = linear.qweight, linear.qzeros, linear.scales.half(), linear.g_idx
    return unpack_awq(*FORMATS[packing].to_awq(*tensors, group_size=GROUP_SIZE), GROUP_SIZE, torch.float16)


def main() -> None:
    agree = True
    for symmetric in (True, False):
        linear = packed(symmetric)
        theirs = linear.dequantize_weight().T.half()
        found: dict[Packing, Tensor] = {"gptq_v2": read(linear, "gptq_v2")}
        convert_gptq_v2_to_v1_format_module(linear, QuantizeConfig(bits=4, group_size=GROUP_SIZE, sym=symmetric))
        found["gptq"] = read(linear, "gptq")
        for packing, ours in found.items():
            same = torch.equal(ours, theirs)
            agree &= same
            kind = "symmetric" if symmetric else "asymmetric"
            print(f"{packing:<8} {kind:<11} {'the same weights' if same else 'OTHER weights'}")
    sys.exit(not agree)


if __name__ == "__main__":
    main()
