from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer
from media_files import numbered_frame, sine, write_sound, write_video
from PIL import Image
from sound_card import SoundCard
from typer.testing import CliRunner, Result

from lowvram import __version__
from lowvram.cli import app, main
from lowvram.offload.plan import Plan
from lowvram.options import SamplingParams
from lowvram.playback import SpeechPlayed
from lowvram.runtime import OmniRuntime

CHECKOUT = Path(__file__).parent.parent
PROGRAM = (sys.executable, str(CHECKOUT / "cli.py"))
BRIEF = ("--max-tokens", "4", "--max-codes", "12", "--steps", "2", "--seed", "1")
FOUR = SamplingParams(max_tokens=4)
IN_TEXT = ("--max-tokens", "4", "--seed", "1", "--no-speech")


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a sound and a video whose names say nothing, and media that are none."""
    folder = tmp_path_factory.mktemp("media")
    Image.new("RGB", (112, 112), "green").save(folder / "picture.bin", format="PNG")
    write_sound(folder / "sound.bin", sine(16_000, 0.5)[None], 16_000, "pcm_s16le", file_format="wav")
    clip = write_video(folder / "clip.mp4", [numbered_frame(n) for n in range(8)], fps=4, sound=sine(48_000, 2.0))
    content = clip.rename(folder / "video.bin").read_bytes()
    begin, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    (folder / "truncated.bin").write_bytes(content[: len(content) // 2])
    (folder / "frameless.bin").write_bytes(content[:begin] + bytes(end - begin) + content[end:])
    (folder / "text.bin").write_text("I am no picture")
    (folder / "empty.bin").touch()
    Image.new("1", (20_000, 14_000)).save(folder / "huge.bin", format="PNG")
    return folder


@pytest.fixture(autouse=True)
def folder(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in: its own for every test, with the media in it."""
    shutil.copytree(media, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lowvram(*arguments: str | Path, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def environment(**more: str) -> dict[str, str]:
    """A shell's, without what would hide how streams are buffered."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**inherited, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", **more}


# An answer


def test_words_go_to_stdout_and_speech_to_a_wav_file_in_the_current_folder(demo: Path, folder: Path):
    done = lowvram("run", "-p", "hello", "--model", demo, *BRIEF)
    assert (done.exit_code, done.stdout.count("\n"), len(done.stdout.split())) == (0, 1, 4)
    sound = soundfile.info(folder / "reply.wav")
    assert (sound.samplerate, sound.channels, sound.subtype, sound.frames) == (24_000, 1, "PCM_16", 12 * 480)


def test_older_speech_stays_unless_its_name_is_given(demo: Path, folder: Path):
    (folder / "reply.wav").write_bytes(b"older speech")
    done = lowvram("run", "-p", "hello", "--model", demo, *BRIEF)
    assert done.stderr.splitlines()[-2].endswith("to reply-2.wav")
    assert (folder / "reply.wav").read_bytes() == b"older speech"
    assert lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "-o", "reply.wav").exit_code == 0
    assert (folder / "reply.wav").read_bytes() == (folder / "reply-2.wav").read_bytes()


def test_an_answer_never_replaces_the_question(demo: Path, folder: Path):
    question = (folder / "sound.bin").rename(folder / "sound.wav")
    before = question.read_bytes()
    done = lowvram("run", "sound.wav", "--model", demo, *BRIEF, "-o", "./sound.wav")
    assert done.exit_code == 2
    assert "would be written over" in done.stderr
    assert question.read_bytes() == before


def test_words_survive_a_full_disk_that_sound_does_not(demo: Path):
    done = lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "-o", "/dev/full", "--json")
    assert done.exit_code == 1
    assert "No space left" in done.stderr
    told = json.loads(done.stdout)
    assert told["text"] and told["finish_reason"] == "length" and "No space left" in told["error"]["message"]


def test_json_is_one_object_with_the_whole_answer(demo: Path):
    done = lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "--json", "-o", "said.wav")
    answer = json.loads(done.stdout)
    assert (len(answer["text_ids"]), len(answer["codec_ids"])) == (4, 12)
    said = {"path": "said.wav", "played": False, "mode": "exact", "seconds": 12 * 0.02, "sample_rate_hz": 24_000}
    assert answer["audio"] == said
    assert answer["audio_rtf"] > 0 and answer["audio_underrun_s"] >= 0
    assert (answer["finish_reason"], answer["speech_finish_reason"], answer["model"]) == ("length", "length", str(demo))
    assert answer["prompt_tokens"] > 1 and answer["timings"]["total"] > 0
    assert answer["error"] is None
    assert answer["memory"]["kind"] == "not measured" and answer["memory"]["process_peak_resident_bytes"] > 2**20


def test_json_of_an_answer_that_cannot_be_made_says_why(demo: Path):
    done = lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "--vram", "100KiB", "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["text"], told["audio"]) == (4, "", None)
    assert told["error"]["exit_code"] == 4 and told["error"]["message"] in done.stderr


def test_ndjson_tells_every_event_and_then_the_whole_answer(demo: Path):
    done = lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "--ndjson")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    *before, last = events
    assert last["event"] == "finished" and {event["event"] for event in before} == {"progress", "text", "audio"}
    assert "".join(event["text"] for event in before if event["event"] == "text") == last["text"]
    assert sum(event["seconds"] for event in before if event["event"] == "audio") == last["audio"]["seconds"]


def test_raw_sound_on_stdout_is_the_wav_files_and_moves_the_words_to_stderr(demo: Path, folder: Path):
    filed = lowvram("run", "-p", "hello", "--model", demo, *BRIEF)
    piped = lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "-o", "-", "--quiet")
    samples, _ = soundfile.read(folder / "reply.wav", dtype="int16")
    assert np.array_equal(np.frombuffer(piped.stdout_bytes, "<i2"), samples)
    assert piped.stderr == filed.stdout


def test_without_speech_nothing_is_written(demo: Path, folder: Path):
    done = lowvram("run", "-p", "hello", "--model", demo, *IN_TEXT, "--json")
    answer = json.loads(done.stdout)
    assert (answer["audio"], answer["codec_ids"], answer["speech_finish_reason"]) == (None, [], None)
    assert not (folder / "reply.wav").exists()


def test_a_seed_repeats_a_drawn_answer_and_another_seed_does_not(demo: Path):
    drawn = ("run", "-p", "hello", "--model", demo, *BRIEF, "--temperature", "2", "--json")
    one, same, other = (json.loads(lowvram(*drawn, *more).stdout) for more in ((), (), ("--seed", "2")))
    assert (one["text_ids"], one["codec_ids"]) == (same["text_ids"], same["codec_ids"])
    assert (one["text_ids"], one["codec_ids"]) != (other["text_ids"], other["codec_ids"])


@pytest.fixture(scope="session")
def usual_speech(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("speech") / "reply.wav"
    lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "-o", path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        ("--voice", "Ethan"),
        ("--speech-temperature", "0"),
        ("--steps", "3"),
        ("--guidance", "0"),
        ("--solver", "rk4"),
        ("--dtype", "float32"),
        ("--temperature", "2"),
    ],
    ids=" ".join,
)
def test_an_option_is_heard(demo: Path, folder: Path, usual_speech: bytes, flags: tuple[str, ...]):
    assert lowvram("run", "-p", "hello", "--model", demo, *BRIEF, *flags).exit_code == 0
    assert (folder / "reply.wav").read_bytes() != usual_speech


@pytest.mark.parametrize("narrow", [("--top-k", "1"), ("--top-p", "1e-6")], ids=" ".join)
def test_drawing_from_one_token_is_greedy(demo: Path, narrow: tuple[str, ...]):
    # In bfloat16 the two likeliest tokens can tie, and both are then drawn from, as the reference does.
    ask = ("run", "-p", "hello", "--model", demo, *IN_TEXT, "--dtype", "float32")
    assert lowvram(*ask, "--temperature", "2", *narrow).stdout == lowvram(*ask).stdout


def test_chunk_seconds_set_how_much_sound_comes_at_a_time(demo: Path):
    ask = ("run", "-p", "hello", "--model", demo, *BRIEF, "--max-codes", "36", "--chunk-seconds", "0.24", "--ndjson")
    events = [json.loads(line) for line in lowvram(*ask).stdout.splitlines()]
    assert len([event for event in events if event["event"] == "audio" and event["seconds"]]) > 1


def test_quiet_says_nothing_on_stderr(demo: Path):
    assert lowvram("run", "-p", "hello", "--model", demo, *IN_TEXT, "--quiet").stderr == ""


def test_stderr_tells_progress_in_a_few_lines_then_what_was_used_and_where_speech_went(demo: Path):
    lines = lowvram("run", "-p", "hello", "--model", demo, *BRIEF).stderr.splitlines()
    progress, summary = ["load:", "load:", "condition:", "prefill:"], ["used:", "used:", "speech:", "speech:"]
    assert [line.split()[0] for line in lines] == [*progress, *summary]
    assert "4 text tokens, 12 codes" in lines[4] and "process resident set" in lines[5] and "reply.wav" in lines[6]


def test_the_demos_words_are_called_gibberish(demo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowvram.demo.demo_folder", lambda: demo)
    assert "gibberish" in lowvram("run", "-p", "hello", "--model", "demo", *IN_TEXT).stderr


def test_a_text_is_read_aloud_with_its_own_words(demo: Path, folder: Path):
    read = ("run", "--model", demo, "--seed", "1", "--max-seconds", "0.2", "--steps", "2", "--json")
    named = json.loads(lowvram(*read, "--speak", "rain on the hill", "-o", "named.wav").stdout)
    piped = json.loads(lowvram(*read, "--speak", "-", "-o", "piped.wav", stdin=b"rain on the hill\n").stdout)
    assert named["text"] == piped["text"] == "rain on the hill"
    assert 0 < len(named["codec_ids"]) <= 10
    assert (folder / "named.wav").read_bytes() == (folder / "piped.wav").read_bytes()


def test_an_empty_text_is_not_read_aloud(demo: Path):
    done = lowvram("run", "--model", demo, "--speak", "-", stdin=b"\n")
    assert (done.exit_code, "nothing to say" in done.stderr) == (2, True)


@pytest.mark.parametrize("ending", ["flac", "ogg", "mp3"])
def test_speech_goes_to_the_kind_of_file_that_is_named(demo: Path, folder: Path, ending: str):
    assert lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "-o", f"reply.{ending}").exit_code == 0
    sound = soundfile.info(folder / f"reply.{ending}")
    assert (sound.samplerate, sound.channels, sound.frames) == (24_000, 1, 12 * 480)
    assert ending.upper() in sound.format or "MPEG" in sound.format


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SoundCard:
    """The machine's loudspeaker."""
    card = SoundCard()
    monkeypatch.setattr("lowvram.playback.open_loudspeaker", lambda: SpeechPlayed(card.start, card.tick))
    return card


def test_played_speech_is_balanced_and_in_no_file(demo: Path, folder: Path, card: SoundCard):
    done = lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "--play", "--json")
    audio = json.loads(done.stdout)["audio"]
    assert (audio["path"], audio["played"], audio["mode"]) == (None, True, "balanced")
    assert len(card.sound) == 12 * 480 and np.any(card.sound) and not (folder / "reply.wav").exists()
    assert card.calls == ["stop", "close"]


def test_speech_that_is_also_written_is_exact_and_the_same(demo: Path, folder: Path, card: SoundCard):
    done = lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "--play", "-o", "reply.wav", "--json")
    assert json.loads(done.stdout)["audio"]["mode"] == "exact"
    samples, _ = soundfile.read(folder / "reply.wav", dtype="float32")
    assert np.allclose(card.sound, samples, atol=1e-4)


