"""What the DiT hears besides codes: a voice and the solver's times, worked out once and kept for every utterance.

Time, speaker and modulation layers see neither codes nor frames. So 575 MB of their weights (7B, float32) come down
to 4.9 MB of results for 9 evaluations, and are not needed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import float32_by_default
from ..errors import CheckpointError
from ..flow import Attempt, at_once
from ..options import Solver, SpeechParams
from .ode import Stage, solver_stages, time_grid

KEPT_BYTES = 20 * 2**20
"""Of conditionings on the host, for later turns: four of a 7B's 9 evaluations, or one of the reference's 36. An
application has few voices, and most use one. The plan's host side counts so much (`offload/ram.py`)."""

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

    def to(self, device: torch.device) -> Conditioning:
        """The same on another device."""
        return replace(
            self,
            speaker_vectors=self.speaker_vectors.to(device),
            x_vectors=self.x_vectors.to(device),
            modulations=self.modulations.to(device),
            out_modulations=self.out_modulations.to(device),
        )


@dataclass(frozen=True)
class Setting:
    """All that a `Conditioning` depends on, for one checkpoint."""

    voice: str
    solver: Solver
    steps: int
    guidance: float

    @classmethod
    def of(cls, voice: str, params: SpeechParams) -> Setting:
        return cls(voice, params.solver, params.steps, params.guidance)


class Conditionings:
    """The latest that were made, on the host, by their setting: no more than `KEPT_BYTES` in all, but for the one that
    a turn has just made, which stays whatever its size until the turn is over (`settle`)."""

    def __init__(self) -> None:
        self._kept: dict[Setting, Conditioning] = {}

    def __contains__(self, setting: Setting) -> bool:
        return setting in self._kept

    def __getitem__(self, setting: Setting) -> Conditioning:
        return self._kept[setting]

    @property
    def n_bytes(self) -> int:
        return sum(made.n_bytes for made in self._kept.values())

    def keep(self, setting: Setting, made: Conditioning) -> None:
        """Add the one that a turn has made. The oldest go until all fit, or only this one is left."""
        self._kept[setting] = made
        self._drop_oldest(down_to=1)

    def settle(self) -> None:
        """The turn is over: one too large to keep goes, too."""
        self._drop_oldest(down_to=0)

    def _drop_oldest(self, down_to: int) -> None:
        while len(self._kept) > down_to and self.n_bytes > KEPT_BYTES:
            del self._kept[next(iter(self._kept))]


def condition(
    dit: AbstractContextManager[nn.Module],
    speaker: Speaker,
    params: SpeechParams,
    *,
    attempt: Attempt = at_once,
) -> Conditioning:
    """What `params` and a voice condition the DiT with, on the host, to decode any number of utterances.

    `dit` brings the weights that `prepare` reads. Raises `CheckpointError` for a voice that was made for another DiT.
    """
    stages = solver_stages(params.solver, time_grid(params.steps))

    def step() -> Conditioning:
        with dit as module:
            _check_voice(speaker, module)
            return prepare(module, speaker, stages, guidance=params.guidance).to(torch.device("cpu"))

    return attempt(step)


@torch.no_grad()
def prepare(dit: nn.Module, speaker: Speaker, stages: Sequence[Stage], *, guidance: float) -> Conditioning:
    """Condition `Qwen2_5OmniToken2WavDiTModel` on a voice and a solver.

    Of its weights only `time_embed`, `input_embed.spk_encoder`, `norm_out` and each decoder layer's `attn_norm` are
    read; their dtype is the stream's: float32, or float64 to test.
    """
    assert not dit.training, "dropout would be heard: call eval() on the DiT"
    reference: Any = dit
    like = reference.norm_out.linear.weight
    times = torch.tensor([stage.time for stage in stages], dtype=like.dtype, device=like.device)
    embedding = F.silu(reference.time_embed(times))
    modulations = [layer.attn_norm.linear(embedding).unflatten(-1, (6, -1)) for layer in reference.transformer_blocks]
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
    with float32_by_default():
        return torch.cat([encode(heard) for heard in (voice, torch.zeros_like(voice))[: 1 + guided]])


def _check_voice(speaker: Speaker, dit: nn.Module) -> None:
    config: Any = dit.config
    cond, ref_mel = tuple(speaker.cond.shape), tuple(speaker.ref_mel.shape)
    frames = ref_mel[1] if len(ref_mel) == 3 else 0
    if frames < 1 or cond != (1, config.enc_emb_dim) or ref_mel != (1, frames, config.mel_dim):
        raise CheckpointError(
            f"the voice has cond {list(cond)} and ref_mel {list(ref_mel)}, but this model's voices have"
            f" [1, {config.enc_emb_dim}] and [1, T, {config.mel_dim}]",
            hint="take spk_dict.pt from the same checkpoint as the weights",
        )
