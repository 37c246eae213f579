from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from lowvram.errors import BackendError, BudgetError, CheckpointError, LowVRAMError, OptionError
from lowvram.events import AudioChunk, Event, Finished, TextDelta
from lowvram.offload.meter import LiveBytes
from lowvram.options import TALKER_SAMPLING, Limits, SamplingParams, SpeechParams
from lowvram.room import Control
from lowvram.runtime import RECITING, OmniRuntime

MESSAGES = [{"role": "user", "content": "hello green river"}]
SHORT = SamplingParams(max_tokens=8)
SPEECH = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=30, seed=1), steps=2)


def ask(omni: OmniRuntime, **options: object) -> Finished:
    *_, finished = omni.generate(MESSAGES, **{"sampling": SHORT, "speech": SPEECH, **options})
    return finished


def test_two_turns_one_after_another_say_the_same(omni: OmniRuntime):
    first, second = ask(omni), ask(omni)
    assert (first.text_ids, first.codec_ids) == (second.text_ids, second.codec_ids)


def test_text_alone_has_no_codes_and_no_speech_finish_reason(omni: OmniRuntime):
    finished = ask(omni, speech=None)
    assert (finished.codec_ids, finished.speech_finish_reason, finished.audio_s) == ((), None, 0.0)


def test_text_does_not_depend_on_whether_it_is_spoken(omni: OmniRuntime):
    assert ask(omni, speech=None).text_ids == ask(omni).text_ids


def test_deltas_add_up_to_the_text(omni: OmniRuntime):
    *events, finished = omni.generate(MESSAGES, sampling=SHORT, speech=SPEECH)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == finished.text


def test_limits_reached_are_called_length(omni: OmniRuntime):
    finished = ask(omni, sampling=SamplingParams(max_tokens=2))
    assert (finished.finish_reason, len(finished.text_ids)) == ("length", 2)
    assert (finished.speech_finish_reason, len(finished.codec_ids)) == ("length", 30)


def test_cancelling_from_another_thread_ends_the_turn_with_a_summary(omni: OmniRuntime):
    events = omni.generate(MESSAGES, sampling=SamplingParams(max_tokens=500, temperature=2.0, seed=1), speech=SPEECH)
    next(event for event in events if isinstance(event, TextDelta))
    canceller = threading.Thread(target=omni.cancel)
    canceller.start()
    canceller.join()
    *_, finished = events
    assert finished.finish_reason == "cancelled"
    assert len(finished.text_ids) >= 1


def test_a_cancelled_runtime_answers_again(omni: OmniRuntime):
    events = omni.generate(MESSAGES, sampling=SHORT, speech=SPEECH)
    next(events)
    omni.cancel()
    list(events)
    assert ask(omni).finish_reason != "cancelled"


def test_closing_the_iterator_leaves_the_runtime_usable(omni: OmniRuntime):
    expected = ask(omni)
    events = omni.generate(MESSAGES, sampling=SHORT, speech=SPEECH)
    next(events)
    events.close()
    assert ask(omni).codec_ids == expected.codec_ids


def test_a_second_answer_at_once_is_refused(omni: OmniRuntime):
    first = omni.generate(MESSAGES, sampling=SHORT, speech=SPEECH)
    next(first)
    with pytest.raises(LowVRAMError, match="already making 1 answer"):
        next(omni.generate(MESSAGES))
    assert isinstance(list(first)[-1], Finished)


class EndsMeanwhile:
    """The lock of an answer that ends just after another one asked for it."""

    def __init__(self) -> None:
        self.asked = self.held = 0

    def acquire(self, blocking: bool) -> bool:
        self.asked += 1
        self.held += self.asked > 1
        return self.asked > 1

    def locked(self) -> bool:
        return self.held > 0

    def release(self) -> None:
        self.held -= 1


def test_an_answer_that_ends_meanwhile_gives_way_to_the_next(omni: OmniRuntime, monkeypatch: pytest.MonkeyPatch):
    lock = EndsMeanwhile()
    monkeypatch.setattr(omni, "_answering", lock)
    events = omni.generate(MESSAGES, sampling=SHORT, speech=None)
    next(events)
    assert lock.held == 1
    events.close()
    assert lock.held == 0