def test_a_mode_that_is_named_holds_for_ears_too(demo: Path, card: SoundCard):
    told = lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "--play", "--speech-mode", "low-latency").stderr
    assert "low-latency, at 24000 Hz to the loudspeaker" in told


def test_ctrl_c_silences_what_is_being_heard_and_keeps_the_answer(
    demo: Path, monkeypatch: pytest.MonkeyPatch, card: SoundCard
):
    def interrupted(seconds: float) -> None:
        card.tick()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("lowvram.playback.open_loudspeaker", lambda: SpeechPlayed(card.start, interrupted))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "--play", "--json")
    signal.signal(signal.SIGINT, before)
    assert (done.exit_code, len(card.heard), card.calls) == (130, 1, ["abort", "close"])
    assert json.loads(done.stdout)["audio"]["played"]


def test_a_machine_without_a_loudspeaker_is_told_before_the_model_is_looked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    done = lowvram("run", "-p", "hello", "--model", "./none", "--play")
    assert (done.exit_code, "pip install 'lowvram[play]'" in done.stderr) == (6, True)


# A chat


def test_a_chat_answers_line_by_line_and_remembers(demo: Path):
    chat = ("chat", "--model", demo, "--max-tokens", "4", "--dtype", "float32")
    done = lowvram(*chat, stdin=b"hello\n\nand then?\n/quit\nnever asked\n")
    first, second = done.stdout.splitlines()
    with OmniRuntime.open(demo, device="cpu", dtype="float32") as omni:
        said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
        *_, last = omni.generate([*said, {"role": "user", "content": "and then?"}], sampling=FOUR, speech=None)
    assert (done.exit_code, second) == (0, last.text)


