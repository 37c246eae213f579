"""One answer under many plans: whatever shares the device, and however much is computed at once, it says the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowvram.events import AudioChunk, Event, Finished, Progress, TextDelta
from lowvram.flow import ModelInputs
from lowvram.offload.budget import MIB, Budget
from lowvram.offload.meter import NoMeter
from lowvram.offload.plan import Phase, Placement, Plan
from lowvram.offload.profile import DEVICE_ALLOCATOR
from lowvram.options import TALKER_SAMPLING, MediaParams, SamplingParams, SpeechParams
from lowvram.recall import Reading
from lowvram.room import Control
from lowvram.runtime import OmniRuntime
from lowvram.sampling import Sampler
from lowvram.turn import Request, Turn

STAGES = ("audio_tower", "visual", "thinker", "talker", "token2wav")
COMPONENTS = {
    "conditioning": ("dit_conditioning",),
    "audio_tower": ("audio_tower",),
    "visual": ("visual",),
    "thinker": ("thinker", "lm_head"),
    "talker": ("talker",),
    "token2wav": ("dit", "bigvgan"),
}
MEDIA = MediaParams(min_pixels=28 * 28, max_pixels=4 * 28 * 28)
SAMPLING = SamplingParams(max_tokens=10)
SPEECH = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=40), steps=4, seed=7, chunk_s=0.24)
SPEECH = replace(SPEECH, sampling=replace(SPEECH.sampling, seed=11))

MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)},
            {"type": "audio", "audio": np.sin(np.arange(40_000) / 20).astype(np.float32)},
            {"type": "video", "video": np.random.default_rng(1).integers(0, 256, (6, 60, 80, 3), dtype=np.uint8)},
            {"type": "text", "text": "compare the three"},
        ],
    }
]


def plan_of(cuts: Sequence[Sequence[str]], placement: Placement = Placement.PHASE, **chunks: int) -> Plan:
    """A plan with these stages in each phase, and before sound one for its voice; all components are placed alike."""
    before = [["conditioning"]] if any("token2wav" in stages for stages in cuts) else []
    phases = tuple(
        Phase(
            name="+".join(stages),
            stages=tuple(stages),
            placements={component: placement for stage in stages for component in COMPONENTS[stage]},
            weights_bytes=0,
            kv_bytes=0,
            activation_bytes=0,
            traffic_bytes=0,
        )
        for stages in [*before, *cuts]
    )
    sizes = {"prefill_chunk_tokens": 1024, "vision_chunk_patches": 4096, "audio_chunk_windows": 8} | chunks
    return Plan("cpu", None, phases, prompt_tokens=1, text_tokens=1, codes=1, **sizes)


def no_other_plan(*_: object) -> Plan:
    raise AssertionError("this turn was to follow its plan")


def turn_of(
    omni: OmniRuntime,
    inputs: ModelInputs,
    plan: Plan,
    *,
    sampling: SamplingParams = SAMPLING,
    speech: SpeechParams = SPEECH,
    control: Control | None = None,
) -> Turn:
    """A turn in Chelsie's voice under a given plan."""
    request = Request(Reading(inputs), plan, no_other_plan, sampling, speech, omni._voices["Chelsie"])
    return Turn(omni._machine, request, control or Control(Budget()), started_s=0.0)


def run(omni: OmniRuntime, plan: Plan, cancel_after: int | None = None) -> Iterator[Event]:
    """The events of one turn under a given plan; cancelled once that many events are out."""
    control = Control(Budget())
    if cancel_after == 0:
        control.cancel()
    with omni.preprocessor.open(MESSAGES, MEDIA) as prompt:
        for count, event in enumerate(turn_of(omni, prompt.inputs, plan, control=control).run(), start=1):
            if count == cancel_after:
                control.cancel()
            yield event


def answer(events: Iterator[Event]) -> tuple[Finished, np.ndarray]:
    events = list(events)
    assert isinstance(events[-1], Finished)
    samples = [event.samples for event in events if isinstance(event, AudioChunk)]
    return events[-1], np.concatenate(samples) if samples else np.zeros(0)