def test_an_exception_between_two_events_leaves_the_runtime_usable(omni: OmniRuntime):
    expected = ask(omni)
    with pytest.raises(ZeroDivisionError):
        for _ in omni.generate(MESSAGES, sampling=SHORT, speech=SPEECH):
            raise ZeroDivisionError
    assert ask(omni).codec_ids == expected.codec_ids


def test_each_event_may_be_asked_for_in_another_thread(omni: OmniRuntime):
    events, threads = omni.generate(MESSAGES, sampling=SHORT, speech=SPEECH), []
    *_, finished = list(iter(partial(_in_a_thread_of_its_own, events, threads), None))
    assert (finished.codec_ids, len(set(threads))) == (ask(omni).codec_ids, len(threads))


def _in_a_thread_of_its_own(events: Iterator[Event], threads: list[threading.Thread]) -> Event | None:
    made: list[Event | None] = []
    threads.append(threading.Thread(target=lambda: made.append(next(events, None))))
    threads[-1].start()
    threads[-1].join()
    return made[0]


def test_answers_can_be_made_in_another_thread(omni: OmniRuntime):
    said = []
    worker = threading.Thread(target=lambda: said.append(ask(omni)))
    worker.start()
    worker.join()
    assert said[0].text_ids == ask(omni).text_ids


def test_a_closed_runtime_refuses(demo: Path):
    omni = OmniRuntime.open(demo, device="cpu")
    omni.close()
    omni.close()
    with pytest.raises(LowVRAMError, match="closed"):
        omni.generate(MESSAGES)


def test_closing_during_an_answer_ends_it_and_frees_the_device_afterwards(demo: Path):
    omni = OmniRuntime.open(demo, device="cpu")
    events = omni.generate(MESSAGES, sampling=SamplingParams(max_tokens=500, temperature=2.0, seed=1), speech=SPEECH)
    next(event for event in events if isinstance(event, TextDelta))
    closer = threading.Thread(target=omni.close)
    closer.start()
    closer.join()
    *_, finished = events
    assert finished.finish_reason == "cancelled"
    assert omni._machine.residency.live_bytes == 0


def test_an_answer_that_had_not_begun_is_refused_after_closing(demo: Path):
    omni = OmniRuntime.open(demo, device="cpu")
    events = omni.generate(MESSAGES)
    omni.close()
    with pytest.raises(LowVRAMError, match="closed"):
        next(events)


def test_cancelling_before_the_first_event_counts(omni: OmniRuntime):
    events = omni.generate(MESSAGES, sampling=SHORT, speech=SPEECH)
    omni.cancel()
    *_, finished = events
    assert (finished.finish_reason, finished.text_ids) == ("cancelled", ())


def test_of_two_answers_made_before_either_began_one_can_be_cancelled(omni: OmniRuntime):
    first, second = (omni.generate(MESSAGES, sampling=SHORT, speech=SPEECH) for _ in range(2))
    next(first)
    omni.cancel()
    *_, ended = first
    *_, finished = second
    assert (ended.finish_reason, finished.finish_reason) == ("cancelled", "length")


def test_an_answer_that_begins_while_another_is_made_can_be_cancelled(
    omni: OmniRuntime, monkeypatch: pytest.MonkeyPatch
):
    first = omni.generate(MESSAGES, sampling=SHORT, speech=None)
    beginning = threading.Thread(target=next, args=(first,), daemon=True)
    present = OmniRuntime._require_present

    def meanwhile(omni: OmniRuntime) -> None:
        present(omni)
        beginning.start()
        beginning.join(0.2)

    with monkeypatch.context() as patch:
        patch.setattr(OmniRuntime, "_require_present", meanwhile)
        omni.generate(MESSAGES, sampling=SHORT, speech=None)
    beginning.join(60)
    omni.cancel()
    *_, ended = first
    assert ended.finish_reason == "cancelled"


