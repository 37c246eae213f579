"""Moving pictures: a container -> frames by number, exactly, in memory that does not grow with the clip.

Packets are listed once, so that the number of frames, their order and the places where decoding can begin are known;
frames are then decoded forward, skipping ahead over keyframes where that saves work.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import av
import numpy as np
from av.buffer import Buffer
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from PIL import Image

from ..errors import MediaError
from ..options import Limits
from .containers import check_decoder, decode, find_track, open_container, packets
from .pictures import check_pixels, to_rgb
from .sources import Stored

SEEK_OVER_FRAMES = 32
"""A seek throws away what the decoder's threads have in flight: about this many frames' work."""

FALLBACK_FPS = 25.0
"""For a clip that states no rate and has no timestamps either."""


@dataclass(frozen=True)
class Video:
    """A moving picture. Frames are numbered from 0 in the order in which they are shown.

    `frame_count` is the number of frames that the decoder gives, `fps` their average rate. `width` and `height` count
    pixels as shown, after rotation; pixels are taken as square, as the official utilities do.
    """

    name: str
    frame_count: int
    fps: float
    width: int
    height: int
    has_sound: bool
    show: Callable[[Sequence[int]], Iterator[np.ndarray]]

    @property
    def duration_s(self) -> float:
        return self.frame_count / self.fps

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames of non-decreasing `indices` (repeats allowed), one at a time: uint8 [height, width, 3] RGB.

        Each call decodes anew. For a frame too damaged to decode the next one is given, for a missing end the last.
        """
        assert all(0 <= a <= b < self.frame_count for a, b in itertools.pairwise([0, *indices])), indices
        return self.show(indices)


