"""AutoAWQ's own search, clipping, packing and linear beside ours, on small Qwen2 layers with a few loud input channels.

    python benchmarks/awq_interop.py

In float32 AutoAWQ judges weights by steps that it then stores in float16; ours are judged as they are stored. Near ties
fall differently for that alone, so it is also run with steps as stored, and held to that: the exit code is 1 where the
two differ then. Needs no GPU, but beside this project `pip install accelerate datasets` and
`pip install --no-deps --no-build-isolation autoawq==0.2.9`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from awq.modules.linear import gemm
from awq.quantize.quantizer import AwqQuantizer
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniTextConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniDecoderLayer, Qwen2_5OmniRotaryEmbedding

from lowvram import attention
from lowvram.quant.calibrate import search_clip
from lowvram.quant.layer import Chunk, LayerQuantizer, store_linear
from lowvram.quant.packing import fake_quantize, unpack_columns
from lowvram.quant.recipe import UNCLIPPED, ScaledGroup
from lowvram.quant.storage import AWQStorage

GROUP_SIZE = 32
STORAGE = AWQStorage(GROUP_SIZE)
HIDDEN, INTERMEDIATE, HEADS = 128, 256, 4
SAMPLES, SAMPLE_TOKENS = 6, 64
LOUD_CHANNELS = {3: 30.0, 17: 10.0, 90: 20.0}

SAME_SCALES, SAME_CLIPS, SAME_OUTPUT = 1e-6, 0.995, 1e-3
"""Largest relative difference of scales; least share of equal clips, whose errors may tie; largest of outputs, which
AutoAWQ computes in float16."""


@dataclass(frozen=True)
class Toy:
    """A layer and the rows that pass through it."""

    layer: nn.Module
    chunk: Chunk


def make_toy(kv_heads: int, seed: int) -> Toy:
    """A random layer in float32; with as many key heads as query heads, all four of its groups can be scaled."""
    torch.manual_seed(seed)
    attention.register()
    rotary: dict[str, Any] = {"rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default"}}
    config: Any = Qwen2_5OmniTextConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
        **rotary,
    )
    config._attn_implementation = attention.NAME
    layer = Qwen2_5OmniDecoderLayer(config, 0).eval().requires_grad_(False)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.copy_(1 + 0.2 * torch.randn(HIDDEN))
        for channel, gain in LOUD_CHANNELS.items():
            norm.weight[channel] *= gain
    hidden = torch.randn(SAMPLES, SAMPLE_TOKENS, HIDDEN)
    positions = torch.arange(SAMPLE_TOKENS).expand(3, SAMPLES, -1)
    return Toy(layer, Chunk(hidden, Qwen2_5OmniRotaryEmbedding(config)(hidden, positions)))


class StoredSteps(AwqQuantizer):
    """AutoAWQ's search, judging weights with steps in float16."""

    def pseudo_quantize_tensor(self, w: Tensor) -> tuple[Tensor, None, None]:
        return fake_quantize(w.reshape(-1, GROUP_SIZE), GROUP_SIZE).reshape(w.shape), None, None


def autoawq(kind: type) -> Any:
    """Its quantizer without the model loading around it."""
    quantizer: Any = object.__new__(kind)
    settings = {"w_bit": 4, "group_size": GROUP_SIZE, "zero_point": True, "duo_scaling": True}
    vars(quantizer).update(settings, max_chunk_memory=2**30, n_parallel_calib_samples=None)
    return quantizer


def their_scales(kind: type, toy: Toy, group: ScaledGroup, inputs: Tensor) -> Tensor:
    """What AutoAWQ's search finds for a group with such inputs.

    It restores weights from `state_dict()`, which on a CPU are the very weights that it has changed meanwhile; a hook
    hands it copies.
    """
    inspected = toy.layer.get_submodule(group.inspected)

    def copy(_module: nn.Module, state: dict[str, Tensor], *_: object) -> None:
        state.update({name: value.clone() for name, value in state.items()})

    handle = inspected.register_state_dict_post_hook(copy)
    layers = [toy.layer.get_submodule(path) for path in group.linears]
    kwargs = {"position_embeddings": toy.chunk.rotary} if group.inspected == "self_attn" else {}
    absorber = toy.layer.get_submodule(group.absorber)
    *_, scales = autoawq(kind)._search_best_scale(toy.layer, absorber, layers, inputs, inspected, kwargs)
    handle.remove()
    return scales


