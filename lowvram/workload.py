"""Messages, and media that nobody has yet, -> the work of a turn, counted before a model is loaded and without torch.

Media are measured as a prompt's are. Text is counted by the checkpoint's own tokenizer where that is on this disk, and
estimated where it is not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from .checkpoint import Headers
from .demo.config import PREPROCESSOR_CONFIG
from .errors import CheckpointError, OptionError
from .media import Kind, Video, open_medium
from .offload.plan import Turn
from .options import MAX_TIME_S, KVPrecision, Limits, MediaParams, SamplingParams, SpeechParams
from .preprocess.chat import ChatTokenizer, read_media_tokens
from .preprocess.counts import (
    Grid,
    MediumShape,
    Recipe,
    audio_windows,
    count_image,
    count_medium,
    count_video,
    read_recipe,
    require_agreement,
    samples_in,
    window_frames,
)
from .preprocess.messages import MediaPart, Message, TextPart, read_messages, with_kinds
from .preprocess.plain_tokenizer import TOKENIZER_FILE, PlainTokenizer
from .token2wav.ode import solver_stages, time_grid
from .token2wav.windows import BLOCK_CODES, LOOK_AHEAD_BLOCKS, chunk_codes, first_sound_codes
from .voice_sizes import longest_voice_frames

SHORT_QUESTION = {"role": "user", "content": "?"}

BYTES_PER_TOKEN = 3
"""Of words whose tokenizer is not here: more than 3 in most languages, so that an estimate is rather high. Digits are a
token each."""

MESSAGE_TOKENS = 5
"""Around the words of a message, by the published template: its start, its role, a new line; its end, a new line."""

ANSWER_TOKENS = 3
"""The beginning of the answer: start, role and new line."""

MEDIUM_TOKENS = 2
"""Around a medium, and once more around the sound inside a video: start and end."""

STAND_IN_FPS = 30.0
"""Frames per second of a video that nobody has yet."""


MOST_IMAGES = 10_000
"""That may stand in: far beyond any prompt."""


@dataclass(frozen=True)
class StandIn:
    """A medium that nobody has yet: `seconds` of video with sound, or of sound, or one image; `size` is its (height,
    width) in pixels."""

    kind: Kind
    seconds: float = 0.0
    size: tuple[int, int] = (720, 1280)


@dataclass(frozen=True)
class Workload:
    """A turn's work and what it comes from. Everything is exact but the text, if that `is_estimate`."""

    turn: Turn
    media: tuple[MediumShape, ...]
    text_tokens: int
    is_estimate: bool

    def __str__(self) -> str:
        about = "about " if self.is_estimate else ""
        parts = [f"{about}{self.text_tokens:,} of text", *(f"{m.tokens:,} of {m.name}" for m in self.media)]
        return f"{about}{self.turn.prompt_tokens:,} prompt tokens: {', '.join(parts)}"


