"""The spoken answer against transformers' token2wav: the same solver and noise give the same waveform."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import Pair

from lowvram.events import AudioChunk
from lowvram.options import TALKER_SAMPLING, SamplingParams, SpeechParams

MESSAGES = [{"role": "user", "content": "tell me about the river and the green night"}]


@pytest.mark.parametrize("voice", ["Chelsie", "Ethan"])
def test_waveform_equals_the_references(pair: Pair, voice: str):
    sampling = replace(TALKER_SAMPLING, max_tokens=70, seed=3)
    speech = SpeechParams(voice=voice, sampling=sampling, solver="rk4", steps=4, seed=5, chunk_s=0.48)
    events = list(
        pair.omni.generate(MESSAGES, sampling=SamplingParams(max_tokens=8, temperature=1.0, seed=1), speech=speech)
    )
    ours = np.concatenate([event.samples for event in events if isinstance(event, AudioChunk)])

    stored = pair.reference.speaker_map[voice]
    torch.manual_seed(5)
    with torch.no_grad():
        theirs = pair.reference.token2wav(
            torch.tensor([events[-1].codec_ids]),
            conditioning=stored["cond"].float(),
            reference_mel=stored["ref_mel"].float(),
            num_steps=4,
        ).numpy()
    assert len(ours) == len(theirs) > 0
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)
