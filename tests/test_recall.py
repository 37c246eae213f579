"""What one turn has read, the next one knows, and says what it would have said."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import numbered_frame, write_video
from test_turn import MEDIA, MESSAGES, SAMPLING, SPEECH

from lowvram.device import Device
from lowvram.errors import OptionError
from lowvram.events import Event, Finished, Progress, TextDelta
from lowvram.flow import AudioInput, ModelInputs
from lowvram.kv_cache import KVCache
from lowvram.model import Decoder
from lowvram.offload.budget import GIB, MIB
from lowvram.offload.residency import Residency
from lowvram.options import Limits, SpeechParams
from lowvram.recall import Reading, Recall
from lowvram.runtime import OmniRuntime

Messages = Sequence[Mapping[str, Any]]


@pytest.fixture
def remembering(demo: Path) -> Iterator[OmniRuntime]:
    with OmniRuntime.open(demo, device="cpu", dtype="float32", remember="64MiB") as omni:
        yield omni


def ask(omni: OmniRuntime, messages: Messages, speech: SpeechParams | None = SPEECH, **options: Any) -> Iterator[Event]:
    return omni.generate(messages, sampling=SAMPLING, speech=speech, media=replace(MEDIA, **options))


def answer(omni: OmniRuntime, messages: Messages, speech: SpeechParams | None = SPEECH, **options: Any) -> Finished:
    *_, finished = ask(omni, messages, speech, **options)
    assert isinstance(finished, Finished)
    return finished


def asked_again(messages: Messages, reply: Finished) -> Messages:
    return [*messages, {"role": "assistant", "content": reply.text}, {"role": "user", "content": "and now?"}]


def said(finished: Finished) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    return finished.text_ids, finished.codec_ids, finished.audio_s


@pytest.mark.parametrize("speech", [SPEECH, None], ids=["spoken", "silent"])
def test_a_conversation_goes_on_from_where_it_was_and_says_the_same(
    omni: OmniRuntime, remembering: OmniRuntime, speech: SpeechParams | None
):
    messages: Messages = MESSAGES
    known = 0
    for _ in range(3):
        expected, found = (answer(each, messages, speech) for each in (omni, remembering))
        assert said(found) == said(expected)
        assert (found.recalled_tokens, expected.recalled_tokens) == (known, 0)
        messages, known = asked_again(messages, found), found.prompt_tokens


def test_what_is_known_is_neither_encoded_nor_read_again(remembering: OmniRuntime):
    first = answer(remembering, MESSAGES)
    events = list(ask(remembering, asked_again(MESSAGES, first)))
    stages = {event.stage for event in events if isinstance(event, Progress)}
    assert "prefill" in stages
    assert not stages & {"hear", "see"}
    (read, *_) = (event.done for event in events if isinstance(event, Progress) and event.stage == "prefill")
    assert read > first.prompt_tokens
    assert not any("see" in phase or "hear" in phase for phase in events[-1].memory["peak_bytes"])


def test_nothing_is_remembered_unless_asked(omni: OmniRuntime):
    answer(omni, MESSAGES)
    assert answer(omni, MESSAGES).recalled_tokens == 0
    assert omni._recall.last is None


def test_the_same_question_again_reads_its_last_token(remembering: OmniRuntime):
    first, again = answer(remembering, MESSAGES), answer(remembering, MESSAGES)
    assert again.recalled_tokens == first.prompt_tokens - 1
    assert said(again) == said(first)


def changed(medium: int, key: str) -> Messages:
    """The question with another medium of the same size in one place."""
    messages = copy.deepcopy(MESSAGES)
    content = messages[-1]["content"]
    content[medium][key] = content[medium][key][::-1].copy()
    return messages


@pytest.mark.parametrize(
    ("medium", "key", "placeholder"), [(0, "image", "image"), (1, "audio", "audio"), (2, "video", "video")]
)
def test_another_medium_is_read_from_its_first_row(
    omni: OmniRuntime, remembering: OmniRuntime, medium: int, key: str, placeholder: str
):
    answer(remembering, MESSAGES)
    other = changed(medium, key)
    found = answer(remembering, other)
    with omni.preprocessor.open(other, MEDIA) as prompt:
        media = {"image": prompt.inputs.visuals[0], "audio": prompt.inputs.audios[0], "video": prompt.inputs.visuals[1]}
        assert found.recalled_tokens == int(media[placeholder].rows[0])
    assert said(found) == said(answer(omni, other))


def test_other_words_are_read_from_where_they_differ(omni: OmniRuntime, remembering: OmniRuntime):
    answer(remembering, MESSAGES)
    other = copy.deepcopy(MESSAGES)
    other[-1]["content"][-1]["text"] = "compare two"
    found = answer(remembering, other)
    assert 0 < found.recalled_tokens < found.prompt_tokens - 1
    assert said(found) == said(answer(omni, other))


def test_a_clip_is_known_by_its_bytes_and_by_how_it_is_cut(remembering: OmniRuntime, tmp_path: Path):
    clip = write_video(tmp_path / "clip.mkv", [numbered_frame(i) for i in range(40)], "ffv1", fps=10)
    (copied := tmp_path / "copy.mkv").write_bytes(clip.read_bytes())
    other = write_video(tmp_path / "other.mkv", [numbered_frame(40 - i) for i in range(40)], "ffv1", fps=10)

    def about(path: Path) -> Messages:
        return [{"role": "user", "content": [{"type": "video", "video": path}, "?"]}]

    first = answer(remembering, about(clip), None)
    with remembering.preprocessor.open(about(clip), MEDIA) as prompt:
        before = int(prompt.inputs.visuals[0].rows[0])
    assert answer(remembering, about(copied), None).recalled_tokens == first.prompt_tokens - 1
    assert answer(remembering, about(other), None).recalled_tokens == before
    for cut in ({"start_s": 0.0, "end_s": 3.0}, {"start_s": 1.0}, {"fps": 1.0}):
        assert answer(remembering, about(other), None, **cut).recalled_tokens == before


def test_what_a_silent_turn_has_read_is_read_again_for_a_talker(omni: OmniRuntime, remembering: OmniRuntime):
    answer(remembering, MESSAGES, None)
    found = answer(remembering, MESSAGES)
    assert found.recalled_tokens == 0
    assert said(found) == said(answer(omni, MESSAGES))
    assert answer(remembering, MESSAGES, None).recalled_tokens > 0


def test_a_text_read_aloud_in_between_leaves_what_is_known(remembering: OmniRuntime):
    answer(remembering, MESSAGES)
    list(remembering.speak("good morning", speech=SPEECH))
    assert answer(remembering, MESSAGES).recalled_tokens > 0


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_in_less_memory_less_is_known_and_the_same_is_said(demo: Path, omni: OmniRuntime, share: float):
    with OmniRuntime.open(demo, device="cpu", dtype="float32", remember="64MiB") as remembering:
        first = answer(remembering, MESSAGES)
        last = remembering._recall.last
        kept_bytes = sum(part.nbytes for part in (*last.heads, last.talker_rows))
    with OmniRuntime.open(demo, device="cpu", dtype="float32", remember=int(kept_bytes * share)) as remembering:
        answer(remembering, MESSAGES)
        found = answer(remembering, MESSAGES)
        last = remembering._recall.last
        assert sum(part.nbytes for part in (*last.heads, last.talker_rows)) <= kept_bytes * share
    assert found.recalled_tokens == int(first.prompt_tokens * share)
    assert said(found) == said(answer(omni, MESSAGES))


def test_what_a_cancelled_turn_has_read_is_known(omni: OmniRuntime, remembering: OmniRuntime):
    for event in ask(remembering, MESSAGES):
        if isinstance(event, TextDelta):
            remembering.cancel()
    found = answer(remembering, MESSAGES)
    assert found.recalled_tokens == found.prompt_tokens - 1
    assert said(found) == said(answer(omni, MESSAGES))


@pytest.mark.parametrize(("owner", "step"), [(Decoder, "new_cache"), (Reading, "recall")])
def test_a_turn_that_is_cancelled_before_it_reads_on_forgets_nothing(
    remembering: OmniRuntime, monkeypatch: pytest.MonkeyPatch, owner: type, step: str
):
    first = answer(remembering, MESSAGES)
    take = getattr(owner, step)

    def take_and_cancel(*args: Any) -> Any:
        taken = take(*args)
        remembering.cancel()
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, take_and_cancel)
        assert answer(remembering, MESSAGES).finish_reason == "cancelled"
    assert answer(remembering, MESSAGES).recalled_tokens == first.prompt_tokens - 1


def test_a_turn_that_was_closed_in_the_middle_of_its_prompt_leaves_what_it_has_read(demo: Path, omni: OmniRuntime):
    limits = Limits(prefill_chunk_tokens=16)
    with OmniRuntime.open(demo, device="cpu", dtype="float32", remember="64MiB", limits=limits) as remembering:
        events = ask(remembering, MESSAGES)
        assert next(event.done for event in events if isinstance(event, Progress) and event.stage == "prefill") == 16
        events.close()
        found = answer(remembering, MESSAGES)
    assert found.recalled_tokens == 16
    assert said(found) == said(answer(omni, MESSAGES))


def test_a_turn_that_is_closed_is_copied_from_in_the_stream_that_computed_it(
    remembering: OmniRuntime, monkeypatch: pytest.MonkeyPatch
):
    is_there: list[bool] = []
    copied_there: list[bool] = []
    first = KVCache.first

    @contextmanager
    def there() -> Iterator[None]:
        is_there.append(True)
        yield
        is_there.pop()

    def noted(cache: KVCache, n_tokens: int) -> tuple[torch.Tensor, ...]:
        copied_there.append(any(is_there))
        return first(cache, n_tokens)

    monkeypatch.setattr(Residency, "here", lambda _: there)
    monkeypatch.setattr(KVCache, "first", noted)
    events = ask(remembering, MESSAGES, None)
    next(event for event in events if isinstance(event, Progress) and event.stage == "prefill")
    events.close()
    assert copied_there == [True]


def test_a_turn_in_the_smallest_budget_remembers_and_is_remembered(demo: Path, omni: OmniRuntime):
    least_bytes = omni.plan(MESSAGES, sampling=SAMPLING, speech=SPEECH, media=MEDIA).smallest_budget_bytes
    with OmniRuntime.open(demo, device="cpu", dtype="float32", vram=least_bytes, remember="64MiB") as remembering:
        first = answer(remembering, MESSAGES)
        found = answer(remembering, MESSAGES)
    assert found.recalled_tokens == first.prompt_tokens - 1
    assert said(found) == said(answer(omni, MESSAGES))


def test_8_bits_are_remembered_as_they_are(demo: Path):
    limits = Limits(kv="int8")
    with OmniRuntime.open(demo, device="cpu", dtype="float32", remember="64MiB", limits=limits) as remembering:
        first, again = answer(remembering, MESSAGES), answer(remembering, MESSAGES)
    assert again.recalled_tokens > 0
    assert said(again) == said(first)


def test_a_closed_runtime_remembers_nothing(demo: Path):
    with OmniRuntime.open(demo, device="cpu", dtype="float32", remember="64MiB") as remembering:
        answer(remembering, MESSAGES, None)
        assert remembering._recall.last
    assert remembering._recall.last is None


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_a_host_without_room_costs_what_is_known_and_not_the_answer(
    omni: OmniRuntime,
    remembering: OmniRuntime,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
):
    def full(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "first", full)
        first = answer(remembering, MESSAGES)
    assert "read from its beginning" in caplog.text
    assert said(first) == said(answer(omni, MESSAGES))
    assert answer(remembering, MESSAGES).recalled_tokens == 0


# How much there is of it


def test_what_is_remembered_is_taken_from_the_ram(demo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowvram.allowance.free_ram_bytes", lambda: 8 * GIB)
    with OmniRuntime.open(demo, device="cpu", ram="8GiB", remember="1GiB") as omni:
        assert (omni.budget.ram_bytes, omni._recall.most_bytes) == (7 * GIB, GIB)
    with OmniRuntime.open(demo, device="cpu", ram="8GiB", remember="auto") as omni:
        assert (omni.budget.ram_bytes, omni._recall.most_bytes) == (6 * GIB, 2 * GIB)


def test_without_a_budget_of_ram_a_quarter_of_what_is_free_is_taken(demo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowvram.allowance.free_ram_bytes", lambda: 400 * MIB)
    with OmniRuntime.open(demo, device="cpu", remember="auto") as omni:
        assert (omni.budget.ram_bytes, omni._recall.most_bytes) == (None, 100 * MIB)


def test_a_quarter_of_more_ram_than_is_free_is_one_of_what_is_free(demo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowvram.allowance.free_ram_bytes", lambda: 400 * MIB)
    with OmniRuntime.open(demo, device="cpu", ram="8GiB", remember="auto") as omni:
        assert omni._recall.most_bytes == 100 * MIB


@pytest.mark.parametrize("vram", [None, "8GiB"])
def test_on_a_cpu_budget_and_what_is_remembered_are_no_more_than_is_free(demo: Path, vram: str | None):
    cpu = Device(torch.device("cpu"), "a CPU", 4 * GIB)
    with OmniRuntime.open(demo, device=cpu, vram=vram, remember="1GiB") as omni:
        assert omni.budget.vram_bytes <= 3 * GIB
        omni.set_budget("8GiB")
        assert omni.budget.vram_bytes == 3 * GIB
    with pytest.raises(OptionError, match=r"leave nothing of 4.00 GiB of RAM"):
        OmniRuntime.open(demo, device=cpu, vram=vram, remember="4GiB")


@pytest.mark.parametrize(
    ("remember", "complaint"), [("8GiB", "leave nothing of 8.00 GiB of RAM"), ("much", "not a size")]
)
def test_sizes_that_make_no_sense_are_refused(demo: Path, remember: str, complaint: str):
    with pytest.raises(OptionError, match=complaint):
        OmniRuntime.open(demo, device="cpu", ram="8GiB", remember=remember)


# Where a prompt differs


class Prompts:
    """Prompts of small words and sounds of 3 rows, spelled as a string: "abXc" has the sound X between b and c."""

    WORDS, SOUNDS = "abc", "XY"

    @classmethod
    def inputs(cls, spelled: str) -> ModelInputs:
        ids: list[int] = []
        audios: list[AudioInput] = []
        for letter in spelled:
            if letter in cls.WORDS:
                ids.append(cls.WORDS.index(letter))
            else:
                audios.append(
                    AudioInput(torch.full((1, 1), float(cls.SOUNDS.index(letter))), torch.arange(3) + len(ids))
                )
                ids += [9] * 3
        positions = torch.arange(len(ids)).expand(3, -1)
        return ModelInputs(torch.tensor(ids), positions, len(ids), audios=tuple(audios))

    @classmethod
    def rows(cls, spelled: str) -> list[str]:
        """By row, all that it is made from: a word, or a sound and how much of it has been."""
        return [
            row
            for letter in spelled
            for row in ([letter] if letter in cls.WORDS else [f"{letter}{i}" for i in range(3)])
        ]


SPELLED = st.text(Prompts.WORDS + Prompts.SOUNDS, min_size=1, max_size=6)


@given(SPELLED, SPELLED, st.booleans())
@settings(deadline=None, max_examples=300)
def test_known_is_the_longest_beginning_that_is_made_from_the_same(before: str, after: str, is_continued: bool):
    after = before + after if is_continued else after
    recall = Recall(MIB)
    old, new = Prompts.inputs(before), Prompts.inputs(after)
    n = len(old.input_ids)
    cache = KVCache(1, 1, 1, n, dtype=torch.float32, device=torch.device("cpu"))
    recall.reading(old, talks=False).keep(cache, None, n)
    reading = recall.reading(new, talks=False)
    rows = [Prompts.rows(spelled) for spelled in (before, after)]
    alike = next((i for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), min(map(len, rows)))
    assert reading.known_tokens == min(alike, len(rows[1]) - 1)
    assert {id(audio) for audio in reading.audios} == {
        id(audio) for audio in new.audios if int(audio.rows[-1]) >= reading.known_tokens
    }


def test_other_positions_are_another_prompt():
    recall, inputs = Recall(MIB), Prompts.inputs("abc")
    cache = KVCache(1, 1, 1, 3, dtype=torch.float32, device=torch.device("cpu"))
    recall.reading(inputs, talks=False).keep(cache, None, 3)
    moved = inputs.position_ids.clone()
    moved[2, 1:] += 1
    assert recall.reading(replace(inputs, position_ids=moved), talks=False).known_tokens == 1


def test_a_reading_that_keeps_nothing_knows_nothing():
    cache = KVCache(1, 1, 1, 3, dtype=torch.float32, device=torch.device("cpu"))
    Reading(Prompts.inputs("abc")).recall(cache, None)
    assert cache.get_seq_length() == 0
