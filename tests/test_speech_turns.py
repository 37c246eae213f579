"""What one spoken answer leaves to the next: a voice that is conditioned, and layers in some precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_damaged_weights import damaged
from test_turn import SPEECH, STAGES, answer, plan_of, turn_of

from lowvram.errors import CheckpointError
from lowvram.events import AudioChunk
from lowvram.listeners import SpeechFile
from lowvram.offload.plan import Placement
from lowvram.options import SamplingParams, SpeechParams
from lowvram.runtime import OmniRuntime

MESSAGES = [{"role": "user", "content": "hello"}]
SAMPLING = SamplingParams(max_tokens=4)
BRIEF = replace(SPEECH, sampling=replace(SPEECH.sampling, max_tokens=12), steps=2)


def samples_of(omni: OmniRuntime, speech: SpeechParams = BRIEF) -> np.ndarray:
    return answer(omni.generate(MESSAGES, sampling=SAMPLING, speech=speech))[1]


def phases_of(omni: OmniRuntime, speech: SpeechParams = BRIEF) -> list[str]:
    return [phase.name for phase in omni.plan(MESSAGES, sampling=SAMPLING, speech=speech).phases]


def test_a_voice_is_conditioned_once_and_then_known(omni: OmniRuntime):
    before = phases_of(omni)
    first = samples_of(omni)
    assert before == ["condition", *phases_of(omni)]
    (rest,) = (blocks[-1] for name, blocks in omni._machine.model.components.items() if name == "dit_conditioning")
    filled = []
    rest.fill = filled.append
    np.testing.assert_array_equal(samples_of(omni), first)
    assert filled == []


@pytest.mark.parametrize("change", [{"voice": "Ethan"}, {"steps": 3}, {"solver": "ab2"}, {"guidance": 0.3}])
def test_another_voice_or_solver_is_conditioned_anew(omni: OmniRuntime, change: dict[str, object]):
    samples_of(omni)
    assert phases_of(omni, replace(BRIEF, **change))[0] == "condition"
    assert phases_of(omni, replace(BRIEF, mode="balanced", dtype="float16", seed=1))[0] != "condition"


def test_precision_is_chosen_for_each_answer(omni: OmniRuntime):
    single = samples_of(omni)
    half = samples_of(omni, replace(BRIEF, dtype="bfloat16"))
    error = np.linalg.norm(half - single) / np.linalg.norm(single)
    assert 1e-5 < error < 0.1
    np.testing.assert_array_equal(samples_of(omni), single)


@pytest.mark.parametrize("mode", ["exact", "offload", "balanced"])
@pytest.mark.parametrize("kept", [0, 1])
def test_a_streamed_dit_says_the_same_whatever_stays(omni: OmniRuntime, mode: str, kept: int):
    """In half precision, too, where the layers' slots are half as large."""
    speech = replace(BRIEF, mode=mode, dtype="float16")
    plan = plan_of([STAGES])
    sounding = plan.phases[-1]
    streamed = replace(
        sounding,
        placements={**sounding.placements, "dit": Placement.STREAMED},
        kept_layers={"dit": kept},
    )
    said = []
    with omni.preprocessor.open(MESSAGES) as prompt:
        for last in (sounding, streamed):
            planned = replace(plan, phases=(*plan.phases[:-1], last))
            said.append(answer(turn_of(omni, prompt.inputs, planned, sampling=SAMPLING, speech=speech).run())[1])
    np.testing.assert_array_equal(*said)


def test_a_voice_too_large_to_keep_is_conditioned_for_each_answer(omni: OmniRuntime, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowvram.token2wav.conditioning.KEPT_BYTES", 1)
    first = samples_of(omni)
    assert omni._machine.conditionings.n_bytes == 0
    assert phases_of(omni)[0] == "condition"
    np.testing.assert_array_equal(samples_of(omni), first)


def test_a_code_whose_sound_is_no_number_ends_the_answer_and_leaves_a_valid_file(demo: Path, tmp_path: Path):
    speech = replace(BRIEF, sampling=replace(BRIEF.sampling, max_tokens=100), chunk_s=0.24)
    with OmniRuntime.open(demo, device="cpu", dtype="float32") as omni:
        *events, whole = omni.generate(MESSAGES, sampling=SAMPLING, speech=speech)
    late = next(code for code in whole.codec_ids[60:] if code not in whole.codec_ids[:60])
    table = "token2wav.code2wav_dit_model.text_embed.codec_embed.weight"
    file = SpeechFile(tmp_path / "reply.wav")
    model = damaged(demo, tmp_path / "model", table, np.nan, late)
    with OmniRuntime.open(model, device="cpu", dtype="float32") as omni:
        with pytest.raises(CheckpointError, match="speech breaks off"):
            for event in omni.generate(MESSAGES, sampling=SAMPLING, speech=speech):
                file.show(event)
        file.close()
        list(omni.generate(MESSAGES, sampling=SAMPLING, speech=None))  # it can still write
    healthy = np.concatenate([event.samples for event in events if isinstance(event, AudioChunk)])
    kept, _ = soundfile.read(tmp_path / "reply.wav", dtype="float32")
    assert 0 < len(kept) < len(healthy)
    np.testing.assert_allclose(kept, healthy[: len(kept)], atol=1e-4)