@dataclass(frozen=True)
class Timeline:
    """Where the frames of a clip stand, in the order in which they are shown.

    `places` are timestamps in the track's time base, `keys` the indices of frames at which decoding may begin. Where
    timestamps cannot be trusted, `places` is None: then frames are counted as they come, and none is a key.
    """

    frame_count: int
    places: np.ndarray | None = None
    keys: Sequence[int] = ()

    def runs(self, indices: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Cut `indices` into runs that decode forward, each from a key on (0: the beginning)."""
        runs: list[tuple[int, list[int]]] = [(0, [])]
        reached = 0
        for index in indices:
            key = self.keys[at - 1] if (at := bisect_right(self.keys, index)) else 0
            if key - reached > SEEK_OVER_FRAMES:
                runs.append((key, []))
            runs[-1][1].append(index)
            reached = index
        return [run for run in runs if run[1]]

    def number(self, frame: av.VideoFrame, reached: int) -> int:
        """The index of `frame`, which the decoder gave next after the frame of index `reached`."""
        if self.places is None or frame.pts is None:
            return reached + 1
        return int(np.searchsorted(self.places, frame.pts))


def open_clip(stored: Stored, limits: Limits) -> Video:
    """Measure a clip: all packets are counted, one frame is decoded.

    Raises MediaError: no decoder, no frame that decodes, or frames above `limits.max_source_pixels`.
    """
    with open_container(stored) as container:
        track = _video_track(container, stored.name)
        check_pixels(stored.name, track.width, track.height, limits)
        first = next(decode(container, track), None)
    with open_container(stored) as container:
        timeline, fps = scan(container, _video_track(container, stored.name))
    if first is None or not timeline.frame_count:
        raise _no_frames(stored.name)
    clip = _Clip(stored, timeline, (first.width, first.height))
    height, width, _ = _pixels(first, clip.size).shape
    return Video(stored.name, timeline.frame_count, fps, width, height, _has_sound(stored), clip.show)


def _has_sound(stored: Stored) -> bool:
    """Whether there is a sound track that is not empty."""
    with open_container(stored) as container:
        track = find_track(container, "audio")
        return track is not None and any(packet is not None and packet.size for packet in packets(container, track))


def scan(container: InputContainer, track: VideoStream) -> tuple[Timeline, float]:
    """The timeline and the average rate in frames/s, from the packets themselves.

    Headers promise frames that a truncated file no longer has; edit lists and variable rates are known only here.
    """
    stamps: list[int | None] = []
    keys: list[int | None] = []
    end = 0
    for packet in packets(container, track):
        if packet is None or not _is_shown(packet, track):
            continue
        stamps.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
        end = max(end, (packet.pts or 0) + (packet.duration or 0))
    stated_fps = float(track.average_rate or FALLBACK_FPS)
    # AVI numbers frames in the order of decoding: a reordered frame would be taken for another.
    if not stamps or None in stamps or len(set(stamps)) < len(stamps) or container.format.name == "avi":
        return Timeline(len(stamps)), stated_fps
    places = np.array(sorted(cast("list[int]", stamps)), np.int64)
    indices = np.searchsorted(places, np.array(sorted(cast("list[int]", keys)), np.int64)).tolist()
    return Timeline(len(places), places, indices), _mean_fps(places, end, track, stated_fps)


def _is_shown(packet: Packet, track: VideoStream) -> bool:
    """Whether a packet becomes a frame. An edit list discards some; VP8 has reference frames that are never shown
    (RFC 6386, 9.1: bit 4 of the frame tag)."""
    if not packet.size or packet.is_discard:
        return False
    return track.codec_context.name != "vp8" or bool(bytes(packet)[0] & 0x10)


def _mean_fps(places: np.ndarray, end: int, track: VideoStream, stated_fps: float) -> float:
    """The rate that the container states, unless its timestamps differ from it by more than rounding to ms explains:
    a variable rate is often stated from its first frames."""
    span_s = float((end - int(places[0])) * (track.time_base or 0))
    if span_s <= 0:
        return stated_fps
    # FLV and ASF state no durations: their span ends where the last frame begins.
    counted_fps = (len(places) - (end <= places[-1])) / span_s
    return stated_fps if abs(counted_fps - stated_fps) <= 0.01 * counted_fps else counted_fps


@dataclass(frozen=True)
class _Clip:
    """A measured clip; all frames are shown in one `size` (width, height), since a stream may change its own."""

    stored: Stored
    timeline: Timeline
    size: tuple[int, int]

    def show(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        shown, pixels = None, None
        with open_container(self.stored) as container:
            track = _video_track(container, self.stored.name)
            track.thread_type = "AUTO"
            for start, wanted in self.timeline.runs(indices):
                for frame in self._decode_run(container, track, start, wanted):
                    if frame is not shown or pixels is None:
                        shown, pixels = frame, _pixels(frame, self.size)
                    yield pixels

    def _decode_run(
        self, container: InputContainer, track: VideoStream, start: int, wanted: Sequence[int]
    ) -> Iterator[av.VideoFrame]:
        """The wanted frames, decoded from the key `start` on, or from the beginning if the seek does not land on it."""
        frames: Iterator[av.VideoFrame] | None = decode(container, track)
        if start and self.timeline.places is not None:
            frames = _seek(container, track, int(self.timeline.places[start]))
        if frames is not None:
            yield from self._pick(frames, wanted)
            return
        with open_container(self.stored) as anew:
            yield from self._pick(decode(anew, _video_track(anew, self.stored.name)), wanted)

    def _pick(self, frames: Iterator[av.VideoFrame], wanted: Sequence[int]) -> Iterator[av.VideoFrame]:
        """For each wanted index the first frame at or after its place, at the end the last frame there is."""
        frame, reached = None, -1
        for index in wanted:
            while reached < index and (following := next(frames, None)) is not None:
                frame, reached = following, self.timeline.number(following, reached)
            if frame is None:
                raise _no_frames(self.stored.name)
            yield frame


def _seek(container: InputContainer, track: VideoStream, place: int) -> Iterator[av.VideoFrame] | None:
    """Frames from the key at `place` on, or None where the decoder then begins with another frame."""
    try:
        container.seek(place, stream=track)
    except av.error.FFmpegError:
        return None
    frames = decode(container, track)
    first = next(frames, None)
    return itertools.chain([first], frames) if first is not None and first.pts == place else None


def _pixels(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3], upright, transparency over white; `size` is (width, height) before turning."""
    transparent = any(part.is_alpha for part in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if transparent else "rgb24", width=size[0], height=size[1])
    if transparent:
        pixels = to_rgb(Image.fromarray(pixels), "frame")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    return upright(pixels, np.frombuffer(bytes(cast("Buffer", matrix)), np.int32).tolist())


def upright(pixels: np.ndarray, matrix: Sequence[int]) -> np.ndarray:
    """Turn and mirror [H, W, 3] pixels by a display matrix, to the nearest right angle.

    `matrix` is a, b, u, c, d, v, x, y, w as in ISO 14496-12: x' = a x + c y, y' = b x + d y.
    """
    a, b, _, c, d = matrix[:5]
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _video_track(container: InputContainer, name: str) -> VideoStream:
    track = find_track(container, "video")
    assert track is not None, "the medium is a video"
    check_decoder(track, name)
    return track


def _no_frames(name: str) -> MediaError:
    return MediaError(f"{name} is a video of 0 frames that decode", path=name, hint="copy or download it again")
