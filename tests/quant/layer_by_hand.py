"""A small decoder layer with loud input channels, and AWQ's search for it in the plainest way: all tokens at once, no
chunks, no sums, nothing shared with the package but the rounding of a weight to what is stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniTextConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniDecoderLayer, Qwen2_5OmniRotaryEmbedding

from lowvram import attention
from lowvram.quant.layer import Chunk
from lowvram.quant.packing import pack_awq, unpack_awq
from lowvram.quant.storage import AWQStorage

HIDDEN, HEADS, GROUP_SIZE = 64, 4, 32
STORAGE = AWQStorage(GROUP_SIZE)
SAMPLES, LENGTH = 4, 24


def make_layer(kv_heads: int, seed: int = 0) -> tuple[nn.Module, Chunk]:
    """A random layer in float32 and rows for it; a few of its norms' channels are far louder than the rest."""
    torch.manual_seed(seed)
    attention.register()
    config = Qwen2_5OmniTextConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
        rope_scaling={"mrope_section": [2, 3, 3], "rope_type": "default"},
    )
    config._attn_implementation = attention.NAME
    layer = Qwen2_5OmniDecoderLayer(config, 0).eval().requires_grad_(False)
    for linear in (module for module in layer.modules() if isinstance(module, nn.Linear)):
        linear.weight.normal_(0, linear.in_features**-0.5)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.copy_(1 + 0.2 * torch.randn(HIDDEN))
        norm.weight[[3, 17, 40]] *= 20
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
        linear.weight.mul_(0.2)  # lest attention look at one position alone
    for values in layer.parameters():
        values.copy_(values.bfloat16())  # as a checkpoint has them
    hidden = torch.randn(SAMPLES, LENGTH, HIDDEN)
    positions = torch.arange(LENGTH).expand(3, SAMPLES, -1)
    return layer, Chunk(hidden, Qwen2_5OmniRotaryEmbedding(config)(hidden, positions))


def rounded(weight: Tensor) -> Tensor:
    """`weight` as it is once stored."""
    return unpack_awq(*pack_awq(weight, GROUP_SIZE), GROUP_SIZE, torch.float32)


def inputs_of(layer: nn.Module, chunk: Chunk) -> dict[str, Tensor]:
    """What flows into each linear, [tokens, K], by path."""
    inputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0].clone()}))
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    layer(chunk.hidden, position_embeddings=chunk.rotary)
    for handle in handles:
        handle.remove()
    return inputs


def search_by_hand(linears: list[nn.Linear], x: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """The scales of `linears`, which all read `x` [.., K]; `run` computes the output that judges them."""
    right, originals = run(), [linear.weight.clone() for linear in linears]
    x_mean = x.flatten(0, -2).abs().mean(0)
    together = torch.cat(originals).abs().unflatten(1, (-1, GROUP_SIZE))
    w_mean = (together / (together.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0)
    best, least = torch.ones_like(x_mean), float("inf")
    for point in range(20):
        ratio = point / 20
        scales = (x_mean**ratio / (w_mean ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        for linear, weight in zip(linears, originals, strict=True):
            linear.weight.copy_(rounded(weight * scales) / scales)
        loss = float((run() - right).double().pow(2).mean())
        if loss < least:
            best, least = scales, loss
    for linear, weight in zip(linears, originals, strict=True):
        linear.weight.copy_(weight)
    return best


def clip_by_hand(weight: Tensor, x: Tensor) -> Tensor:
    """The largest magnitudes [N, K/G] to leave, judged token by token on inputs `x` [tokens, K]."""
    groups, rows = weight.unflatten(1, (-1, GROUP_SIZE)), x.unflatten(1, (-1, GROUP_SIZE))
    right = torch.einsum("tgi,ngi->tng", rows, groups)
    own = groups.abs().amax(-1)
    best, least = own.clone(), torch.full_like(own, float("inf"))
    for step in range(10):
        largest = own * (1 - step / 20)
        narrowed = groups.clamp(-largest[..., None], largest[..., None]).flatten(1)
        outputs = torch.einsum("tgi,ngi->tng", rows, rounded(narrowed).unflatten(1, (-1, GROUP_SIZE)))
        error = (outputs - right).pow(2).mean(0)
        better = error < least
        best[better], least[better] = largest[better], error[better]
    return best
