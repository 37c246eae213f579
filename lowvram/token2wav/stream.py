"""The speaking stage: codec tokens in, pieces of sound out, while the talker is still at it.

In the exact modes the pieces joined are the sound of the whole utterance decoded at once; in all modes the memory held
does not depend on its length, and between two steps no weight is held. How the DiT and the vocoder do it is in `dit`
and `vocoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..flow import Attempt, Weights, at_once
from ..options import SpeechParams
from .conditioning import Conditioning
from .dit import CachedDiT, StreamingDiT, SystolicDiT, WavefrontDiT
from .vocoder import StreamingVocoder
from .windows import MEL_FRAMES_PER_CODE, Chunks, arrivals_codes, chunk_codes

SILENCE = np.zeros(0, np.float32)

T = TypeVar("T")
Block = AbstractContextManager[nn.Module]


def decode_speech(
    codes: Iterable[int],
    dit: Block,
    bigvgan: Block,
    conditioning: Conditioning,
    params: SpeechParams,
    *,
    seed: int,
    layers: Weights | None = None,
    attempt: Attempt = at_once,
) -> Iterator[np.ndarray]:
    """Sound of `codes`, at 24 kHz, in float32 pieces [S]: exactly 480 samples per code in all, none for no codes.

    A piece follows every code drawn, so that a caller can attend to other things in between; most are empty. Decoding
    happens every `params.chunk_s` of codes, and its piece is what has become final. `dit` and `bigvgan` give the
    reference's modules in eval mode; they are entered for each step and left before anything is yielded. `layers`
    brings the DiT's decoder layers where they are blocks of their own; they compute in the precision they come in.
    `conditioning` was made for `params`; it may be on the host. `seed` fixes the noise, and with it the sound, whatever
    the chunks. Closing the generator lets go of all state.

    Raises CheckpointError where samples would be NaN or infinite; what came before stands.
    """
    mel = attempt(partial(_open, dit, partial(_open_dit, heard=conditioning, params=params, seed=seed, layers=layers)))
    sound = attempt(partial(_open, bigvgan, StreamingVocoder))
    solve, vocode = partial(_step, attempt, dit, mel), partial(_step, attempt, bigvgan, sound)
    arrivals = arrivals_codes(params.mode, params.chunk_s)
    chunk: list[int] = []
    wanted = next(arrivals)
    for code in codes:
        chunk.append(code)
        if len(chunk) < wanted:
            yield SILENCE
        else:
            frames = solve(partial(mel.push, chunk))
            yield _on_host(vocode(partial(sound.push, frames, last=False)))
            chunk, wanted = [], next(arrivals)
    # What is left may be a wavefront's worth of codes, vocoded a chunk at a time to keep memory flat and sound coming.
    rest = torch.cat((solve(partial(mel.push, chunk)), solve(mel.finish)), -1)
    *pieces, final = rest.split(chunk_codes(params.chunk_s) * MEL_FRAMES_PER_CODE, -1)
    for frames in pieces:
        yield _on_host(vocode(partial(sound.push, frames, last=False)))
    yield _on_host(vocode(partial(sound.push, final, last=True)))


def _open_dit(
    dit: nn.Module, heard: Conditioning, params: SpeechParams, *, seed: int, layers: Weights | None = None
) -> StreamingDiT:
    """One utterance through the DiT, the way `params.mode` names. The weights of its two ends are in place."""
    conditioning = heard.to(dit.get_parameter("proj_out.weight").device)
    match params.mode:
        case "exact":
            return WavefrontDiT(dit, conditioning, seed=seed, layers=layers)
        case "offload":
            return SystolicDiT(dit, conditioning, seed=seed, layers=layers)
        case "balanced" | "low-latency":
            chunks = Chunks.of(params.mode, params.chunk_s)
            return CachedDiT(dit, conditioning, seed=seed, chunks=chunks, layers=layers)


def _open(block: Block, make: Callable[[nn.Module], T]) -> T:
    with block as module:
        return make(module)


def _step(
    attempt: Attempt, block: Block, stream: StreamingDiT | StreamingVocoder, compute: Callable[[], Tensor]
) -> Tensor:
    """One step of `stream` with its weights in place; as if it had not begun, if it fails and is tried again."""

    def step() -> Tensor:
        with block:
            return compute()

    return attempt(step, partial(stream.restore, stream.snapshot()))


def _on_host(samples: Tensor) -> np.ndarray:
    """Samples [S] as a caller gets them. Whether they are numbers is asked here: sooner would be one more wait."""
    heard = samples.float().cpu().numpy()
    finite = np.isfinite(heard)
    if not finite.all():
        raise CheckpointError(
            f"speech breaks off: {np.count_nonzero(~finite):,} of its next {len(heard):,} samples are not numbers",
            tensor="token2wav.",
            hint="1 or more weights of token2wav are damaged: download the model again;"
            " or its numbers are beyond float16: try --speech-dtype bfloat16 or float32",
        )
    return heard