@pytest.fixture
def whole(omni: OmniRuntime) -> tuple[Finished, np.ndarray]:
    """The answer with everything on the device at once."""
    return answer(run(omni, plan_of([STAGES])))


def assert_same_answer(said: tuple[Finished, np.ndarray], expected: tuple[Finished, np.ndarray]) -> None:
    assert said[0].text_ids == expected[0].text_ids
    assert said[0].codec_ids == expected[0].codec_ids
    np.testing.assert_array_equal(said[1], expected[1])


CUTS = {
    "every stage alone": [[stage] for stage in STAGES],
    "encoders together": [STAGES[:2], STAGES[2:]],
    "speech apart": [STAGES[:3], STAGES[3:]],
    "sound apart": [STAGES[:2], STAGES[2:4], STAGES[4:]],
}


class CardCount(NoMeter):
    """Stands for the count of a card that finds so many bytes in each phase."""

    kind = DEVICE_ALLOCATOR

    def __init__(self, peak_bytes: int) -> None:
        super().__init__()
        self._peak_bytes = peak_bytes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.peaks[name] = self._peak_bytes
        yield


@pytest.mark.parametrize(("slack_mib", "level"), [(64, "INFO"), (40, "WARNING")])
def test_what_a_phase_took_of_the_slack_is_logged_and_what_is_beyond_it_is_warned_of(
    omni: OmniRuntime, slack_mib: int, level: str, caplog: pytest.LogCaptureFixture
):
    omni._machine = replace(omni._machine, meter=CardCount(60 * MIB))
    with caplog.at_level(logging.INFO, "lowvram.turn"):
        list(run(omni, replace(plan_of([STAGES]), slack_bytes=slack_mib * MIB)))
    assert {record.levelname for record in caplog.records if "held 60.0 MiB more" in record.message} == {level}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_cutting_the_pipe_changes_nothing(omni: OmniRuntime, whole: Any, cuts: Sequence[Sequence[str]]):
    assert_same_answer(answer(run(omni, plan_of(cuts))), whole)


def test_streaming_every_layer_changes_nothing_and_holds_less(deep_demo: Path):
    with OmniRuntime.open(deep_demo, device="cpu", dtype="float32") as omni:
        whole = answer(run(omni, plan_of([STAGES])))
        events, held_bytes = [], []
        for event in run(omni, plan_of([STAGES], Placement.STREAMED)):
            events.append(event)
            held_bytes.append(omni._machine.residency.live_bytes)
        assert_same_answer(answer(iter(events)), whole)
        assert max(held_bytes) < sum(b.n_bytes for part in omni._machine.model.components.values() for b in part)


def test_a_talker_without_sound_in_its_phase_tells_of_every_second(omni: OmniRuntime):
    sampling = SamplingParams(max_tokens=200, temperature=2.0, seed=2)
    speech = replace(SPEECH, sampling=replace(SPEECH.sampling, max_tokens=120, seed=1), steps=2)

    def told(cuts: Sequence[Sequence[str]]) -> tuple[int, list[int]]:
        with omni.preprocessor.open(MESSAGES, MEDIA) as prompt:
            turn = turn_of(omni, prompt.inputs, plan_of(cuts), sampling=sampling, speech=speech)
            events = list(turn.run())
        done = [event.done for event in events if isinstance(event, Progress) and event.stage == "talk"]
        return len(events[-1].codec_ids), done

    codes, done = told([[stage] for stage in STAGES])
    assert done and done == [*range(50, codes + 1, 50)]
    assert told([STAGES]) == (codes, [])


@pytest.mark.parametrize("prefill", [1, 7, 64])
def test_prefill_chunks_change_nothing(omni: OmniRuntime, whole: Any, prefill: int):
    said, _ = answer(run(omni, plan_of([STAGES], prefill_chunk_tokens=prefill)))
    assert (said.text_ids, said.codec_ids) == (whole[0].text_ids, whole[0].codec_ids)


def test_encoder_chunks_change_nothing(omni: OmniRuntime, whole: Any):
    said, _ = answer(run(omni, plan_of([STAGES], vision_chunk_patches=1, audio_chunk_windows=1)))
    assert (said.text_ids, said.codec_ids) == (whole[0].text_ids, whole[0].codec_ids)


