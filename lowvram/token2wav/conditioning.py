"""What the DiT hears besides codes: a voice and the solver's times, worked out once for a whole utterance.

Time, speaker and modulation layers see neither codes nor frames. So 575 MB of their weights (7B, float32) come down
to 4.9 MB of results for 9 evaluations, and are not needed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow import Weights
from .layers import layer_blocks
from .ode import Stage

_UNGUIDED_BELOW = 1e-5
"""Guidance under which the reference leaves the null branch out."""


@dataclass(frozen=True)
class Speaker:
    """A voice as the checkpoint's `spk_dict.pt` holds it: `cond` [1, 192] (an x-vector) and `ref_mel` [1, T, 80]
    (10 ms frames of the speaker's log-mel), float32 on the host."""

    cond: Tensor
    ref_mel: Tensor


@dataclass(frozen=True)
class Conditioning:
    """A voice and a solver of K `stages` as a DiT of L layers hears them, on its device.

    The first axis of `speaker_vectors` [G, E] and `x_vectors` [G, X] are the branches: what is spoken and, when
    guided, the null branch. `modulations` [K, L, 6, H] are each layer's shift, scale and gate of its attention, then
    of its feed-forward; `out_modulations` [K, 2, H] scale and shift what leaves. Their dtype is the stream's.
    """

    stages: tuple[Stage, ...]
    guidance: float
    speaker_vectors: Tensor
    x_vectors: Tensor
    modulations: Tensor
    out_modulations: Tensor

    @property
    def n_bytes(self) -> int:
        """4.9 MB for a 7B's 9 evaluations."""
        held = (self.speaker_vectors, self.x_vectors, self.modulations, self.out_modulations)
        return sum(tensor.nbytes for tensor in held)


@torch.no_grad()
def prepare(
    dit: nn.Module, speaker: Speaker, stages: Sequence[Stage], *, guidance: float, layers: Weights | None = None
) -> Conditioning:
    """Condition `Qwen2_5OmniToken2WavDiTModel` on a voice and a solver.

    Of its weights only `time_embed`, `input_embed.spk_encoder`, `norm_out` and each decoder layer's `attn_norm` are
    read; their dtype is the stream's: float32, or float64 to test. `layers` brings the decoder layers where they are
    blocks of their own.
    """
    assert not dit.training, "dropout would be heard: call eval() on the DiT"
    reference: Any = dit
    like = reference.norm_out.linear.weight
    times = torch.tensor([stage.time for stage in stages], dtype=like.dtype, device=like.device)
    embedding = F.silu(reference.time_embed(times))
    modulations: list[Tensor] = []
    for block in layer_blocks(reference, layers):
        with block as layer:
            modulations.append(layer.get_submodule("attn_norm.linear")(embedding).unflatten(-1, (6, -1)))
    guided = guidance >= _UNGUIDED_BELOW
    return Conditioning(
        stages=tuple(stages),
        guidance=guidance,
        speaker_vectors=_with_silence(speaker.ref_mel.to(like), guided, reference.input_embed.spk_encoder),
        x_vectors=_with_silence(speaker.cond.to(like), guided, nn.Identity()),
        modulations=torch.stack(modulations, 1),
        out_modulations=reference.norm_out.linear(embedding).unflatten(-1, (2, -1)),
    )


def _with_silence(voice: Tensor, guided: bool, encode: nn.Module) -> Tensor:
    """What `encode` makes of a voice and, for the null branch, of zeros in its place: [G, ...]."""
    return torch.cat([encode(heard) for heard in (voice, torch.zeros_like(voice))[: 1 + guided]])