def test_a_chat_begins_with_the_arguments_and_goes_on_after_a_mistake(demo: Path):
    chat = ("chat", "picture.bin", "-p", "what is it?", "--model", demo, "--max-tokens", "4")
    done = lowvram(*chat, stdin=b"/add missing.mp4\n/add sound.bin\nand this?\n")
    assert (done.exit_code, done.stdout.count("\n"), done.stderr.count("error: ")) == (0, 2, 1)
    assert "missing.mp4" in done.stderr and "see: " in done.stderr and "hear: " in done.stderr


@pytest.mark.parametrize(("remember", "times"), [("64MiB", 1), ("none", 2)])
def test_a_chat_looks_at_a_picture_once_if_it_may_remember(demo: Path, remember: str, times: int):
    chat = ("chat", "picture.bin", "-p", "what is it?", "--model", demo, "--max-tokens", "4", "--remember", remember)
    done = lowvram(*chat, stdin=b"and its name?\n")
    assert (done.exit_code, done.stdout.count("\n")) == (0, 2)
    assert len(re.findall(r"see: (\d+) of \1 tokens", done.stderr)) == times


def test_a_chat_can_be_heard(demo: Path, card: SoundCard):
    chat = ("chat", "-p", "hello", "--model", demo, "--max-tokens", "4", "--play", "--voice", "Ethan")
    assert lowvram(*chat, "--seed", "1").exit_code == 0
    assert np.any(card.sound)


