"""The prompt's order and its time: text and media -> token ids, three-axis positions, and the rows of each medium.

TMRoPE numbers every token by time, height and width. The rules are those of transformers' `Qwen2_5OmniProcessor`
(order of placeholders) and `get_rope_index` (positions); here both come from the same list of segments, so that
videos with sound, videos without and separate sounds may meet in one prompt, which `get_rope_index` cannot number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .chat import MediaTokens


@dataclass(frozen=True)
class Clock:
    """`positions_per_s` temporal positions make a second; picture and sound of a video alternate every `chunk_s`."""

    positions_per_s: int
    chunk_s: float

    @property
    def positions_per_chunk(self) -> int:
        return int(self.positions_per_s * self.chunk_s)


@dataclass(frozen=True)
class TextSegment:
    """Tokens that are what they are, the start and end tokens of media included."""

    ids: Sequence[int]


@dataclass(frozen=True)
class AudioSegment:
    """A sound of its own: `tokens` placeholders."""

    tokens: int


@dataclass(frozen=True)
class ImageSegment:
    """A still picture of `height` x `width` tokens."""

    height: int
    width: int


@dataclass(frozen=True)
class VideoSegment:
    """A moving picture: `times` temporal patches of `height` x `width` tokens, one each `seconds_per_patch`, and
    `sound_tokens` of its own sound (0: it is silent)."""

    times: int
    height: int
    width: int
    seconds_per_patch: float
    sound_tokens: int = 0


Segment = TextSegment | AudioSegment | ImageSegment | VideoSegment


@dataclass(frozen=True)
class Rows:
    """Where one medium's placeholders are in the prompt: picture [n] and sound [m], in the encoders' order."""

    picture: Tensor
    sound: Tensor


@dataclass(frozen=True)
class Layout:
    """A prompt of T tokens: `input_ids` [T], `position_ids` [3, T], both int64, and `rows` of each medium in order."""

    input_ids: Tensor
    position_ids: Tensor
    next_position: int
    rows: tuple[Rows, ...]


def lay_out(segments: Sequence[Segment], tokens: MediaTokens, clock: Clock) -> Layout:
    """Put segments one after another, each beginning one past the position at which the one before it ended."""
    ids, positions, rows = [], [], []
    row = position = 0
    for segment in segments:
        with torch.device("cpu"):  # an application may have set another default
            segment_ids, segment_positions, advance = _place(segment, tokens, clock)
        ids.append(segment_ids)
        positions.append(segment_positions + position)
        if not isinstance(segment, TextSegment):
            is_sound = segment_ids == tokens.audio
            is_picture = (segment_ids == tokens.image) | (segment_ids == tokens.video)
            rows.append(Rows(is_picture.nonzero().flatten() + row, is_sound.nonzero().flatten() + row))
        row += len(segment_ids)
        position += advance
    position_ids = torch.cat(positions, dim=1)
    return Layout(torch.cat(ids), position_ids, int(position_ids.max()) + 1, tuple(rows))


def _place(segment: Segment, tokens: MediaTokens, clock: Clock) -> tuple[Tensor, Tensor, int]:
    """Ids [n], positions [3, n] counted from the segment's first, and how far on the next segment begins."""
    match segment:
        case TextSegment(ids=ids):
            return torch.tensor(ids, dtype=torch.long), _line(len(ids)), len(ids)
        case AudioSegment(tokens=n):
            return _repeat(tokens.audio, n), _line(n), n
        case ImageSegment(height=height, width=width):
            positions = _box(torch.zeros(1, dtype=torch.long), height, width)
            return _repeat(tokens.image, height * width), positions, _after(positions)
        case VideoSegment(sound_tokens=0):
            positions = _video_positions(segment, clock)
            return _repeat(tokens.video, positions.shape[1]), positions, _after(positions)
        case VideoSegment():
            return _place_with_sound(segment, tokens, clock)


def _place_with_sound(video: VideoSegment, tokens: MediaTokens, clock: Clock) -> tuple[Tensor, Tensor, int]:
    """Picture and sound share the clock and alternate in chunks, picture first, between start and end of sound.

    Start of sound shares its position with the start of vision before it, end of sound with the end of vision after
    it: one past the chunk that came last, which need not be the one that reaches furthest.
    """
    picture = _video_positions(video, clock)
    order = _alternate(_video_times(video, clock), video.sound_tokens, clock.positions_per_chunk)
    inside = torch.cat([picture, _line(video.sound_tokens)], dim=1)[:, order]
    end = _after(inside)
    ids = torch.where(order < picture.shape[1], tokens.video, tokens.audio)
    return (
        torch.cat([_repeat(tokens.audio_start, 1), ids, _repeat(tokens.audio_end, 1)]),
        torch.cat([torch.full((3, 1), -1), inside, torch.full((3, 1), end)], dim=1),
        end,
    )


def _alternate(picture_times: Tensor, sound_tokens: int, per_chunk: int) -> Tensor:
    """Order [n + m] that takes picture 0..n-1 and sound n..n+m-1 chunk by chunk."""
    n = len(picture_times)
    pictures = _chunks(picture_times, per_chunk)
    sounds = _chunks(torch.arange(sound_tokens), per_chunk)
    runs = []
    for index in range(max(len(pictures), len(sounds))):
        runs += [torch.arange(*bounds) for bounds in pictures[index : index + 1]]
        runs += [torch.arange(*bounds) + n for bounds in sounds[index : index + 1]]
    return torch.cat(runs)


def _chunks(times: Tensor, per_chunk: int) -> list[tuple[int, int]]:
    """Bounds of chunks of non-decreasing `times`: chunk k ends before the first time of at least (k + 1) * per_chunk.

    A chunk is never empty: where one temporal patch is longer than a chunk, the reference gives the chunk that the
    patch skips a single token of it, and so must we.
    """
    bounds = [0]
    while True:
        cut = int(torch.searchsorted(times, len(bounds) * per_chunk))
        cut = max(cut, bounds[-1] + 1)
        if cut >= len(times):
            return list(zip(bounds, [*bounds[1:], len(times)], strict=True))
        bounds.append(cut)


def _video_times(video: VideoSegment, clock: Clock) -> Tensor:
    """Time [n] of each picture token in positions, fractions kept, in float64: what the processor cuts chunks by."""
    times = torch.arange(video.times, dtype=torch.float64) * video.seconds_per_patch * clock.positions_per_s
    return times.repeat_interleave(video.height * video.width)


def _video_positions(video: VideoSegment, clock: Clock) -> Tensor:
    """Positions [3, n] of a video's picture; times become whole by way of float32, as in `get_rope_index`."""
    seconds_per_patch = torch.tensor(video.seconds_per_patch, dtype=torch.float32)
    times = (torch.arange(video.times) * seconds_per_patch * clock.positions_per_s).long()
    return _box(times, video.height, video.width)


def _box(times: Tensor, height: int, width: int) -> Tensor:
    """Positions [3, times * height * width] of a block of tokens, row by row within each time."""
    rows, columns = torch.arange(height), torch.arange(width)
    return torch.stack([axis.flatten() for axis in torch.meshgrid(times, rows, columns, indexing="ij")])


def _line(n: int) -> Tensor:
    return torch.arange(n).expand(3, n)


def _after(positions: Tensor) -> int:
    """One past the last token, the corner in which time, height and width of a picture are all largest."""
    return int(positions[:, -1].max()) + 1


def _repeat(token: int, n: int) -> Tensor:
    return torch.full((n,), token, dtype=torch.long)