def compare(kv_heads: int, seed: int) -> bool:
    """Print how far the two differ on one toy; whether they agree."""
    toy = make_toy(kv_heads, seed)
    quantizer = LayerQuantizer(toy.layer, STORAGE, _dtypes(toy.layer))
    inputs = _linear_inputs(quantizer, toy)
    quantizer.weigh(toy.chunk)
    agree = True
    for group, scales in quantizer.best_scales.items():
        rows = inputs[group.linears[0]]
        as_is, as_stored = (
            float((scales / their_scales(kind, toy, group, rows) - 1).abs().max())
            for kind in (AwqQuantizer, StoredSteps)
        )
        agree &= as_stored <= SAME_SCALES
        print(f"  scales of {group.inspected:<18} differ by {as_is:.1e}, with steps as stored by {as_stored:.1e}")
    for group, statistics in quantizer.statistics.items():
        for path in (path for path in group.linears if path not in UNCLIPPED):
            weight = _linear(toy, path).weight
            ours = search_clip(weight, statistics.moments(), STORAGE)
            as_is, as_stored = (
                _share_of_same(ours, autoawq(kind)._compute_best_clip(weight, inputs[group.linears[0]]).squeeze(-1))
                for kind in (AwqQuantizer, StoredSteps)
            )
            agree &= as_stored >= SAME_CLIPS
            print(
                f"  clips of {path:<19} are the same in {as_is:.1%} of groups, with steps as stored in {as_stored:.1%}"
            )
    return agree & all(_same_packing(_linear(toy, path)) for path in ("mlp.down_proj", "self_attn.q_proj"))


def _linear(toy: Toy, path: str) -> nn.Linear:
    linear = toy.layer.get_submodule(path)
    assert isinstance(linear, nn.Linear), path
    return linear


def _share_of_same(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours / theirs - 1).abs() < SAME_SCALES).double().mean())


def _linear_inputs(quantizer: LayerQuantizer, toy: Toy) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0].detach()}))
        for path, module in toy.layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    quantizer.observe(toy.chunk)
    for handle in handles:
        handle.remove()
    return inputs


def _same_packing(linear: nn.Linear) -> bool:
    """Whether both write the same words for the same numbers, and compute alike from them."""
    weight = linear.weight.clone()
    ours = store_linear(weight, STORAGE)
    rounded = nn.Linear(linear.in_features, linear.out_features, bias=False).requires_grad_(False)
    rounded.weight.copy_(weight)
    zeros = unpack_columns(ours["qzeros"]).t().contiguous().float()
    theirs = gemm.WQLinear_GEMM.from_linear(rounded, 4, GROUP_SIZE, False, ours["scales"].float(), zeros)
    words = all(torch.equal(getattr(theirs, leaf), ours[leaf]) for leaf in ours)
    theirs.load_state_dict(ours)
    x = torch.randn(1, 16, linear.in_features).half()
    difference = float((theirs(x).float() - x.float() @ weight.t()).abs().max() / (x.float() @ weight.t()).abs().max())
    print(f"  packed words {'are the same' if words else 'DIFFER'}, outputs from them differ by {difference:.1e}")
    return words and difference <= SAME_OUTPUT


def _dtypes(layer: nn.Module) -> dict[str, torch.dtype]:
    return {name: torch.float32 for name, _ in layer.named_parameters() if not name.endswith("_proj.weight")}


@torch.no_grad()
def main() -> int:
    gemm.TRITON_AVAILABLE = False  # its kernel, taken where Triton is installed, has no CPU
    agree = True
    for kv_heads in (HEADS // 2, HEADS):
        for seed in range(3):
            print(f"{HEADS} heads, {kv_heads} key heads, seed {seed}")
            agree &= compare(kv_heads, seed)
    print("agree" if agree else "DIFFER")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