def test_a_chat_takes_options_about_media_that_come_later(demo: Path):
    chat = ("chat", "--max-pixels", "3136", "--start", "1", "--model", demo, "--max-tokens", "4")
    done = lowvram(*chat, stdin=b"/add 'picture.bin'\nwhat is it?\n")
    assert (done.exit_code, "see: 4 of 4 tokens" in done.stderr, done.stdout.count("\n")) == (0, True, 1)


def test_a_voice_that_nobody_hears_is_refused_in_a_chat(demo: Path):
    assert "--voice has no effect without --play" in lowvram("chat", "--model", demo, "--voice", "Ethan").stderr


# Media


def test_media_are_told_apart_by_content_and_stay_in_order(demo: Path):
    shape = json.loads(
        lowvram("run", "video.bin", "picture.bin", "sound.bin", "--model", demo, "--dry-run", "--json").stdout
    )
    assert [medium["kind"] for medium in shape["media"]] == ["video", "image", "audio"]
    assert [medium["name"] for medium in shape["media"]] == ["video.bin", "picture.bin", "sound.bin"]


def test_a_dry_run_counts_the_tokens_that_the_answer_then_takes(demo: Path):
    shape = json.loads(lowvram("run", "video.bin", "-p", "hello", "--model", demo, "--dry-run", "--json").stdout)
    answer = json.loads(lowvram("run", "video.bin", "-p", "hello", "--model", demo, *IN_TEXT, "--json").stdout)
    assert shape["prompt_tokens"] == answer["prompt_tokens"]
    assert shape["video_tokens"] > 0 and shape["audio_tokens"] > 0


def test_a_dry_run_for_people_names_each_medium(demo: Path):
    lines = lowvram("run", "picture.bin", "--model", demo, "--dry-run").stdout.splitlines()
    assert "prompt tokens" in lines[0] and lines[1].split()[1:] == ["image", "picture.bin"]


def test_a_dry_run_needs_no_place_for_speech(demo: Path):
    assert lowvram("run", "-p", "hello", "--model", demo, "--dry-run", "-o", "nowhere/reply.wav").exit_code == 0


def test_a_dash_reads_a_medium_from_stdin(demo: Path, folder: Path):
    picture = (folder / "picture.bin").read_bytes()
    shape = json.loads(lowvram("run", "-", "--model", demo, "--dry-run", "--json", stdin=picture).stdout)
    assert [(medium["kind"], medium["name"]) for medium in shape["media"]] == [("image", "stdin")]


def count(demo: Path, media: Path, *flags: str) -> dict[str, int]:
    dry = ("run", media / "video.bin", media / "picture.bin", "--model", demo, "--fps", "4", "--dry-run", "--json")
    return json.loads(lowvram(*dry, *flags).stdout)


@pytest.fixture(scope="session")
def usual_count(demo: Path, media: Path) -> dict[str, int]:
    return count(demo, media)


@pytest.mark.parametrize(
    ("flags", "counted"),
    [
        (("--no-video-sound",), "audio_tokens"),
        (("--max-pixels", "784"), "video_tokens"),
        (("--max-pixels", "3136"), "image_tokens"),
        (("--start", "1"), "audio_tokens"),
        (("--start", "0:01"), "audio_tokens"),
        (("--end", "1"), "audio_tokens"),
        (("--fps", "2"), "video_tokens"),
        (("--max-frames", "4"), "video_tokens"),
        (("--max-frames", "2"), "video_tokens"),
    ],
)
def test_a_media_option_makes_the_prompt_shorter(
    demo: Path, media: Path, usual_count: dict[str, int], flags: tuple[str, ...], counted: str
):
    assert count(demo, media, *flags)[counted] < usual_count[counted]


def test_a_system_prompt_takes_the_place_of_the_references(demo: Path):
    dry = ("run", "-p", "hello", "--model", demo, "--dry-run", "--json")
    usual, short = (json.loads(lowvram(*dry, *more).stdout) for more in ((), ("--system", "x")))
    assert short["prompt_tokens"] < usual["prompt_tokens"] - 50


# The other commands


FOR_A_CPU = ("--device", "cpu", "--dtype", "bfloat16", "--json")


def test_a_plan_is_the_one_that_running_here_would_follow(demo: Path):
    asked = ("picture.bin", "-p", "hello", "--model", demo, "--vram", "64MiB", "--kv", "int8", "--max-seconds", "2")
    planned, here = (
        json.loads(lowvram(*command, *asked, *FOR_A_CPU).stdout) for command in (["plan"], ["run", "--plan"])
    )
    assert planned["fits"] and planned["peak_bytes"] <= 64 * 2**20 == planned["budget_bytes"]
    assert Plan.from_json(planned) == Plan.from_json(here)
    assert (planned["model"], planned["origin"]) == (here["model"], here["origin"])


def test_a_plan_is_for_the_turn_that_was_asked_for(demo: Path):
    asked = ("plan", "-p", "hello", "--model", demo, "--json")
    limits = ("--max-tokens", "7", "--max-codes", "9", "--prefill-chunk", "16")
    spoken, silent = (json.loads(lowvram(*asked, *more).stdout) for more in (limits, ("--no-speech",)))
    assert (spoken["text_tokens"], spoken["codes"], spoken["prefill_chunk_tokens"]) == (7, 9, 16)
    assert silent["codes"] == 0


