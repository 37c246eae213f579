from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from lowvram.errors import LowVRAMError, OptionError
from lowvram.events import AudioChunk, Event, Finished, Progress, TextDelta
from lowvram.listeners import (
    Listener,
    ProgressLines,
    Speech,
    SpeechFile,
    SpeechPipe,
    TextReply,
    answer_record,
    event_record,
    follow,
    new_file,
    progress_amount,
    speech_to,
    speech_to_new_file,
    used_lines,
    write_text,
)

RATE_HZ = 24_000
FINISHED = Finished(
    "ab", (1, 2), (), 7, "stop", None, 0.0, RATE_HZ, timings={"total": 1.5}, memory={"kind": "not measured"}
)


def sound(seconds: float, start_s: float = 0.0) -> AudioChunk:
    return AudioChunk(np.zeros(round(seconds * RATE_HZ), np.float32), RATE_HZ, start_s)


class Noting(Listener):
    def __init__(self) -> None:
        self.seen: list[Event | str] = []

    def show(self, event: Event) -> None:
        self.seen.append(event)

    def close(self) -> None:
        self.seen.append("closed")


# Following


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Python's own Ctrl-C, which a test run in the background of a script would lack."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_every_listener_sees_every_event_in_order_and_is_closed():
    events = [TextDelta("a"), sound(0.1), FINISHED]
    one, two = Noting(), Noting()
    assert follow(iter(events), (one, two), cancel=lambda: None) == (FINISHED, False)
    assert one.seen == two.seen == [*events, "closed"]


def test_listeners_are_closed_when_an_answer_breaks_off():
    def events() -> Iterator[Event]:
        yield TextDelta("a")
        raise OptionError("broken")

    listener = Noting()
    with pytest.raises(OptionError):
        follow(events(), [listener], cancel=lambda: None)
    assert listener.seen == [TextDelta("a"), "closed"]


def test_the_first_ctrl_c_cancels_and_the_answer_is_followed_to_its_end():
    cancelled = []

    def events() -> Iterator[Event]:
        yield TextDelta("a")
        signal.raise_signal(signal.SIGINT)
        yield TextDelta("b")
        yield FINISHED

    listener = Noting()
    assert follow(events(), [listener], cancel=lambda: cancelled.append(True)) == (FINISHED, True)
    assert cancelled == [True] and TextDelta("b") in listener.seen


def test_the_second_ctrl_c_interrupts():
    def events() -> Iterator[Event]:
        yield TextDelta("a")
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield FINISHED

    with pytest.raises(KeyboardInterrupt):
        follow(events(), [], cancel=lambda: None)


def test_ctrl_c_before_the_first_event_interrupts():
    def events() -> Iterator[Event]:
        signal.raise_signal(signal.SIGINT)
        yield FINISHED

    with pytest.raises(KeyboardInterrupt):
        follow(events(), [], cancel=lambda: None)


def test_the_callers_signal_handler_is_back_afterwards():
    before = signal.getsignal(signal.SIGINT)
    follow(iter([TextDelta("a"), FINISHED]), [], cancel=lambda: None)
    assert signal.getsignal(signal.SIGINT) is before


# Text and progress


@pytest.mark.parametrize(("deltas", "written"), [(["a", "b"], "ab\n"), (["a\n"], "a\n"), ([], "")])
def test_text_ends_with_one_newline(deltas: list[str], written: str):
    out = io.StringIO()
    reply = TextReply(out)
    for delta in deltas:
        reply.show(TextDelta(delta))
    reply.close()
    assert out.getvalue() == written


def test_a_part_of_the_turn_gets_a_line_when_it_begins_and_one_when_it_is_done():
    out = io.StringIO()
    lines = ProgressLines(out)
    for event in [*(Progress("see", done, 40, "tokens") for done in (10, 20, 30, 40)), TextDelta("a")]:
        lines.show(event)
    assert out.getvalue() == "see: 10 of 40 tokens\nsee: 40 of 40 tokens\n"


def test_a_part_that_comes_again_begins_again():
    out = io.StringIO()
    lines = ProgressLines(out)
    for done in (1, 2, 1, 2):
        lines.show(Progress("load", done, 2))
    assert out.getvalue().count("load: 1 of 2") == 2