def test_closing_while_an_answer_begins_cancels_it(demo: Path, monkeypatch: pytest.MonkeyPatch):
    with OmniRuntime.open(demo, device="cpu") as omni:
        first, _ = (omni.generate(MESSAGES, sampling=SHORT, speech=None) for _ in range(2))
        heed = OmniRuntime._heed

        def late(omni: OmniRuntime, *control: Control) -> None:
            omni.close()
            heed(omni, *control)

        monkeypatch.setattr(OmniRuntime, "_heed", late)
        *_, ended = first
    assert ended.finish_reason == "cancelled"


def test_whoever_hears_the_end_of_an_answer_may_ask_again_at_once(omni: OmniRuntime):
    first, second = (omni.generate(MESSAGES, sampling=SHORT, speech=None) for _ in range(2))
    ended = next(event for event in first if isinstance(event, Finished))
    *_, finished = second
    assert finished.text == ended.text


def test_a_turns_memory_is_not_the_last_turns(demo: Path):
    with LiveBytes() as meter, OmniRuntime.open(demo, device="cpu", meter=meter) as omni:
        spoken, silent = ask(omni), ask(omni, speech=None)
    assert list(spoken.memory["peak_bytes"]) == ["condition", "think+talk+sound"]
    assert list(silent.memory["peak_bytes"]) == ["think"]


def test_by_default_a_checkpoint_speaks_if_it_can(omni: OmniRuntime):
    omni._voices = {}
    assert "talker" not in omni.plan(MESSAGES).phases[-1].stages
    *_, finished = omni.generate(MESSAGES, sampling=SHORT)
    assert finished.speech_finish_reason is None
    with pytest.raises(OptionError, match="no voices"):
        omni.generate(MESSAGES, speech=SPEECH)


def test_opening_says_nothing(demo: Path, capfd: pytest.CaptureFixture):
    OmniRuntime.open(demo, device="cpu").close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_an_applications_default_dtype_changes_no_answer(demo: Path, dtype: torch.dtype):
    def speech() -> bytes:
        with OmniRuntime.open(demo, device="cpu") as omni:
            said = omni.generate(MESSAGES, sampling=SHORT, speech=SPEECH)
            return b"".join(event.samples.tobytes() for event in said if isinstance(event, AudioChunk))

    expected = speech()
    torch.set_default_dtype(dtype)
    try:
        assert speech() == expected
        assert torch.get_default_dtype() is dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_applications_default_device_chooses_no_other_kernel_and_changes_no_answer(demo: Path, dtype: str):
    with OmniRuntime.open(demo, device="cpu", dtype=dtype) as omni:
        expected = (omni.kernel, ask(omni, speech=None).text_ids)
    torch.set_default_device("meta")
    try:
        with OmniRuntime.open(demo, device="cpu", dtype=dtype) as omni:
            assert (omni.kernel, ask(omni, speech=None).text_ids) == expected
    finally:
        torch.set_default_device(None)


def test_an_unknown_voice_is_refused_at_the_call(omni: OmniRuntime):
    with pytest.raises(OptionError, match=r"voice 'Nobody' is unknown \(one of: Chelsie, Ethan\)"):
        omni.generate(MESSAGES, speech=SpeechParams(voice="Nobody"))


def test_a_prompt_beyond_its_limit_is_refused_before_any_weight_moves(demo: Path):
    with OmniRuntime.open(demo, device="cpu", limits=Limits(max_prompt_tokens=3)) as omni:
        with pytest.raises(OptionError, match="max_prompt_tokens is 3"):
            list(omni.generate(MESSAGES))
        assert omni._machine.residency.live_bytes == 0


def test_a_budget_too_small_is_refused_before_any_weight_moves(demo: Path):
    with OmniRuntime.open(demo, device="cpu", vram="64KiB") as omni:
        with pytest.raises(BudgetError, match="smallest budget"):
            list(omni.generate(MESSAGES))
        assert omni._machine.residency.live_bytes == 0