def test_what_is_told_of_each_part_of_the_way_ends_with_all_of_it(omni: OmniRuntime):
    events = run(omni, plan_of([STAGES], prefill_chunk_tokens=7, vision_chunk_patches=1, audio_chunk_windows=1))
    last = {event.stage: (event.done, event.total) for event in events if isinstance(event, Progress)}
    assert last.keys() == {"load", "condition", "hear", "see", "prefill"}
    assert all(done == total for done, total in last.values())


def test_text_is_shown_as_it_is_written_also_when_the_pipe_ends_in_sound(omni: OmniRuntime):
    """The first word is out before the talker has spoken a second code."""
    with omni.preprocessor.open(MESSAGES, MEDIA) as prompt:
        turn = turn_of(omni, prompt.inputs, plan_of([STAGES]))
        events = turn.run()
        next(event for event in events if isinstance(event, TextDelta))
        assert len(turn.account.codec_ids) <= 1
        events.close()


def test_a_character_that_the_answer_leaves_unfinished_is_shown_in_the_end(omni: OmniRuntime):
    omni._machine = replace(omni._machine, detokenize=lambda ids: "\ufffd" * len(ids))
    said, _ = answer(run(omni, plan_of([STAGES])))
    assert said.text == "\ufffd" * len(said.text_ids) != ""


def test_sound_of_one_phase_begins_before_its_text_ends(omni: OmniRuntime):
    sampling = SamplingParams(max_tokens=200, temperature=2.0, seed=2)
    with omni.preprocessor.open(MESSAGES, MEDIA) as prompt:
        speech = replace(SPEECH, sampling=replace(SPEECH.sampling, max_tokens=150), steps=2)
        turn = turn_of(omni, prompt.inputs, plan_of([STAGES]), sampling=sampling, speech=speech)
        kinds = [type(event) for event in turn.run()]
    assert kinds.index(AudioChunk) < len(kinds) - 1 - kinds[::-1].index(TextDelta)


def test_text_of_a_cut_pipe_comes_before_the_talker_is_loaded(omni: OmniRuntime):
    events = list(run(omni, plan_of([STAGES[:3], STAGES[3:]])))
    last_text = max(i for i, event in enumerate(events) if isinstance(event, TextDelta))
    loads = [i for i, event in enumerate(events) if isinstance(event, Progress) and event.stage == "load"]
    assert last_text < loads[-1]


def test_sound_is_480_samples_a_code_and_ends_with_a_last_chunk(omni: OmniRuntime):
    events = list(run(omni, plan_of([STAGES])))
    chunks = [event for event in events if isinstance(event, AudioChunk)]
    assert sum(len(chunk.samples) for chunk in chunks) == 480 * len(events[-1].codec_ids)
    assert [chunk.is_last for chunk in chunks].index(True) == len(chunks) - 1


