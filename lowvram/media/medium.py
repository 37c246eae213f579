"""Media as people have them -> frames, waveform, picture.

A `Medium` is opened once and read as often as needed; its content says what it is, never its name. Pictures are read
by Pillow, all else by PyAV, and nothing is decoded before it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, cast

import numpy as np
from PIL import Image

from ..errors import MediaError, OptionError
from ..options import Limits
from .containers import check_decoder, decode, find_track, open_container
from .pictures import check_pixels, durations_ms, is_animated, open_picture, to_rgb
from .sound import SOUND_RATE_HZ, cut, mix, mono_blocks, resample, resampled_length
from .sources import Picture, Source, Stored, open_stored, source_name
from .video import Video, open_clip

Kind = Literal["image", "audio", "video"]

PCM_DTYPES = ("float16", "float32", "float64", "int16", "int32", "uint8")
MAX_CHANNELS = 8
"""7.1: more channels than that are taken for something else."""

A_KIND = {"image": "an image", "audio": "a sound", "video": "a video"}


@dataclass(frozen=True)
class Slides:
    """Pictures that follow one another at `fps`, opened one by one."""

    pictures: Sequence[Picture]
    fps: float


@dataclass(frozen=True)
class Medium:
    """An opened picture, sound or video; close it, or use it as a context manager.

    `kind` is what the content is: a video may have sound, a sound may have a cover, and an animated picture (GIF,
    APNG, WebP; `is_animation`) is a video of which `read_image` gives the first picture.
    """

    name: str
    kind: Kind
    content: Stored | Slides | Image.Image | np.ndarray
    is_animation: bool = False

    def close(self) -> None:
        if isinstance(self.content, Stored):
            self.content.close()

    def __enter__(self) -> Medium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_medium(source: Source, limits: Limits, *, frames_fps: float = 2.0) -> Medium:
    """Open a source and find out what it is.

    Of arrays, uint8 [H, W], [H, W, 3] and [H, W, 4] are images and uint8 [T, H, W, 3] is a video. Sound is at 16 kHz:
    float (full scale at 1), int16 and int32 of shape [S], [C, S] or [S, C], and uint8 [S] (silence at 128). Of two
    sides the smaller one is the channels, if it is at most 8; channels are averaged. A list or tuple of pictures is a
    video. Such videos run at `frames_fps`; 2 frames/s is what the official utilities take them for.

    Raises MediaError: missing, unreadable, empty, not a medium, or beyond `limits`; OptionError: an empty path.
    """
    if frames_fps <= 0:
        raise OptionError(f"frames_fps is {frames_fps}, but must be a positive number of frames/s")
    name = source_name(source)
    match source:
        case Image.Image():
            return Medium(name, "image", source)
        case np.ndarray():
            return _open_array(source, name, frames_fps)
        case list() | tuple():
            return Medium(name, "video", Slides(source, frames_fps))
    with ExitStack() as undo:
        stored = undo.enter_context(open_stored(cast("str", source), limits))
        kind, is_animation = _look(stored, limits)
        undo.pop_all()
    return Medium(name, kind, stored, is_animation)


def _open_array(array: np.ndarray, name: str, frames_fps: float) -> Medium:
    if not array.size:
        raise MediaError(f"{name} is empty", path=name)
    match array.shape, array.dtype.name:
        case (((_, _) | (_, _, 3) | (_, _, 4)), "uint8"):
            return Medium(name, "image", Image.fromarray(array))
        case (_, _, _, 3), "uint8":
            return Medium(name, "video", Slides(cast("Sequence[Picture]", array), frames_fps))
        case _, dtype if dtype in PCM_DTYPES and (channels := _channels_first(array)) is not None:
            return Medium(name, "audio", mix(channels))
    raise MediaError(
        f"{name} is neither image, video nor sound",
        path=name,
        hint="uint8 [H, W, 3] is an image, uint8 [T, H, W, 3] a video, float in -1..1, int16 or int32 [S] a sound at"
        f" 16 kHz, or [C, S] with at most {MAX_CHANNELS} channels, fewer than samples",
    )


def _channels_first(array: np.ndarray) -> np.ndarray | None:
    """[S], [C, S] or [S, C] as [C, S]; None where it cannot be told which side is the channels."""
    if array.ndim == 1:
        return array[None]
    if array.ndim != 2 or min(array.shape) > MAX_CHANNELS or array.shape[0] == array.shape[1]:
        return None
    return array if array.shape[0] < array.shape[1] else array.T


def _look(stored: Stored, limits: Limits) -> tuple[Kind, bool]:
    """What these bytes are, and whether that is an animated picture."""
    with open_picture(stored, limits) as picture:
        if picture is not None:
            return ("video", True) if is_animated(picture) else ("image", False)
    with open_container(stored) as container:
        if find_track(container, "video") is not None:
            return "video", False
        if find_track(container, "audio") is not None:
            return "audio", False
    raise MediaError(f"{stored.name} has neither picture nor sound", path=stored.name, hint="look at it in a player")


def read_image(medium: Medium, limits: Limits) -> np.ndarray:
    """The picture as uint8 [H, W, 3] RGB, upright as its EXIF orientation says, transparency over white.

    Raises MediaError: not a picture, damaged, or more than `limits.max_source_pixels`.
    """
    match medium.content:
        case Image.Image() as picture:
            check_pixels(medium.name, picture.width, picture.height, limits)
            return to_rgb(picture, medium.name)
        case Stored() as stored:
            with open_picture(stored, limits) as opened:
                if opened is not None:
                    return to_rgb(opened, medium.name)
    raise MediaError(f"{medium.name} is {A_KIND[medium.kind]}, not an image", path=medium.name, hint="pass it as such")


def open_video(medium: Medium, limits: Limits) -> Video:
    """Measure a video: its exact number of frames, rate and size, decoding one frame.

    Raises MediaError: not a video, nothing that decodes, or frames above `limits.max_source_pixels`.
    """
    match medium.content:
        case Slides() as slides:
            return _open_slides(slides, medium.name, limits)
        case Stored() as stored if medium.kind == "video":
            with open_picture(stored, limits) as picture:
                if picture is not None:
                    return _open_animation(picture, stored, limits)
            return open_clip(stored, limits)
    raise MediaError(f"{medium.name} is {A_KIND[medium.kind]}, not a video", path=medium.name, hint="pass it as such")


def _open_slides(slides: Slides, name: str, limits: Limits) -> Video:
    def slide(index: int) -> np.ndarray:
        with open_medium(slides.pictures[index], limits) as medium:
            return read_image(medium, limits)

    def show(indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in indices:
            frame = slide(index)
            if frame.shape != (height, width, 3):
                raise MediaError(
                    f"frame {index} of {name} is {frame.shape[1]} x {frame.shape[0]} pixels, not {width} x {height}",
                    path=name,
                    hint="give all frames the size of the first",
                )
            yield frame

    if not len(slides.pictures):
        raise MediaError(f"{name} is a video of 0 frames", path=name, hint="give at least one")
    height, width, _ = slide(0).shape
    return Video(name, len(slides.pictures), slides.fps, width, height, False, show)


def _open_animation(picture: Image.Image, stored: Stored, limits: Limits) -> Video:
    def show(indices: Sequence[int]) -> Iterator[np.ndarray]:
        with open_picture(stored, limits) as opened:
            assert opened is not None, "these bytes were a picture when the video was opened"
            for index in indices:
                opened.seek(index)
                # A picture that reaches over the edge makes Pillow enlarge the whole.
                yield to_rgb(opened, stored.name)[:height, :width]

    width, height = picture.size
    shown_ms = durations_ms(picture)
    if not shown_ms:
        raise MediaError(f"{stored.name} is a video of 0 frames", path=stored.name, hint="copy or download it again")
    fps = 1000 * len(shown_ms) / sum(shown_ms)
    return Video(stored.name, len(shown_ms), fps, width, height, False, show)


def read_sound(medium: Medium, start_s: float | None, end_s: float | None, limits: Limits) -> np.ndarray:
    """The sound between two times as float32 [S], 16 kHz mono, full scale at 1, of any length.

    The sound of a video runs on the clock of its picture: silence where it starts late or has a gap, nothing where it
    ends early (S may be 0). Peak memory is the result's.

    Raises MediaError: no sound, none that decodes or (of a sound) none in the cut, or above `limits.max_media_bytes`.
    """
    sound = bytearray()
    with _native_sound(medium, start_s, end_s) as (rate_hz, blocks):
        for block in resample(blocks, rate_hz):
            if not np.isfinite(block).all():
                raise MediaError(f"{medium.name} has samples that are no numbers", path=medium.name)
            sound += block.tobytes()
            if len(sound) > limits.max_media_bytes:
                raise MediaError(
                    f"{medium.name} has more than {limits.max_media_bytes / (4 * SOUND_RATE_HZ):,.0f} s of sound",
                    path=medium.name,
                    limit="max_media_bytes",
                    hint="cut it with a start and an end",
                )
    _check_heard(medium, len(sound), start_s, end_s)
    return np.frombuffer(sound, np.float32)


def measure_sound(medium: Medium, start_s: float | None, end_s: float | None) -> int:
    """How many samples `read_sound` gives, exactly, in flat memory.

    The track is decoded, though not resampled: no container states its length to the sample (AAC in MP4 may decode to
    most of a frame more), and a token more or less would fall between plan and run.
    """
    with _native_sound(medium, start_s, end_s) as (rate_hz, blocks):
        samples = resampled_length(sum(map(len, blocks)), rate_hz)
    _check_heard(medium, samples, start_s, end_s)
    return samples


def _check_heard(medium: Medium, samples: int, start_s: float | None, end_s: float | None) -> None:
    if samples or medium.kind != "audio":
        return
    end = "its end" if end_s is None else f"{end_s:g} s"
    with _native_sound(medium, None, None) as (rate_hz, blocks):
        length_s = sum(map(len, blocks)) / rate_hz
    raise MediaError(
        f"{medium.name} has 0 samples of sound between {start_s or 0:g} s and {end}: it is {length_s:.2f} s long",
        path=medium.name,
        hint="start earlier",
    )


@contextmanager
def _native_sound(
    medium: Medium, start_s: float | None, end_s: float | None
) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """(rate, mono blocks at that rate), cut to start and end."""
    if isinstance(medium.content, np.ndarray):
        yield SOUND_RATE_HZ, cut([medium.content], SOUND_RATE_HZ, start_s, end_s)
        return
    if not isinstance(medium.content, Stored) or medium.kind == "image" or medium.is_animation:
        raise _no_sound(medium)
    with open_container(medium.content) as container:
        track = find_track(container, "audio")
        if track is None:
            raise _no_sound(medium)
        check_decoder(track, medium.name)
        frames = decode(container, track)
        first = next(frames, None)
        if first is None:
            raise MediaError(f"{medium.name} has 0 samples of sound that decode", path=medium.name)
        picture = find_track(container, "video")
        origin_s = None if picture is None else float((picture.start_time or 0) * (picture.time_base or 0))
        blocks = mono_blocks(itertools.chain([first], frames), first.sample_rate, origin_s)
        yield first.sample_rate, cut(blocks, first.sample_rate, start_s, end_s)


def _no_sound(medium: Medium) -> MediaError:
    hint = "samples are a numpy array at 16 kHz" if isinstance(medium.content, Slides) else "pass one that has"
    return MediaError(f"{medium.name} is {A_KIND[medium.kind]} without sound", path=medium.name, hint=hint)
