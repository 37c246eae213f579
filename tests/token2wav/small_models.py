"""Small token2wav models of the true structure, and the reference's whole decode to hold the stream against.

The library's initial weights (0.02) prove nothing: a block's influence on its neighbour is 1e-7. Here every layer
keeps its input's variance, and `coupling` makes the look-back and look-ahead layers weigh their neighbours heavily.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniToken2WavConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavModel, RungeKutta4ODESolver

from lowvram.options import Solver
from lowvram.token2wav.conditioning import Conditioning, Speaker, prepare
from lowvram.token2wav.dit import StreamingDiT
from lowvram.token2wav.ode import solver_stages

Velocity = Callable[[Tensor, Tensor], Tensor]

HIDDEN = 32
CODES = 8192
NEIGHBOURLY_LAYERS = (0, 2, 3)
COUPLING = 8.0

CONFIG = {
    "dit_config": {
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 5,
        "look_backward_layers": [0, 3],
        "look_ahead_layers": [2],
        "emb_dim": 16,
        "enc_dim": 16,
        "enc_channels": [16, 16, 16, 16, 48],
        "enc_attention_channels": 8,
        "enc_se_channels": 8,
    },
    "bigvgan_config": {
        "upsample_initial_channel": 64,
        "resblock_kernel_sizes": [3, 11],
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
    },
}


@cache
def small_token2wav(dtype: torch.dtype = torch.float64, coupling: float = 1.0) -> Qwen2_5OmniToken2WavModel:
    config = Qwen2_5OmniToken2WavConfig(**CONFIG)
    model = Qwen2_5OmniToken2WavModel._from_config(config, attn_implementation="sdpa").eval()
    _fill_dit(model.code2wav_dit_model, coupling)
    _fill_vocoder(model.code2wav_bigvgan_model)
    return model.to(dtype)


@torch.no_grad()
def _fill_dit(dit: nn.Module, coupling: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, weight in dit.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("codec_embed.weight"):
            weight.copy_(noise)
        elif weight.ndim >= 2:
            weight.copy_(noise / math.sqrt(weight[0].numel()))
        else:
            weight.copy_(noise * (0.3 if "norm" in name else 0.05))
    for index in NEIGHBOURLY_LAYERS:
        dit.transformer_blocks[index].attn.to_out[0].weight.mul_(coupling)


@torch.no_grad()
def _fill_vocoder(vocoder: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    strides = vocoder.config.upsample_rates
    for name, weight in vocoder.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.startswith("ups") and weight.ndim == 3:
            taps_per_output = weight.shape[2] / strides[int(name.split(".")[1])]
            weight.copy_(noise / math.sqrt(weight.shape[0] * taps_per_output))
        elif weight.ndim == 3:
            gain = 0.6 if name.startswith("conv_post") else 0.5 if "convs2" in name else 1.0
            weight.copy_(noise * gain / math.sqrt(weight[0].numel()))
        else:
            weight.copy_(noise * (0.3 if name.endswith(("alpha", "beta")) else 0.02))


@cache
def some_speaker(seed: int = 3) -> Speaker:
    generator = torch.Generator().manual_seed(seed)
    return Speaker(
        cond=torch.randn(1, 192, generator=generator),
        ref_mel=torch.randn(1, 30, 80, generator=generator) * 2 - 4,
    )


def some_codes(count: int, seed: int = 4) -> list[int]:
    return torch.randint(0, CODES, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def noise_of(seed: int, frames: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn([1, frames, 80])


@torch.no_grad()
def whole_decode(
    dit: nn.Module,
    codes: list[int],
    times: tuple[float, ...],
    *,
    solver: str = "euler",
    guidance: float = 0.5,
    seed: int = 7,
) -> Tensor:
    """The whole utterance by the reference's own forward: [1, 80, F]. RK4 is the reference's own solver."""
    dtype = dit.proj_out.weight.dtype
    noise = noise_of(seed, 2 * len(codes)).to(dtype)
    speaker = some_speaker()
    inputs = {
        "speaker_embedding": speaker.cond.to(dtype)[:, None].expand(-1, noise.shape[1], -1),
        "condition_vector": speaker.ref_mel.to(dtype),
        "quantized_code": torch.tensor([codes]),
    }

    def velocity(time: Tensor, x: Tensor) -> Tensor:
        if not guidance:
            return dit(hidden_states=x, time_step=time, apply_cfg=False, **inputs)
        spoken, null = dit(hidden_states=x, time_step=time, apply_cfg=True, **inputs).chunk(2)
        return spoken + (spoken - null) * guidance

    points = torch.tensor(times, dtype=dtype)
    if solver == "rk4":
        x = RungeKutta4ODESolver(function=velocity, initial_value=noise).integrate(points)[-1]
    else:
        x = (_euler if solver == "euler" else _adams_bashforth)(velocity, noise, points)
    return x.transpose(1, 2)


def _euler(velocity: Velocity, x: Tensor, points: Tensor) -> Tensor:
    for start, end in pairwise(points):
        x = x + velocity(start, x) * (end - start)
    return x


def _adams_bashforth(velocity: Velocity, x: Tensor, points: Tensor) -> Tensor:
    """The line through the last two slopes, integrated over the step."""
    slopes: list[Tensor] = []
    for index, (start, end) in enumerate(pairwise(points)):
        slopes.append(velocity(start, x))
        rise = (slopes[-1] - slopes[-2]) / (start - points[index - 1]) if index else torch.zeros_like(x)
        x = x + slopes[-1] * (end - start) + rise * (end - start) ** 2 / 2
    return x


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def small_dit(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The DiT whose blocks weigh their neighbours heavily."""
    return small_token2wav(dtype, COUPLING).code2wav_dit_model


def conditioning_of(
    dit: nn.Module,
    times: tuple[float, ...],
    *,
    solver: Solver = "euler",
    guidance: float = 0.5,
    speaker: Speaker | None = None,
) -> Conditioning:
    return prepare(dit, speaker or some_speaker(), solver_stages(solver, times), guidance=guidance)


def arrivals(codes: list[int], size: int | None) -> Iterator[list[int]]:
    """Codes in pieces of `size`, of random sizes from 0 to 40 for None."""
    sizes = random.Random(5)
    while codes:
        count = sizes.randint(0, 40) if size is None else size
        yield codes[:count]
        codes = codes[count:]


def streamed(stream: StreamingDiT, codes: list[int], size: int | None = None) -> Tensor:
    """All mel frames of the codes, which arrive in pieces."""
    return torch.cat([stream.push(piece) for piece in arrivals(codes, size)] + [stream.finish()], -1)