def test_no_chunk_is_empty_but_the_last(omni: OmniRuntime):
    chunks = [event for event in run(omni, plan_of([STAGES])) if isinstance(event, AudioChunk)]
    assert [len(chunk.samples) == 0 for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_chunks_say_where_in_the_speech_they_begin(omni: OmniRuntime):
    chunks = [event for event in run(omni, plan_of([STAGES])) if isinstance(event, AudioChunk)]
    lengths = np.cumsum([0, *(len(chunk.samples) for chunk in chunks)])
    assert [chunk.start_s for chunk in chunks] == [start / 24_000 for start in lengths[:-1]]


def test_a_stages_weights_leave_before_the_next_come(omni: OmniRuntime):
    """The most that is ever on the device is the largest phase, not a sum of two."""
    residency, peak = omni._machine.residency, 0
    sizes = {name: sum(block.n_bytes for block in blocks) for name, blocks in omni._machine.model.components.items()}
    for _ in run(omni, plan_of([[stage] for stage in STAGES])):
        peak = max(peak, residency.live_bytes)
    assert peak == max(sum(sizes[component] for component in components) for components in COMPONENTS.values())


def test_nothing_for_a_phase_stays_after_the_turn(omni: OmniRuntime):
    list(run(omni, plan_of([STAGES])))
    assert omni._machine.residency.live_bytes == 0


def test_only_the_last_position_has_logits(omni: OmniRuntime):
    rows = []
    (head,) = omni._machine.model.components["lm_head"]
    head.module.register_forward_pre_hook(lambda _module, args: rows.append(tuple(args[0].shape)))
    said, _ = answer(run(omni, plan_of([STAGES])))
    hidden = omni._machine.model.embed_tokens.width
    assert set(rows) == {(1, hidden)}
    assert len(rows) >= len(said.text_ids)


def test_penalties_have_seen_what_the_references_have(omni: OmniRuntime, monkeypatch: pytest.MonkeyPatch):
    """The thinker's counts the prompt; the talker's counts mask, pad and start, and never draws start."""
    made = []

    def spying(*args: Any, **options: Any) -> Sampler:
        made.append(options)
        return Sampler(*args, **options)

    monkeypatch.setattr("lowvram.turn.Sampler", spying)
    list(run(omni, plan_of([STAGES])))
    talker, thinker = made  # the end of the pipe starts first, and pulls
    ids = omni._machine.model.speech.codec_ids
    with omni.preprocessor.open(MESSAGES, MEDIA) as prompt:
        assert torch.equal(thinker["seen"], prompt.inputs.input_ids)
    assert set(talker["seen"].tolist()) == {ids.mask, ids.pad, ids.start}
    assert talker["suppressed"] == [ids.start]


@pytest.mark.parametrize("cuts", [[STAGES], [[stage] for stage in STAGES]], ids=["together", "one by one"])
def test_cancelling_at_any_event_keeps_what_there_is_and_says_so(omni: OmniRuntime, whole: Any, cuts: Any):
    total = len(list(run(omni, plan_of(cuts))))
    for after in range(total - 2):  # the last chunk and the summary follow at once
        said, samples = answer(run(omni, plan_of(cuts), cancel_after=after))
        assert said.speech_finish_reason == "cancelled", after
        assert said.text_ids == whole[0].text_ids[: len(said.text_ids)]
        np.testing.assert_array_equal(samples, whole[1][: len(samples)])


def test_cancelling_while_weights_load_loads_no_more(omni: OmniRuntime):
    loads = [event for event in run(omni, plan_of([STAGES]), cancel_after=1) if isinstance(event, Progress)]
    assert len(loads) == 1


def test_an_applications_default_device_and_dtype_are_not_ours(omni: OmniRuntime, whole: Any):
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        said = answer(run(omni, plan_of([STAGES])))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert_same_answer(said, whole)


def test_closing_the_iterator_frees_the_device(omni: OmniRuntime):
    events = run(omni, plan_of([STAGES]))
    next(event for event in events if isinstance(event, TextDelta))
    events.close()
    assert omni._machine.residency.live_bytes == 0


def test_prefill_memory_does_not_grow_with_the_prompt(omni: OmniRuntime):
    """Beyond the cache and the prompt's own rows, a prompt four times as long needs no more."""
    from lowvram.flow import PromptEmbeds
    from lowvram.offload.meter import LiveBytes
    from lowvram.thinker import prefill

    def peak_bytes(tokens: int) -> int:
        model, device = omni._machine.model, torch.device("cpu")
        with omni.preprocessor.open([{"role": "user", "content": "hi"}]) as short:
            turn = turn_of(omni, short.inputs, plan_of([["thinker"]]))
        list(omni._machine.residency.enter(plan_of([["thinker"]]).phases[0]))
        rows = torch.zeros(tokens, model.embed_tokens.width)
        prompt = PromptEmbeds(rows, torch.zeros(tokens, dtype=torch.bool), torch.arange(tokens).expand(3, -1), tokens)
        cache = model.thinker.new_cache(tokens, device)
        with LiveBytes() as meter:
            list(prefill(turn._thinker(), prompt, cache, chunk_tokens=lambda: 64, talker_rows=None, device=device))
        return meter.peak_bytes

    peak_bytes(128)  # the first run also makes the workspace of the 4-bit linears
    assert peak_bytes(2048) == peak_bytes(512)