def test_the_smallest_budget_works_and_changes_nothing(demo: Path, omni: OmniRuntime):
    with (
        OmniRuntime.open(demo, device="cpu", dtype="float32", vram="64KiB") as refused,
        pytest.raises(BudgetError) as refusal,
    ):
        list(refused.generate(MESSAGES, sampling=SHORT, speech=SPEECH))
    smallest = refusal.value.needed_bytes
    with OmniRuntime.open(demo, device="cpu", dtype="float32", vram=smallest) as tight:
        assert len(tight.plan(MESSAGES, sampling=SHORT, speech=SPEECH).phases) > 1
        assert ask(tight).codec_ids == ask(omni).codec_ids


def test_residents_stay_between_turns_without_a_budget(omni: OmniRuntime):
    ask(omni)
    held = omni._machine.residency.live_bytes
    assert held > 0
    ask(omni)
    assert omni._machine.residency.live_bytes == held


def test_an_unknown_model_folder_is_refused():
    with pytest.raises(CheckpointError, match="no folder"):
        OmniRuntime.open("./no/such/folder")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"device": "tpu9"}, OptionError),
        ({"device": "meta"}, OptionError),
        ({"dtype": "int3"}, OptionError),
        ({"kernel": "warp-drive"}, BackendError),
        ({"vram": "eight"}, OptionError),
    ],
)
def test_options_that_do_not_exist_are_refused(demo: Path, options: dict, error: type[Exception]):
    with pytest.raises(error):
        OmniRuntime.open(demo, **{"device": "cpu", **options})


@pytest.mark.parametrize("bos_token", [-1, 10**6])
def test_a_voice_whose_first_token_is_none_of_the_models_is_refused(demo: Path, tmp_path: Path, bos_token: int):
    folder = shutil.copytree(demo, tmp_path / "model")
    voices = torch.load(folder / "spk_dict.pt", weights_only=True)
    torch.save({name: {**voice, "bos_token": bos_token} for name, voice in voices.items()}, folder / "spk_dict.pt")
    with pytest.raises(CheckpointError, match=f"begins with token {bos_token}, but the model has"):
        OmniRuntime.open(folder, device="cpu")


def test_cuda_without_a_card_is_a_backend_error(demo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendError, match="not available"):
        OmniRuntime.open(demo, device="cuda")


def test_a_given_text_is_spoken_word_for_word(omni: OmniRuntime):
    *_, finished = omni.speak("green river hello", speech=SPEECH)
    assert finished.text == "green river hello"
    assert finished.finish_reason == "stop"
    assert finished.codec_ids


def test_a_recited_reply_is_spoken_as_a_generated_one_would_be(omni: OmniRuntime):
    """The same prompt, the same reply ids: the same codes."""
    asked = f"{RECITING}\n\nhello green river"
    *_, written = omni.generate([{"role": "user", "content": asked}], sampling=SHORT, speech=SPEECH)
    ids = (*written.text_ids, min(omni.stop_ids))
    *_, recited = omni._begin([{"role": "user", "content": asked}], SHORT, SPEECH, omni._voices["Chelsie"], None, ids)
    assert recited.text_ids[:7] == written.text_ids[:7]
    assert recited.codec_ids[:7] == written.codec_ids[:7]


def test_a_text_without_words_is_refused(omni: OmniRuntime):
    with pytest.raises(OptionError, match="nothing to say"):
        omni.speak("  \n")


@pytest.mark.parametrize(
    "options",
    [{"speech": False}, {"speech": True}, {"sampling": {"max_tokens": 3}}, {"media": {"fps": 1}}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_another_kind_are_refused_at_the_call(omni: OmniRuntime, options: dict[str, object]):
    (name,) = options
    for ask_for in (omni.generate, omni.plan):
        with pytest.raises(OptionError, match=rf"^{name} is .*, but must be \w+Params or None$"):
            ask_for(MESSAGES, **options)


def test_limits_of_another_kind_are_refused_before_a_model_is_looked_for():
    with pytest.raises(OptionError, match=r"limits is .* but must be Limits or None"):
        OmniRuntime.open("./none", limits={"kv": "int8"})