def read_stand_ins(video_s: float = 0, audio_s: float = 0, images: int = 0, size: str = "1280x720") -> list[StandIn]:
    """Stand-ins by number: a video and a sound of so many seconds, so many images; `size` is their width x height.

    Raises OptionError for a size that is none and for numbers below 0.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", size)
    if match is None:
        raise OptionError(f"size {size!r} is not a size in pixels", hint="width x height, such as 1280x720")
    for name, amount, most in (
        ("video_s", video_s, MAX_TIME_S),
        ("audio_s", audio_s, MAX_TIME_S),
        ("images", images, MOST_IMAGES),
    ):
        if not 0 <= amount <= most:
            raise OptionError(f"{name} is {amount}, but must be 0 to {most:,}")
    pixels = int(match[2]), int(match[1])
    return [
        *([StandIn("video", video_s, pixels)] if video_s else []),
        *([StandIn("audio", audio_s)] if audio_s else []),
        *[StandIn("image", size=pixels)] * images,
    ]


def count_turn(
    headers: Headers,
    messages: Sequence[Mapping[str, Any]] = (),
    stand_ins: Sequence[StandIn] = (),
    *,
    media: MediaParams | None = None,
    limits: Limits | None = None,
    sampling: SamplingParams | None = None,
    speech: SpeechParams | None = None,
) -> Workload:
    """The work of answering `messages` (none: a short question) with `stand_ins` before the words of the last one.

    `speech` None is an answer in text. Raises OptionError and MediaError as `OmniRuntime.measure` does, and
    CheckpointError for a checkpoint whose configs lack what media are cut by.
    """
    media, limits = media or MediaParams(), limits or Limits()
    chat = _with_stand_ins(read_messages(messages or [SHORT_QUESTION], media), stand_ins, media)
    recipe, per_window = _recipe(headers)
    shapes = tuple(_count(part, recipe, limits) for part in _media_parts(chat))
    text_tokens, is_estimate = _count_text(with_kinds(chat, (shape.kind for shape in shapes)), headers)
    text_tokens += MEDIUM_TOKENS * sum(shape.kind == "video" and shape.mel_frames > 0 for shape in shapes)
    turn = turn_of(
        text_tokens + sum(shape.tokens for shape in shapes),
        tuple(shape.grid for shape in shapes if shape.grid),
        sum(audio_windows(shape.mel_frames, per_window) for shape in shapes),
        sampling or SamplingParams(),
        speech,
        limits.kv,
    )
    voice_frames = max(turn.voice_frames, longest_voice_frames(headers.folder))
    return Workload(replace(turn, voice_frames=voice_frames), shapes, text_tokens, is_estimate)


def turn_of(
    prompt_tokens: int,
    grids: tuple[Grid, ...],
    audio_windows: int,
    sampling: SamplingParams,
    speech: SpeechParams | None,
    kv: KVPrecision,
) -> Turn:
    """The turn that reads so large a prompt and answers as the options have it; `speech` None answers in text."""
    turn = Turn(
        prompt_tokens=prompt_tokens,
        text_tokens=sampling.max_tokens,
        grids=grids,
        audio_windows=audio_windows,
        kv=kv,
    )
    return turn if speech is None else _spoken(turn, speech)


def _spoken(turn: Turn, speech: SpeechParams) -> Turn:
    """The turn with its answer said aloud, in a voice that is yet to be conditioned."""
    evaluations = len(solver_stages(speech.solver, time_grid(speech.steps)))
    return replace(
        turn,
        codes=speech.sampling.max_tokens,
        speech_chunk_codes=chunk_codes(speech.chunk_s),
        ode_evaluations=evaluations,
        speech_mode=speech.mode,
        speech_ahead_codes=BLOCK_CODES * LOOK_AHEAD_BLOCKS.get(speech.mode, 0),
        first_sound_codes=first_sound_codes(evaluations, speech.mode, speech.chunk_s),
        speech_dtype=speech.dtype,
    )


def _with_stand_ins(chat: list[Message], stand_ins: Sequence[StandIn], media: MediaParams) -> list[Message]:
    """The chat with stand-ins at the beginning of its last message; a cut of real media does not shorten them."""
    params = replace(media, start_s=None, end_s=None)
    parts = tuple(MediaPart(one.kind, cast(Any, one), params, f"stand-in {n}") for n, one in enumerate(stand_ins, 1))
    last = chat[-1]
    return [*chat[:-1], replace(last, parts=(*parts, *last.parts))]


def _media_parts(chat: Sequence[Message]) -> Iterator[MediaPart]:
    return (part for message in chat for part in message.parts if isinstance(part, MediaPart))


def _count(part: MediaPart, recipe: Recipe, limits: Limits) -> MediumShape:
    if isinstance(part.source, StandIn):
        return _count_stand_in(part, part.source, recipe)
    with open_medium(part.source, limits) as medium:
        return count_medium(part, medium, recipe, limits)


def _count_stand_in(part: MediaPart, stand_in: StandIn, recipe: Recipe) -> MediumShape:
    height, width = stand_in.size
    if stand_in.kind == "image":
        return count_image(part, f"an image of {width}x{height}", height, width, recipe)
    samples = max(1, samples_in(stand_in.seconds))
    if stand_in.kind == "audio":
        return recipe.shape(f"{stand_in.seconds:g} s of sound", "audio", None, samples)
    name = f"{stand_in.seconds:g} s of video"
    n_frames = max(1, round(stand_in.seconds * STAND_IN_FPS))
    video = Video(name, n_frames, STAND_IN_FPS, width, height, has_sound=True, show=_never)
    return count_video(part, video, samples if part.params.video_sound else 0, recipe, picked=False)


def _never(indices: Sequence[int]) -> Iterator[Any]:
    raise AssertionError("nobody has this video")


def _recipe(headers: Headers) -> tuple[Recipe, int]:
    """How media are cut up, and the mel frames in a window of the audio tower.

    By the checkpoint's own preprocessor_config.json or, where that is not here, the published one."""
    path = (headers.folder or Path()) / "preprocessor_config.json"
    own = PREPROCESSOR_CONFIG
    try:
        if headers.folder and path.exists():
            own = json.loads(path.read_text(encoding="utf-8"))
        recipe = read_recipe(own)
        per_window = window_frames(headers.config)
        require_agreement(own, headers.config["thinker_config"], path)
    except KeyError as error:
        raise CheckpointError(
            f"config.json or preprocessor_config.json of {headers.name} lacks {error}", path=str(path)
        ) from error
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} makes no sense: {error}", path=str(path)) from error
    return recipe, per_window


def _count_text(chat: Sequence[Message], headers: Headers) -> tuple[int, bool]:
    """Tokens of the chat without its media, what opens and closes these included, and whether that is an estimate."""
    folder = headers.folder
    if folder is None or not (folder / TOKENIZER_FILE).exists():
        return _estimate(chat), True
    tokenizer = ChatTokenizer(PlainTokenizer(folder), folder, read_media_tokens(headers.config["thinker_config"]))
    return sum(map(len, tokenizer.encode(chat))), False


def _estimate(chat: Sequence[Message]) -> int:
    tokens = ANSWER_TOKENS + MESSAGE_TOKENS * len(chat)
    for message in chat:
        tokens += sum(_estimate_words(p.text) if isinstance(p, TextPart) else MEDIUM_TOKENS for p in message.parts)
    return tokens


def _estimate_words(words: str) -> int:
    digits = sum(letter.isdigit() for letter in words)
    other_bytes = sum(len(letter.encode()) for letter in words if not letter.isdigit())
    return digits + math.ceil(other_bytes / BYTES_PER_TOKEN)