def test_a_plan_without_a_question_is_the_runtimes_own(demo: Path):
    with OmniRuntime.open(demo, vram="64MiB", device="cpu", dtype="bfloat16") as omni:
        planned = lowvram("plan", "--model", demo, "--vram", "64MiB", *FOR_A_CPU).stdout
        assert Plan.from_json(json.loads(planned)) == omni.plan()


@pytest.mark.parametrize(
    "door", [("--plan",), ("--verbose", "--no-speech", "--max-tokens", "1")], ids=["plan", "run -v"]
)
def test_the_kernel_that_computes_is_told(demo: Path, door: tuple[str, ...]):
    done = lowvram("run", "-p", "hello", "--model", demo, "--kernel", "reference", "--device", "cpu", *door)
    assert "\nkernel reference on CPU, " in f"\n{done.output}"


def test_a_plan_for_people_names_its_kinds_of_figures(demo: Path):
    told = lowvram("plan", "-p", "hello", "--model", demo, "--gpu", "rtx-4070").stdout
    for part in (str(demo), "prompt tokens", "\nphase", "smallest budget for this turn: ", "\nexpected on rtx-4070"):
        assert part in told


def test_a_plan_for_a_card_has_what_a_desktop_leaves_of_its_memory_unless_told_otherwise():
    asked = ("plan", "--gpu", "RTX 3080 10GB", "--video-seconds", "60", "--json")
    usual, named = (json.loads(lowvram(*asked, *more).stdout) for more in ((), ("--vram", "8GiB")))
    assert (usual["budget_bytes"], named["budget_bytes"]) == (10 * 2**30 - 8 * 2**30 // 10, 8 * 2**30)
    assert usual["expectations"]["kind"] == "expected" and usual["expectations"]["card"] == "rtx-3080-10gb"
    assert usual["smallest_budget_bytes"] < usual["peak_bytes"] <= usual["budget_bytes"]
    assert {"thinker", "talker", "dit"} <= set(usual["placements"]) and len(usual["phases"]) > 1


def test_a_turn_that_does_not_fit_ends_a_plan_with_4_and_says_what_would_do():
    done = lowvram("plan", "--vram", "1GiB", "--video-seconds", "60", "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["fits"], told["short_of"], told["budget_bytes"]) == (4, False, "vram", 2**30)
    enough = lowvram("plan", "--vram", str(told["smallest_budget_bytes"]), "--video-seconds", "60")
    assert enough.exit_code == 0 and "smallest budget" in done.stderr


def test_a_turn_that_does_not_fit_is_told_alike_by_a_plan_and_by_what_would_run_it(demo: Path):
    asked = ("-p", "hello", "--model", demo, "--vram", "100KiB", *FOR_A_CPU)
    planned, here = (lowvram(*command, *asked) for command in (["plan"], ["run", "--plan"]))
    told = json.loads(here.stdout)
    assert (planned.exit_code, here.exit_code) == (4, 4)
    assert told == json.loads(planned.stdout) and told["reason"] in here.stderr
    assert (told["fits"], told["model"]) == (False, str(demo))


def test_a_host_that_is_too_small_is_told_from_a_card_that_is():
    done = lowvram("plan", "--vram", "16GiB", "--ram", "64MiB", "--json")
    assert (done.exit_code, json.loads(done.stdout)["short_of"]) == (4, "ram")


def test_stand_ins_take_the_place_of_media():
    asked = ("--video-seconds", "10", "--audio-seconds", "5", "--images", "2", "--size", "640x480", "--fps", "1")
    told = json.loads(lowvram("plan", *asked, "--json").stdout)
    assert [medium["kind"] for medium in told["media"]] == ["video", "audio", "image", "image"]
    assert told["media"][1]["tokens"] == 125 and told["prompt_tokens"] > sum(m["tokens"] for m in told["media"])


def test_voices_are_listed_with_the_usual_one_first(demo: Path):
    assert lowvram("voices", "--model", demo).stdout == "Chelsie\nEthan\n"
    assert json.loads(lowvram("voices", "--model", demo, "--json").stdout) == ["Chelsie", "Ethan"]


def test_doctor_names_versions_devices_and_the_kernel():
    report = json.loads(lowvram("doctor", "--json").stdout)
    assert report["lowvram"] == __version__ and {"torch", "transformers", "av"} <= set(report["packages"])
    assert report["devices"][0]["name"] == "cpu" and report["devices"][0]["kernel"]
    text = lowvram("doctor").stdout
    assert report["packages"]["torch"] in text and report["devices"][0]["kernel"] in text


def test_doctor_tells_of_compiled_kernels_and_compiles_none(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    report = json.loads(lowvram("doctor", "--json").stdout)
    assert not (folder / "cache").exists()
    assert report["devices"][0]["compiled"] in lowvram("doctor").stdout
    assert report["no_cuda"] == "" or report["kernel_with_cuda"]["kernel"] in ("int4-cuda", "reference")


def test_doctor_names_the_folders_of_models_of_the_demo_and_of_speech(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    folders = {found["what"]: found["path"] for found in json.loads(lowvram("doctor", "--json").stdout)["folders"]}
    assert list(folders) == ["models", "demo", "output"]
    assert (folders["demo"], folders["output"]) == (str(folder / "cache" / "lowvram"), str(folder))
    assert not list((folder / "cache").rglob("*.safetensors"))  # it looks, and builds no demo


def test_demo_model_writes_the_checkpoint_that_the_demo_builder_does(demo: Path, folder: Path):
    assert lowvram("demo-model", "new", "--tiny").exit_code == 0
    assert {file.name: file.read_bytes() for file in (folder / "new").iterdir()} == {
        file.name: file.read_bytes() for file in demo.iterdir()
    }


def test_the_demo_can_be_written_in_16_bit_and_quantized(folder: Path):
    assert lowvram("demo-model", "whole", "--tiny", "--16bit").exit_code == 0
    brief = ("--samples", "1", "--sample-tokens", "16", "--group-size", "32", "--device", "cpu")
    done = lowvram("quantize", "whole", "small", *brief)
    assert done.exit_code == 0, done.stderr
    assert json.loads((folder / "small" / "config.json").read_text())["quantization_config"]["bits"] == 4


def test_quantize_says_where_a_demo_in_16_bit_comes_from(folder: Path):
    done = lowvram("quantize", "demo", "small")
    assert (done.exit_code, "lowvram demo-model DIR --16bit" in done.stderr) == (2, True)
    assert not (folder / "small").exists()


def test_demo_model_says_why_a_folder_cannot_be_made():
    done = lowvram("demo-model", "a" * 300, "--tiny")
    assert (done.exit_code, "File name too long" in done.stderr) == (2, True)


def test_demo_model_leaves_a_folder_with_something_in_it_alone(folder: Path):
    done = lowvram("demo-model", folder, "--tiny")
    assert (done.exit_code, str(folder) in done.stderr) == (2, True)
    assert not (folder / "config.json").exists()


def test_help_version_and_a_missing_file_load_no_model_library():
    code = """
import sys
from lowvram.cli import app, main
for command in ("--help", "run --help", "--version", "run missing.mp4"):
    try:
        app(command.split())
    except SystemExit:
        print(command, sorted({"torch", "transformers", "huggingface_hub"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout.count(" []\n") == 4, done


def test_a_plan_of_a_video_and_words_loads_no_model_library(demo: Path):
    code = """
import sys
from lowvram.cli import app, main
try:
    app(["plan", "video.bin", "-p", "hello", "--gpu", "rtx-4070", *sys.argv[1:]])
finally:
    print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, "--model", str(demo)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done


# Errors


BAD_INPUT = {
    "no question": ((), 2, "lowvram run clip.mp4"),
    "missing file": (("missing.mp4",), 5, "missing.mp4"),
    "a folder": ((".",), 5, "folder"),
    "words for a name": (("What is this?",), 5, "words to be asked go after -p"),
    "words with an ending": (("Who is Dr. No?",), 5, "words to be asked go after -p"),
    "words that are too long for a name": (("What is this? " * 20,), 5, "words to be asked go after -p"),
    "not a medium": (("text.bin",), 5, "text.bin"),
    "zero bytes": (("empty.bin",), 5, "0 bytes"),
    "nothing left in the pipe": (("-", "-"), 5, "stdin"),
    "mp4 without its index": (("truncated.bin",), 5, "truncated.bin"),
    "video of 0 frames": (("frameless.bin",), 5, "frameless.bin"),
    "20,000-pixel picture": (("huge.bin",), 5, "huge.bin"),
    "address that refuses": (("http://127.0.0.1:9/clip.mp4",), 5, "127.0.0.1:9"),
    "broken data URL": (("data:image/png;base64,!",), 5, "base64"),
    "no output folder": (("-p", "x", "-o", "nowhere/reply.wav"), 2, "nowhere"),
    "output is a folder": (("-p", "x", "-o", "."), 2, "."),
    "output of another format": (("-p", "x", "-o", "reply.aac", "--model", "./none"), 2, ".flac"),
    "no space for the output": (("-p", "x", "-o", "/dev/full"), 1, "No space left"),
    "no such folder of a model": (("-p", "x", "--model", "./none"), 3, "none"),
    "no such model": (("-p", "x", "--model", "no such/model"), 3, "no such/model"),
    "unknown voice": (("-p", "x", "--voice", "Bob"), 2, "Chelsie"),
    "unknown device": (("-p", "x", "--device", "tpu"), 2, "tpu"),
    "unknown dtype": (("-p", "x", "--dtype", "int3"), 2, "int3"),
    "unknown kernel": (("-p", "x", "--kernel", "warp"), 6, "warp"),
    "unknown mode": (("-p", "x", "--speech-mode", "fast"), 2, "--speech-mode 'fast' is unknown (one of: exact"),
    "unknown precision": (("-p", "x", "--kv", "4bit"), 2, "--kv '4bit' is unknown (one of: 16bit"),
    "no RAM": (("-p", "x", "--ram", "0GiB"), 2, "0 bytes"),
    "unknown solver": (("-p", "x", "--solver", "magic"), 2, "euler"),
    "no number": (("-p", "x", "--max-tokens", "many"), 2, "--max-tokens"),
    "no size": (("-p", "x", "--vram", "8 apples"), 2, "8GiB"),
    "a size without its unit": (("-p", "x", "--vram", "8"), 2, "did you mean 8GiB?"),
    "budget too small": (("-p", "x", "--vram", "100KiB"), 4, "smallest budget"),
    "plan too small": (("-p", "x", "--vram", "100KiB", "--plan"), 4, "smallest budget"),
    "prompt too long": (("-p", "x", "--max-prompt-tokens", "3"), 2, "3"),
    "end before start": (("video.bin", "--start", "5", "--end", "1"), 2, "start"),
    "start after the end": (("video.bin", "--start", "99"), 5, "from 99 s on: it is 2.00 s long"),
    "start after the end of a sound": (("sound.bin", "--start", "99"), 5, "99 s and its end: it is 0.50 s long"),
    "start at infinity": (("video.bin", "--start", "inf"), 2, "--start is inf s"),
    "start that is no time": (("video.bin", "--start", "1:75"), 2, "--start is '1:75', but must be a time"),
    "a name that is too long for a sound": (("-p", "x", "-o", "a" * 300 + ".wav"), 2, "File name too long"),
    "end at infinity": (("video.bin", "--end", "inf"), 2, "end is inf s"),
    "end that is no number": (("video.bin", "--end", "nan"), 2, "end is nan s"),
    "a name that is too long": (("a" * 300 + ".mp4",), 5, "File name too long (check the path"),
    "a cut of a picture": (("picture.bin", "--start", "1"), 2, "--start has no effect without a video or a sound"),
    "frames of a sound": (("sound.bin", "--fps", "1"), 2, "--fps has no effect without a video"),
    "almost no frames": (("video.bin", "--fps", "1e-9"), 2, "0.01 frames/s"),
    "one frame": (("video.bin", "--max-frames", "1"), 2, "--max-frames is 1, but frames come in pairs"),
    "no codes": (("-p", "x", "--max-codes", "0"), 2, "--max-codes is 0"),
    "speech hotter than hot": (("-p", "x", "--speech-temperature", "inf"), 2, "--speech-temperature is inf"),
    "no chunk": (("-p", "x", "--chunk-seconds", "0"), 2, "--chunk-seconds is 0.0 s"),
    "no prefill": (("-p", "x", "--prefill-chunk", "0"), 2, "--prefill-chunk is 0"),
    "no voice": (("-p", "x", "--voice", ""), 2, "--voice is empty"),
    "no output": (("-p", "x", "-o", ""), 2, "--output is empty"),
    "no revision": (("-p", "x", "--revision", "", "--model", "owner/name"), 2, "--revision is empty"),
    "no path": (("video.bin", ""), 2, "the path of a medium is empty"),
    "negative seed": (("-p", "x", "--seed", "-1"), 2, "seed is -1"),
    "endless seed": (("-p", "x", "--seed", str(2**64)), 2, str(2**64 - 1)),
}


@pytest.mark.parametrize(("arguments", "exit_code", "says"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_ends_with_its_exit_code_and_one_sentence(
    demo: Path, arguments: tuple[str, ...], exit_code: int, says: str
):
    done = lowvram("run", "--model", demo, *BRIEF, "--quiet", *arguments)
    assert done.exit_code == exit_code, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr
    if says != "--max-tokens":
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "chat", "plan", "profile", "quantize"])
def test_help_names_every_flag_whole_in_a_narrow_terminal(command: str):
    told = subprocess.run(
        [sys.executable, "-m", "lowvram", command, "--help"],
        env=environment(COLUMNS="40"),
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    flags = {max(param.opts, key=len) for param in typer.main.get_command(app).commands[command].params}
    assert {flag for flag in flags if flag.startswith("--")} <= set(re.findall(r"--[a-z-]+", told))
    assert max(map(len, told.splitlines())) <= 50


@pytest.mark.parametrize("command", ["run", "plan"])
def test_what_contradicts_itself_is_refused_before_a_model_is_looked_for(command: str):
    done = lowvram(command, "-p", "x", "--model", "./none", "--no-speech", "--max-codes", "4096")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "error: --no-speech and --max-codes contradict each other (give one of them)\n"


@pytest.fixture(scope="session")
def long_prompt(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures of 16,384 tokens each: with the words beside them, more than models were trained on."""
    path = tmp_path_factory.mktemp("pictures") / "wall.png"
    Image.new("L", (3584, 3584)).save(path, compress_level=1)
    return [path, path]


def test_a_prompt_beyond_training_is_one_line_on_stderr_unless_quiet(demo: Path, long_prompt: list[Path]):
    ask = ("run", *long_prompt, "--model", demo, "--dry-run")
    warnings = lowvram(*ask).stderr
    assert warnings.startswith("warning: the prompt takes 32,9") and warnings.count("\n") == 1
    assert "trained on at most 32,768" in warnings
    assert lowvram(*ask, "--quiet").stderr == ""


def test_verbose_adds_where_an_error_came_from():
    done = lowvram("run", "missing.mp4", "--verbose")
    assert done.exit_code == 5 and "Traceback" in done.stderr and "\nerror: " in done.stderr


def test_a_place_for_speech_is_refused_before_the_model_is_looked_for():
    assert lowvram("run", "-p", "x", "--model", "./none", "-o", "nowhere/reply.wav").exit_code == 2


def test_a_turn_that_fails_leaves_older_speech_alone_and_makes_no_new_file(demo: Path, folder: Path):
    (folder / "old.wav").write_bytes(b"older speech")
    for output in ("old.wav", "new.wav"):
        assert lowvram("run", "-p", "x", "--model", demo, "--voice", "Bob", "-o", output).exit_code == 2
    assert (folder / "old.wav").read_bytes() == b"older speech"
    assert not (folder / "new.wav").exists()


def test_words_said_before_a_disk_is_full_stay_on_stdout(demo: Path):
    done = lowvram("run", "-p", "hello", "--model", demo, *BRIEF, "-o", "/dev/full")
    assert done.exit_code == 1 and done.stdout.strip() and done.stdout.endswith("\n")


# Signals and pipes


def test_the_first_ctrl_c_keeps_what_there_is(demo: Path, folder: Path):
    endless = ("--max-tokens", "20000", "--max-codes", "20000", "--temperature", "2", "--seed", "1", "--steps", "2")
    command = [*PROGRAM, "run", "-p", "hello", "--model", str(demo), *endless, "--ndjson"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as running:
        while json.loads(running.stdout.readline())["event"] != "audio":
            pass
        running.send_signal(signal.SIGINT)
        out, errors = running.communicate(timeout=60)
    answer = json.loads(out.splitlines()[-1])
    reasons = answer["finish_reason"], answer["speech_finish_reason"]
    assert (running.returncode, reasons) == (130, ("cancelled", "cancelled"))
    assert answer["text"] and "Traceback" not in errors and "[transformers]" not in errors
    assert soundfile.info(folder / "reply.wav").frames == round(answer["audio"]["seconds"] * 24_000) > 0


def test_ctrl_c_before_an_answer_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowvram.media.sources.open_stored", interrupted)
    done = lowvram("run", "video.bin")
    assert (done.exit_code, done.stderr) == (130, "")


def test_ctrl_c_before_a_command_begins_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowvram.cli.app", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_a_reader_that_left_ends_the_program_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*PROGRAM, "doctor"], stdout=writing, stderr=subprocess.PIPE, text=True, env=environment())
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "command", ["run -p hello --no-speech", "run -p hello -o -", "plan -p hello", "doctor", "--version"]
)
def test_a_full_disk_behind_stdout_is_one_sentence(demo: Path, command: str):
    flags = ["--model", str(demo), "--max-tokens", "4"] if "hello" in command else []
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*PROGRAM, *command.split(), *flags], stdout=full, stderr=subprocess.PIPE, text=True, env=environment()
        )
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert last.startswith("error: the output cannot be written: No space left")


def test_a_full_disk_behind_the_log_ends_no_answer(demo: Path):
    command = ["run", "-p", "hello", "--model", str(demo), "--max-tokens", "4", "--no-speech"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*PROGRAM, *command], stdout=subprocess.PIPE, stderr=full, text=True, env=environment())
        assert (done.returncode, len(done.stdout.split()) > 0) == (0, True)
        missing = subprocess.run([*PROGRAM, "run", "missing.mp4"], stderr=full, env=environment())
    assert missing.returncode == 5


def test_the_coldest_temperatures_and_the_largest_seed_answer(demo: Path):
    coldest = ("--temperature", "1e-45", "--speech-temperature", "1e-45", "--seed", str(2**64 - 1))
    assert lowvram("run", "-p", "hello", "--model", demo, *BRIEF, *coldest).exit_code == 0


def test_streams_are_utf_8_where_the_console_is_not():
    console = environment(PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    done = subprocess.run([*PROGRAM, "run", "日本.mp4"], capture_output=True, env=console)
    assert "日本.mp4" in done.stderr.decode("utf-8")


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [("--version", 0), ("doctor", 0), ("run missing.mp4", 5), ("run --bogus", 2), ("run -p hello -o said.wav", 0)],
)
def test_a_program_without_a_console_does_its_work(demo: Path, folder: Path, command: str, exit_code: int):
    """As pythonw on Windows starts it: there are no standard streams, not even closed ones."""
    arguments = [*command.split(), *(("--model", str(demo), *BRIEF) if "hello" in command else ())]
    code = "import sys; sys.stdin = sys.stdout = sys.stderr = None; from lowvram.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (exit_code, b"", b"")
    assert (folder / "said.wav").exists() == ("said.wav" in command)
