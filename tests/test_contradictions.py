from __future__ import annotations

from pathlib import Path

import pytest

from lowvram.contradictions import (
    ABOUT_SPEECH,
    CONTRADICTIONS,
    IN_A_CHAT,
    PREREQUISITES,
    named_as_typed,
    refuse,
    refuse_for_media,
    refuse_to_overwrite,
)
from lowvram.errors import OptionError
from lowvram.flags import Draw, Machine, Memory, Model, Question, Sight, StandIns, Target
from lowvram.speech_flags import Sound, Voice


@pytest.mark.parametrize(
    "typed",
    [
        *({"--no-speech": True, option: 1} for option in ABOUT_SPEECH),
        {"--max-codes": 4096, "--max-seconds": 82.0},
        *({"--speak": "a", option: 1} for option in ("--prompt", "--system", "--max-tokens", "--temperature")),
        {"--speak": "a", "media": ["clip.mp4"]},
        {"--speak": "a", "--no-speech": True},
        {"--speak": "a", "--dry-run": True},
        {"--speak": "a", "--plan": True},
        {"--quiet": True, "--verbose": True},
        {"--json": True, "--ndjson": True},
        {"--json": True, "--output": "-"},
        {"--ndjson": True, "--output": "-"},
        {"--dry-run": True, "--plan": True},
        {"--ndjson": True, "--dry-run": True},
        {"--ndjson": True, "--plan": True},
        {"--gpu": "rtx-4070", "--device": "cpu"},
    ],
    ids=" ".join,
)
def test_contradictions_are_refused_by_name_whatever_the_values(typed: dict[str, object]):
    one, other = typed
    with pytest.raises(OptionError, match=f"{one}.* and {other}.* contradict each other"):
        refuse(typed)


@pytest.mark.parametrize(
    ("typed", "needed"),
    [
        *(
            ({option: 1}, "media")
            for option in ("--fps", "--max-frames", "--max-pixels", "--no-video-sound", "--start", "--end")
        ),
        ({"--start": 0.0, "--video-seconds": 60.0}, "media to cut"),
        ({"--size": "640x480"}, "--video-seconds or --images"),
        ({"--size": "640x480", "--audio-seconds": 5.0}, "--video-seconds or --images"),
        ({"--top-k": 40}, "a --temperature above 0"),
        ({"--top-p": 0.9, "--temperature": 0.0}, "a --temperature above 0"),
        ({"--revision": "main", "--model": "demo"}, "a --model on the hub"),
    ],
)
def test_an_option_without_what_it_is_about_is_refused(typed: dict[str, object], needed: str):
    option = next(iter(typed))
    with pytest.raises(OptionError, match=rf"{option} has no effect without {needed}.* \(leave {option} out\)"):
        refuse(typed)


@pytest.mark.parametrize(
    "typed",
    [
        {},
        {"--fps": 1.0, "media": ["clip.mp4"]},
        {"--fps": 1.0, "--video-seconds": 60.0},
        {"--size": "640x480", "--images": 2},
        {"--top-k": 40, "--temperature": 0.7},
        {"--revision": "main"},
        {"--json": True, "--output": "reply.wav"},
        {"--play": True, "--output": "reply.wav"},
        {"--prompt": "", "--system": "", "media": ["clip.mp4"]},
    ],
    ids=" ".join,
)
def test_what_makes_sense_passes(typed: dict[str, object]):
    refuse(typed)


@pytest.mark.parametrize("source", ["{}", "file://{}", "FILE://localhost{}"])
def test_an_output_that_is_a_medium_is_refused_however_that_is_named(tmp_path: Path, source: str):
    path = tmp_path / "sound.wav"
    path.touch()
    with pytest.raises(OptionError, match="would be written over"):
        refuse_to_overwrite(["-", "data:,", source.format(path)], str(path))
    refuse_to_overwrite([source.format(path)], str(tmp_path / "new.wav"))


def test_in_a_chat_media_may_come_later_but_a_voice_needs_ears():
    refuse({"--fps": 1.0, "--start": "1:30", "--max-pixels": 784}, IN_A_CHAT)
    for typed in ({"--voice": "Ethan"}, {"--top-k": 40}):
        with pytest.raises(OptionError, match="has no effect without"):
            refuse(typed, IN_A_CHAT)


def test_a_revision_is_of_no_use_for_a_folder(tmp_path: Path):
    with pytest.raises(OptionError, match="--revision has no effect"):
        refuse({"--revision": "main", "--model": str(tmp_path)})


@pytest.mark.parametrize("option", ["--voice", "--output", "--revision", "--gpu", "--speak", "--kv"])
def test_an_empty_value_is_refused(option: str):
    with pytest.raises(OptionError, match=f"{option} is empty: 0 characters"):
        refuse({option: ""})


def test_every_option_of_the_tables_is_a_flag():
    groups = (Question, Draw, Voice, Sound, Sight, StandIns, Model, Memory, Machine, Target)
    flags = {f"--{name.replace('_', '-')}" for group in groups for name in group.__dataclass_fields__}
    others = {"--speak", "--json", "--ndjson", "--quiet", "--verbose", "--dry-run", "--plan", "--trace", "media"}
    told = {option for pair in CONTRADICTIONS for option in pair} | {option for option, _ in PREREQUISITES}
    assert told <= {*flags, *others, "--output -"}


def test_a_complaint_begins_with_the_flag_where_it_began_with_the_field():
    with pytest.raises(OptionError, match=r"^--chunk-seconds is 0\.0 s") as refused, named_as_typed():
        Sound(chunk_seconds=0.0).params()
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("option", "kinds", "needed"),
    [
        ("--start", ["image"], "a video or a sound"),
        ("--end", ["image", "image"], "a video or a sound"),
        ("--fps", ["image"], "a video"),
        ("--max-frames", ["audio"], "a video"),
        ("--no-video-sound", ["audio", "image"], "a video"),
        ("--max-pixels", ["audio"], "a video or a picture"),
    ],
)
def test_an_option_about_other_kinds_of_media_is_refused(option: str, kinds: list[str], needed: str):
    with pytest.raises(OptionError, match=rf"^{option} has no effect without {needed} \(leave {option} out\)$"):
        refuse_for_media({option: 1.0}, kinds)


@pytest.mark.parametrize(
    ("typed", "kinds"),
    [
        ({"--start": 0.0, "--fps": 1.0}, ["image", "video"]),
        ({"--end": 9.0}, ["audio"]),
        ({"--max-pixels": 10_000}, ["image"]),
        ({"--fps": 1.0, "--video-seconds": 60.0}, []),
        ({"--max-pixels": 10_000, "--images": 2}, ["audio"]),
    ],
)
def test_an_option_about_one_of_several_media_passes(typed: dict[str, object], kinds: list[str]):
    refuse_for_media(typed, kinds)


def test_a_stand_in_is_not_cut():
    with pytest.raises(OptionError, match="--start has no effect"):
        refuse_for_media({"--start": 5.0, "--video-seconds": 60.0}, ["image"])
