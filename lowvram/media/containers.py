"""Containers of sound and moving picture: bytes -> the track a player would choose -> packets and frames, by PyAV.

FFmpeg sees our own bytes only: it is given no path, no address and no format that could name another file. Damage in
the middle costs the frames it hit; where nothing can be read on, the track ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, overload

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from ..errors import MediaError
from .sources import Stored

FORMATS = "mov,matroska,avi,flv,asf,mpegts,mpeg,mpegvideo,ogg,wav,w64,aiff,au,caf,mp3,flac,aac,ac3,eac3,amr"
"""FFmpeg's names of demuxers that read one file only; playlists (hls, dash, concat) would open others."""


@contextmanager
def open_container(stored: Stored) -> Iterator[InputContainer]:
    """Raises MediaError where FFmpeg makes nothing of the bytes."""
    # A torn packet at the end would cost the frames that the decoder still holds; hence `discardcorrupt`.
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "", "fflags": "+discardcorrupt"}
    with stored.reader() as file:
        try:
            # Tags in other encodings than UTF-8 are common, and none of our business.
            container = av.open(file, "r", container_options=options, metadata_errors="replace")
        except av.error.FFmpegError as error:
            raise _unknown_content(stored) from error
        with container:
            yield container


def _unknown_content(stored: Stored) -> MediaError:
    hint = "give a picture, a sound or a video, whole and not encrypted"
    if stored.read_at(4, 4) == b"ftyp":
        hint = "an MP4 without its index was cut short: copy, record or download it again"
    return MediaError(
        f"{stored.name}, {stored.size_bytes:,} bytes, is not a medium that can be read",
        path=stored.name,
        hint=hint,
    )


@overload
def find_track(container: InputContainer, kind: Literal["video"]) -> VideoStream | None: ...
@overload
def find_track(container: InputContainer, kind: Literal["audio"]) -> AudioStream | None: ...
def find_track(container: InputContainer, kind: Literal["video", "audio"]) -> Stream | None:
    """The track a player would choose, among those that have a decoder if any has. A cover is not a video."""
    best = container.streams.best(kind)
    tracks = [s for s in container.streams if s.type == kind and not s.disposition & Disposition.attached_pic]
    return min(tracks, key=lambda track: (track.codec_context is None, track is not best), default=None)


def check_decoder(track: Stream, name: str) -> None:
    """Raises MediaError where this build of FFmpeg cannot decode the track."""
    if track.codec_context is None:
        raise MediaError(
            f"the {track.type} of {name} is coded in a way for which there is no decoder here",
            path=name,
            hint="convert it to MP4 with H.264 and AAC",
        )


@overload
def decode(container: InputContainer, track: VideoStream) -> Iterator[av.VideoFrame]: ...
@overload
def decode(container: InputContainer, track: AudioStream) -> Iterator[av.AudioFrame]: ...
def decode(container: InputContainer, track: VideoStream | AudioStream) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """Every frame that decodes, from where the container stands. A damaged packet costs its own frames only."""
    for packet in packets(container, track):
        try:
            frames = track.decode(packet)
        except av.error.FFmpegError:
            continue
        yield from frames


def packets(container: InputContainer, track: Stream) -> Iterator[Packet | None]:
    """The packets of one track, up to its end or the first place that cannot be read on from.

    An empty packet, or None, asks the decoder for the frames that it still holds.
    """
    try:
        yield from container.demux(track)
    except (av.error.FFmpegError, IndexError):  # IndexError: PyAV (18.1) at the end of a file whose tracks appear late
        yield None
