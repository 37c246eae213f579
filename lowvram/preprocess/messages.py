"""Chat messages as people write them -> checked messages of typed parts, each medium with its own options.

The chat formats of transformers, of OpenAI and of the official utilities are all understood, and a part of type "file",
which is what its content is. Nothing is opened here; whatever cannot be understood is an `OptionError` that names the
message and the part, counted from 1.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

from ..errors import MediaError, OptionError
from ..media.sources import Bytes, decode_base64
from ..options import DEFAULT_SYSTEM_PROMPT, MediaParams

if TYPE_CHECKING:
    from ..media import Kind
    from ..media.sources import Source

Said: TypeAlias = "Kind | Literal['file']"
"""What a part says it is: a kind of medium, or a file of any."""

ROLES = ("system", "user", "assistant")
KIND_OF_TYPE: Mapping[str, Said] = {
    "file": "file",
    "image": "image",
    "image_url": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "video",
    "video_url": "video",
}
SOURCE_KEYS: Mapping[Said, tuple[str, ...]] = {
    "file": ("file", "url", "path"),
    "image": ("image", "image_url", "url", "path"),
    "audio": ("audio", "audio_url", "input_audio", "url", "path"),
    "video": ("video", "video_url", "url", "path"),
}
OPTION_OF_KEY: Mapping[Said, Mapping[str, str]] = {
    "file": {},
    "image": {"min_pixels": "image_min_pixels", "max_pixels": "image_max_pixels"},
    "audio": {"audio_start": "start_s", "audio_end": "end_s"},
    "video": {
        "fps": "fps",
        "min_frames": "min_frames",
        "max_frames": "max_frames",
        "min_pixels": "min_pixels",
        "max_pixels": "max_pixels",
        "total_pixels": "total_pixels",
        "video_start": "start_s",
        "video_end": "end_s",
        "video_sound": "video_sound",
        "use_audio_in_video": "video_sound",
    },
}
"""The official utilities' keys, and the field of `MediaParams` each overrides for its part. They depend on the kind, so
that a file of any kind has none."""

SWITCHES = ("video_sound", "use_audio_in_video")
SIZE_KEYS = ("resized_height", "resized_width")


@dataclass(frozen=True)
class TextPart:
    """Words, taken as words: special tokens written in them are not obeyed."""

    text: str


@dataclass(frozen=True)
class MediaPart:
    """A medium still closed: what it is said to be, where it comes from and how to read it.

    `n_frames` and `size` (height, width), where not None, ask outright for what rules would otherwise decide.
    `where` names the part in errors.
    """

    kind: Said
    source: Source
    params: MediaParams
    where: str
    n_frames: int | None = None
    size: tuple[int, int] | None = None


Part = TextPart | MediaPart


@dataclass(frozen=True)
class Message:
    """One turn of the conversation: who speaks, and what."""

    role: str
    parts: tuple[Part, ...]


def read_messages(messages: Sequence[Mapping[str, object]], params: MediaParams) -> list[Message]:
    """Check a conversation and give every medium its options: `params`, then what its part says.

    The reference's system prompt is put in front where no system message leads.
    """
    if isinstance(messages, str | Bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise OptionError(
            "messages must be a list of at least 1 message", hint='such as [{"role": "user", "content": "Hello"}]'
        )
    read = [_message(message, f"message {index}", params) for index, message in enumerate(messages, start=1)]
    if read[0].role != "system":
        read.insert(0, Message("system", (TextPart(DEFAULT_SYSTEM_PROMPT),)))
    return read


def with_kinds(chat: Sequence[Message], kinds: Iterable[Kind]) -> list[Message]:
    """The chat with its media, in order, called what their content is."""
    found = iter(kinds)

    def known(part: Part) -> Part:
        return replace(part, kind=next(found)) if isinstance(part, MediaPart) else part

    return [replace(message, parts=tuple(map(known, message.parts))) for message in chat]


def _message(message: object, where: str, params: MediaParams) -> Message:
    if not isinstance(message, Mapping):
        raise OptionError(f"{where} is of type {type(message).__name__}, but must have the keys role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise OptionError(f"{where} has the role {role!r}", hint=f"one of: {', '.join(ROLES)}")
    if isinstance(content, str):
        return Message(role, (_text(content, where),))
    if not isinstance(content, Sequence) or isinstance(content, Bytes) or not content:
        raise OptionError(f"{where} has no content", hint="a string, or a list of at least 1 part")
    return Message(role, tuple(_part(part, f"{where}, part {n}", params) for n, part in enumerate(content, start=1)))


def _part(part: object, where: str, params: MediaParams) -> Part:
    if isinstance(part, str):
        return _text(part, where)
    if not isinstance(part, Mapping):
        raise OptionError(f"{where} is of type {type(part).__name__}, but must be a string or have the key type")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise OptionError(f"{where} has no text", hint='{"type": "text", "text": "…"}')
        return _text(cast(str, part["text"]), where)
    if not isinstance(kind, str) or kind not in KIND_OF_TYPE:
        raise OptionError(f"{where} has the type {kind!r}", hint=f"one of: text, {', '.join(KIND_OF_TYPE)}")
    return _media_part(part, KIND_OF_TYPE[kind], where, params)


def _text(words: str, where: str) -> TextPart:
    """Refuses half characters (lone surrogates), as a terminal with another encoding passes them on."""
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"{where} is not text at character {error.start + 1}", hint="write it in UTF-8") from error
    return TextPart(words)


def _media_part(part: Mapping[str, object], kind: Said, where: str, params: MediaParams) -> MediaPart:
    keys = [key for key in SOURCE_KEYS[kind] if part.get(key) is not None]
    if len(keys) != 1:
        found = " and ".join(keys) or "no source"
        raise OptionError(f"{where} ({kind}) has {found}", hint=f"exactly one of: {', '.join(SOURCE_KEYS[kind])}")
    options = {k: v for k, v in part.items() if v is not None and k not in ("type", *SOURCE_KEYS[kind])}
    _check_options(options, kind, where)
    n_frames = options.pop("nframes", None)
    if n_frames is not None and "fps" in options:
        raise OptionError(f"{where} has both fps and nframes, which contradict each other", hint="give one of them")
    size = tuple(options.pop(key) for key in SIZE_KEYS if key in options)
    if len(size) == 1:
        raise OptionError(f"{where} has one of {' and '.join(SIZE_KEYS)}", hint="give both or neither")
    return MediaPart(
        kind,
        _source(part[keys[0]], where),
        _override(params, {OPTION_OF_KEY[kind][key]: value for key, value in options.items()}, where),
        where,
        cast(int | None, n_frames),
        cast(tuple[int, int], size) or None,
    )


def _check_options(options: Mapping[str, object], kind: Said, where: str) -> None:
    """Every key is known for this kind, every switch a bool, every other value a positive number (0 for a start)."""
    sizes = SIZE_KEYS if kind in ("image", "video") else ()
    known = [*OPTION_OF_KEY[kind], *(("nframes",) if kind == "video" else ()), *sizes]
    for key, value in options.items():
        if key not in known:
            hint = f"known: {', '.join(known)}" if known else "options need a type: video, audio or image"
            raise OptionError(f"{where} ({kind}) has the unknown key {key!r}", hint=hint)
        if key in SWITCHES:
            if not isinstance(value, bool):
                raise OptionError(f"{where} has {key} {value!r}, but must be true or false")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise OptionError(f"{where} has {key} {value!r}, but must be a number")
        elif key in ("nframes", *SIZE_KEYS) and not (isinstance(value, int) and value >= 1):
            raise OptionError(f"{where} has {key} {value!r}, but must be a whole number of at least 1")


def _override(params: MediaParams, options: Mapping[str, object], where: str) -> MediaParams:
    try:
        return replace(params, **cast(dict, options))
    except OptionError as error:
        raise OptionError(f"{where}: {error.args[0]}", hint=error.hint) from error


def _source(value: object, where: str) -> Source:
    """The medium itself, out of OpenAI's wrappings: {"url": …} or {"data": base64, "format": …}."""
    if not isinstance(value, Mapping):
        return cast("Source", value)
    if isinstance(value.get("url"), str):
        return cast(str, value["url"])
    if not isinstance(value.get("data"), str):
        raise OptionError(f"{where} has a source without url or data", hint='{"url": "…"} or {"data": "base64 …"}')
    try:
        return decode_base64(value["data"].encode(errors="replace"))
    except binascii.Error as error:
        raise MediaError(f"{where} has data that is not base64: {error}", path=where) from error
