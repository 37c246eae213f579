"""What was typed -> a refusal of what contradicts itself, has no effect or is empty, by the flags' own names.

Options that would silently do nothing are refused as well: whoever typed them expected something.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .checkpoint import DEFAULT_MODEL, DEMO
from .errors import OptionError

ABOUT_SPEECH = (
    "--output",
    "--play",
    "--voice",
    "--max-codes",
    "--max-seconds",
    "--speech-mode",
    "--speech-temperature",
    "--steps",
    "--guidance",
    "--solver",
    "--speech-dtype",
    "--chunk-seconds",
)
ABOUT_PICTURES = ("--fps", "--max-frames", "--max-pixels", "--no-video-sound")
ABOUT_CUTS = ("--start", "--end")
KINDS_OF_STAND_INS = {"--video-seconds": "video", "--audio-seconds": "audio", "--images": "image"}
STAND_INS = tuple(KINDS_OF_STAND_INS)
ABOUT_THINKING = ("--prompt", "--system", "--max-tokens", "--temperature", "--top-k", "--top-p")

CONTRADICTIONS = (
    *(("--no-speech", option) for option in ABOUT_SPEECH),
    ("--max-codes", "--max-seconds"),
    *(("--speak", option) for option in ("media", *ABOUT_THINKING, "--no-speech", "--dry-run", "--plan")),
    ("--quiet", "--verbose"),
    ("--json", "--ndjson"),
    ("--json", "--output -"),
    ("--ndjson", "--output -"),
    ("--dry-run", "--plan"),
    ("--ndjson", "--dry-run"),
    ("--ndjson", "--plan"),
    ("--gpu", "--device"),
    *(("--trace", option) for option in ("--device", "--kernel")),
)
"""Pairs of which at most one can be given. Raw sound and JSON would both want stdout; only an answer has events."""

A_HUB_MODEL = "a --model on the hub"
A_DRAW = "a --temperature above 0"
MEDIA_OR_STAND_INS = "media"
MEDIA_TO_READ = "media to cut"
A_PICTURE = "--video-seconds or --images"
PREREQUISITES_BUT_MEDIA = (
    ("--top-k", A_DRAW),
    ("--top-p", A_DRAW),
    ("--size", A_PICTURE),
    ("--revision", A_HUB_MODEL),
)
PREREQUISITES = (
    *((option, MEDIA_OR_STAND_INS) for option in ABOUT_PICTURES),
    *((option, MEDIA_TO_READ) for option in ABOUT_CUTS),
    *PREREQUISITES_BUT_MEDIA,
)
"""Options that mean something only beside another."""

MOVING, SOUNDING, SEEN = ("video",), ("video", "audio"), ("video", "image")
ABOUT_KINDS = {
    "--start": SOUNDING,
    "--end": SOUNDING,
    "--fps": MOVING,
    "--max-frames": MOVING,
    "--no-video-sound": MOVING,
    "--max-pixels": SEEN,
}
"""The kinds of media, one of which an option is about."""
A_KIND = {"video": "a video", "audio": "a sound", "image": "a picture"}

IN_A_CHAT = (*PREREQUISITES_BUT_MEDIA, ("--voice", "--play"))
"""The same of a chat, where media may come later, and which is silent unless it is played."""

MAY_BE_EMPTY = ("--prompt", "--system")

TYPED_AS = {
    "chunk_s": "--chunk-seconds",
    "mode": "--speech-mode",
    "prefill_chunk_tokens": "--prefill-chunk",
    "video_s": "--video-seconds",
    "audio_s": "--audio-seconds",
}
"""Fields of options whose flag has another name."""


def refuse(typed: Mapping[str, Any], prerequisites: Sequence[tuple[str, str]] = PREREQUISITES) -> None:
    """Raise OptionError for what cannot be meant. `typed` is what was, by the longest name of each, "media" for the
    arguments; an option that is left at its default was not typed. Some commands have `prerequisites` of their own."""
    given = {*typed, *_conditions(typed)}
    for one, other in CONTRADICTIONS:
        if {one, other} <= given:
            raise OptionError(f"{one} and {other} contradict each other", hint="give one of them")
    for option, needed in prerequisites:
        if option in given and needed not in given:
            raise OptionError(f"{option} has no effect without {needed}", hint=f"leave {option} out")
    for option, value in typed.items():
        if value == "" and option not in MAY_BE_EMPTY:
            raise OptionError(f"{option} is empty: 0 characters", hint="give it a value, or leave it out")


def refuse_for_media(typed: Mapping[str, Any], kinds: Iterable[str]) -> None:
    """Raise OptionError for an option about none of the media, which were found to be of these `kinds`, nor about what
    stands in for others; that is never cut."""
    found = set(kinds)
    stood_for = {kind for option, kind in KINDS_OF_STAND_INS.items() if option in typed}
    for option, meant in ABOUT_KINDS.items():
        concerned = found if option in ABOUT_CUTS else found | stood_for
        if option in typed and concerned.isdisjoint(meant):
            needed = " or ".join(A_KIND[kind] for kind in meant)
            raise OptionError(f"{option} has no effect without {needed}", hint=f"leave {option} out")


def refuse_to_overwrite(sources: Sequence[str], output: str | None) -> None:
    """An answer must not replace the question."""
    from .media.sources import local_path

    for path in map(local_path, sources):
        if output and path and os.path.exists(output) and os.path.exists(path) and os.path.samefile(path, output):
            raise OptionError(f"{output} is a medium to be read, and would be written over", hint="name another -o")


@contextmanager
def named_as_typed() -> Iterator[None]:
    """A complaint begins with the field that is wrong; here it begins with the flag."""
    try:
        yield
    except OptionError as error:
        field, _, complaint = str(error.args[0]).partition(" ")
        flag = TYPED_AS.get(field, f"--{field.replace('_', '-')}")
        raise OptionError(f"{flag} {complaint}", hint=error.hint) from error


def _conditions(typed: Mapping[str, Any]) -> Iterator[str]:
    """What the typed options amount to, in the words of the tables above."""
    if typed.get("--output") == "-":
        yield "--output -"
    if typed.get("media"):
        yield MEDIA_TO_READ
    if typed.get("media") or any(option in typed for option in STAND_INS):
        yield MEDIA_OR_STAND_INS
    if "--video-seconds" in typed or "--images" in typed:
        yield A_PICTURE
    if typed.get("--temperature", 0) > 0:
        yield A_DRAW
    if _is_on_hub(typed.get("--model", DEFAULT_MODEL)):
        yield A_HUB_MODEL


def _is_on_hub(model: str) -> bool:
    return model != DEMO and not os.path.isdir(os.path.expanduser(model))