@pytest.mark.parametrize(
    ("progress", "amount"),
    [
        (Progress("see", 120, 768, "tokens"), "120 of 768 tokens"),
        (Progress("load", 2**30, 3 * 2**30, "bytes"), "1.00 GiB of 3.00 GiB"),
        (Progress("download", 2**20, None, "bytes"), "1.0 MiB"),
        (Progress("x", 0, 2), "0 of 2"),
    ],
)
def test_amounts_have_units_and_a_total_where_one_is_known(progress: Progress, amount: str):
    assert progress_amount(progress) == amount


class Failing(io.StringIO):
    """A stream that fails with a system's error number when it is flushed."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def flush(self) -> None:
        raise OSError(self._number, "as the system says")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EINVAL])
def test_a_reader_that_left_is_a_broken_pipe_on_every_system(number: int):
    with pytest.raises(BrokenPipeError):
        write_text("a", Failing(number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_text_that_cannot_be_written_is_one_sentence_with_the_systems_reason(number: int):
    with pytest.raises(LowVRAMError, match=r"the output cannot be written: as the system says \(make space"):
        write_text("a", Failing(number))


# Sound


def test_raw_sound_that_cannot_be_written_fails_as_text_does():
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(LowVRAMError, match="No space left on device"):
        SpeechPipe(Full()).show(sound(0.1))


def test_a_name_that_promises_another_format_is_refused(tmp_path: Path):
    with pytest.raises(OptionError, match=r"reply\.wav\.txt ends in \.txt"):
        speech_to(str(tmp_path / "reply.wav.txt"), io.StringIO())


@pytest.fixture
def impatient() -> Iterator[None]:
    """A test that waits for longer than 10 s fails, where it would hang."""

    def give_up(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="only POSIX has pipes in folders")
def test_a_named_pipe_is_refused_without_waiting_for_its_reader(tmp_path: Path, impatient: None):
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(
        OptionError, match=r"pipe\.wav is a pipe, but a sound file is written in place \(raw sound: -o -"
    ):
        speech_to(str(tmp_path / "pipe.wav"), io.StringIO())


@pytest.mark.skipif(os.name == "nt", reason="links to nowhere take rights that a user of Windows lacks")
def test_a_link_to_nowhere_is_left_to_its_owner(tmp_path: Path):
    (tmp_path / "reply.wav").symlink_to(tmp_path / "elsewhere.wav")
    speech_to(str(tmp_path / "reply.wav"), io.StringIO())
    assert (tmp_path / "reply.wav").is_symlink()


def test_a_line_that_is_no_progress_is_said_as_it_is():
    out = io.StringIO()
    ProgressLines(out).say("warning: long")
    assert out.getvalue() == "warning: long\n"


def test_a_new_file_is_counted_up_past_what_is_there(tmp_path: Path):
    (tmp_path / "reply.wav").mkdir()
    assert [new_file(tmp_path / "reply.wav").name for _ in range(2)] == ["reply-2.wav", "reply-3.wav"]


def test_two_answers_at_once_share_no_file(tmp_path: Path):
    both = [speech_to_new_file(tmp_path / "reply.wav") for _ in range(2)]
    assert not list(tmp_path.iterdir())  # until there is sound
    for number, speech in enumerate(both, start=1):
        speech.show(sound(number))
        speech.close()
    assert [soundfile.info(str(speech.written_to)).duration for speech in both] == [1, 2]


def test_a_folder_that_takes_no_new_file_is_refused_before_there_is_any_sound(tmp_path: Path):
    with pytest.raises(OptionError, match=r"reply\.wav cannot be written: No such file or directory"):
        speech_to_new_file(tmp_path / "gone" / "reply.wav")


def test_a_speech_file_is_made_with_the_first_sound_and_whole_after_every_chunk(tmp_path: Path):
    path = tmp_path / "reply.wav"
    speech = SpeechFile(path)
    speech.show(TextDelta("a"))
    assert (path.exists(), speech.written_to) == (False, None)
    for chunks in (1, 2):
        speech.show(sound(0.5))
        assert soundfile.info(path).frames == chunks * RATE_HZ // 2
    speech.close()
    assert speech.written_to == str(path)


def test_a_kind_that_is_complete_at_its_end_is_whole_when_its_listener_is_closed(tmp_path: Path):
    speech = SpeechFile(tmp_path / "reply.flac")
    for _ in range(2):
        speech.show(sound(0.5))
    speech.close()
    assert soundfile.info(tmp_path / "reply.flac").frames == RATE_HZ


@pytest.mark.parametrize("ending", ["flac", "ogg", "mp3"])
def test_what_there_is_at_the_second_ctrl_c_can_be_read(tmp_path: Path, ending: str):
    def events() -> Iterator[Event]:
        yield sound(0.5)
        yield sound(0.5)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield FINISHED

    with pytest.raises(KeyboardInterrupt):
        follow(events(), [SpeechFile(tmp_path / f"reply.{ending}")], cancel=lambda: None)
    assert soundfile.info(tmp_path / f"reply.{ending}").frames == RATE_HZ


@pytest.mark.parametrize("name", ["reply.wav", "reply.flac"])
def test_a_disk_that_fills_up_is_a_failure_for_afterwards(tmp_path: Path, name: str):
    (tmp_path / name).symlink_to("/dev/full")
    speech = SpeechFile(tmp_path / name)
    for _ in range(9):
        speech.show(sound(60))
    speech.close()
    assert isinstance(speech.failure, LowVRAMError) and name in str(speech.failure)


def test_speech_with_no_sound_in_it_is_a_valid_empty_file(tmp_path: Path):
    speech = SpeechFile(tmp_path / "reply.wav")
    speech.show(sound(0))
    speech.close()
    assert soundfile.info(tmp_path / "reply.wav").frames == 0


def test_raw_sound_is_kept_from_a_terminal():
    terminal = io.TextIOWrapper(io.BytesIO())
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with pytest.raises(OptionError, match="terminal"):
        speech_to("-", terminal)


# Records


def test_a_sound_is_told_by_its_place_and_length():
    assert event_record(sound(0.5, start_s=2.0)) == {"event": "audio", "start_s": 2.0, "seconds": 0.5, "is_last": False}


def record(finished: Finished = FINISHED, sounds: Sequence[Speech] = (), **memory: object) -> dict:
    return answer_record(
        replace(finished, memory=memory),
        model="m",
        device="GPU",
        kernel="k",
        sounds=sounds,
        speech_mode="balanced",
        peak_resident_bytes=3 * 2**30,
    )


SPOKEN = replace(FINISHED, audio_s=2.0, audio_rtf=0.5, audio_underrun_s=0.25)


def heard(*, path: str | None, played: bool) -> Speech:
    speech = Speech()
    speech.written_to, speech.was_played = path, played
    return speech


def test_a_record_tells_how_speech_was_made_and_how_far_behind_it_was():
    told = record(SPOKEN, [heard(path=None, played=True), heard(path="reply.wav", played=False)], kind="not measured")
    assert told["audio"] == {
        "path": "reply.wav", "played": True, "mode": "balanced", "seconds": 2.0, "sample_rate_hz": RATE_HZ
    }  # fmt: skip
    assert (told["audio_rtf"], told["audio_underrun_s"]) == (0.5, 0.25)


def test_speech_that_went_nowhere_is_null():
    assert record(SPOKEN, [heard(path=None, played=False)], kind="not measured")["audio"] is None


@pytest.mark.parametrize(
    ("path", "played", "where"),
    [
        ("reply.wav", False, "to reply.wav"),
        (None, True, "to the loudspeaker"),
        ("reply.wav", True, "to the loudspeaker and reply.wav"),
    ],
)
def test_people_are_told_where_sound_went_and_whether_it_was_fast_enough(path: str | None, played: bool, where: str):
    *_, place, pace = used_lines(record(SPOKEN, [heard(path=path, played=played)], kind="not measured"))
    assert place.startswith("speech: 2.00 s, balanced") and place.endswith(where)
    assert "0.50 s of work per second" in pace and "waited 0.25 s" in pace


def test_a_measured_peak_is_told_with_its_phase_and_how_it_was_counted():
    told = used_lines(record(kind="device allocator", peak_bytes={"think": 2**30, "sound": 2**20}))[1]
    assert "1.00 GiB in phase think (device allocator)" in told and "resident" not in told


def test_without_a_measured_peak_the_process_is_told_as_what_it_is():
    told = used_lines(record(kind="not measured", peak_bytes={}))[1]
    assert "3.00 GiB (process resident set)" in told
