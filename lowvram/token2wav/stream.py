"""The speaking stage: codec tokens in, pieces of sound out, while the talker is still at it.

Exact: the pieces joined are the sound of the whole utterance decoded at once, and the memory held does not depend on
its length. How the DiT and the vocoder do it is in `dit` and `vocoder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..options import SpeechParams
from .dit import WavefrontDiT
from .ode import solver_stages, time_grid
from .vocoder import StreamingVocoder
from .windows import MEL_FRAMES_PER_CODE, chunk_codes

SILENCE = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Speaker:
    """A voice as the checkpoint's `spk_dict.pt` holds it: `cond` [1, 192] (an x-vector) and `ref_mel` [1, T, 80]
    (10 ms frames of the speaker's log-mel), float32 on the host."""

    cond: Tensor
    ref_mel: Tensor


def decode_speech(
    codes: Iterable[int], dit: nn.Module, vocoder: nn.Module, speaker: Speaker, params: SpeechParams, *, seed: int
) -> Iterator[np.ndarray]:
    """Sound of `codes`, at 24 kHz, in float32 pieces [S]: exactly 480 samples per code in all, none for no codes.

    A piece follows every code drawn, so that a caller can attend to other things in between; most are empty. Decoding
    happens every `params.chunk_s` of codes, and its piece is what has become final. `dit` and `vocoder` are the
    reference's modules with their weights in place, in eval mode. `seed` fixes the noise, and with it the sound,
    whatever the chunks. Closing the generator lets go of all state.

    Raises `CheckpointError` for a voice that was made for another DiT.
    """
    _check_voice(speaker, dit)
    stages = solver_stages(params.solver, time_grid(params.steps))
    mel = WavefrontDiT(dit, speaker.cond, speaker.ref_mel, stages, guidance=params.guidance, seed=seed)
    sound = StreamingVocoder(vocoder)
    chunk: list[int] = []
    per_chunk = chunk_codes(params.chunk_s)
    for code in codes:
        chunk.append(code)
        if len(chunk) < per_chunk:
            yield SILENCE
        else:
            yield _vocode(sound, mel.push(chunk), last=False)
            chunk = []
    # What is left is a wavefront's worth of codes, vocoded a chunk at a time to keep memory flat and sound coming.
    rest = torch.cat((mel.push(chunk), mel.finish()), -1)
    *frames, final = rest.split(per_chunk * MEL_FRAMES_PER_CODE, -1)
    for some in frames:
        yield _vocode(sound, some, last=False)
    yield _vocode(sound, final, last=True)


def _vocode(sound: StreamingVocoder, mel: Tensor, last: bool) -> np.ndarray:
    """Samples that became final, on the host."""
    return sound.push(mel, last).float().cpu().numpy()


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
