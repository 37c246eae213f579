"""Pictures, still and animated: bytes or a PIL image -> uint8 RGB, by Pillow.

A picture is measured before it is decoded. Animated ones (GIF, APNG, WebP) are read picture by picture.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ..errors import MediaError
from ..options import Limits
from .sources import Stored

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Pillow's names of readers; it has had AVIF since 11.3, in builds with libavif."""
ANIMATED_FORMATS = ("PNG", "WEBP", "GIF", "AVIF")
"""JPEG (MPO) and TIFF may hold several pictures too, but as previews and pages."""

HEIF_BRANDS = tuple(b"heic heix heim heis hevc hevx hevm hevs mif1 msf1 avif avis".split())
"""What files of the HEIF family begin with: photos of phones (HEIC) and AVIF. FFmpeg takes each tile of such a photo
for a video of its own and would show one of them, a small corner of the whole."""

UNTIMED_MS = 100
"""How long browsers show a picture whose duration is 0."""

TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, *TOO_LARGE)
"""How Pillow's readers report bytes that they cannot make sense of."""

NOT_THIS_FORMAT = (SyntaxError, IndexError, TypeError, struct.error)
"""How they report, on opening, that another reader may."""

SIGNATURE_BYTES = 16
"""What Pillow gives a reader to know its format by."""


@contextmanager
def open_picture(stored: Stored, limits: Limits) -> Iterator[Image.Image | None]:
    """The picture that Pillow sees in these bytes, not yet decoded, or None.

    Raises MediaError: more than `limits.max_source_pixels`, or of the HEIF family and not to be read here.
    """
    with stored.reader() as file:
        try:
            picture = _identify(file)
        except Image.DecompressionBombError as error:
            raise MediaError(
                f"{stored.name} is too large a picture: {error}",
                path=stored.name,
                limit="max_source_pixels",
                hint="scale it down",
            ) from error
        except DAMAGE:
            picture = None
        if picture is None:
            _refuse_heif(stored)
            yield None
            return
        with picture:
            check_pixels(stored.name, picture.width, picture.height, limits)
            yield picture


def _identify(file: BinaryIO) -> Image.Image | None:
    """The picture by the first reader of Pillow's that takes it.

    `Image.open` does the same and then applies a bound of Pillow's own: it warns on stderr of pictures that ours
    allows, and both its bound and Python's filters of warnings are global, where they are the application's.
    """
    Image.init()
    head = file.read(SIGNATURE_BYTES)
    for name in filter(Image.OPEN.__contains__, FORMATS):
        reader, accepts = Image.OPEN[name]
        if accepts is None or accepts(head) is True:
            file.seek(0)
            with suppress(*NOT_THIS_FORMAT):
                return reader(file, "")
    return None


def _refuse_heif(stored: Stored) -> None:
    head = stored.read_at(4, 8)
    if head[:4] == b"ftyp" and head[4:] in HEIF_BRANDS:
        raise MediaError(
            f"{stored.name}, {stored.size_bytes:,} bytes, is a picture in HEIC or AVIF that cannot be read here",
            path=stored.name,
            hint="save it as JPEG",
        )


def check_pixels(name: str, width: int, height: int, limits: Limits) -> None:
    """Refuse a picture or frame above `limits.max_source_pixels` with a MediaError."""
    if width * height > limits.max_source_pixels:
        raise MediaError(
            f"{name} is {width} x {height} pixels, where at most {limits.max_source_pixels:,} pixels are decoded",
            path=name,
            limit="max_source_pixels",
            hint="scale it down, or raise max_source_pixels",
        )


def to_rgb(picture: Image.Image, name: str) -> np.ndarray:
    """Decode to uint8 [H, W, 3]: upright by EXIF, transparency over white, 16-bit grey scaled to 8.

    The official `to_rgb` leaves EXIF aside, knows white behind RGBA only, and clips 16-bit grey.
    """
    try:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I"):
            upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
        if upright.has_transparency_data:
            cutout = upright.convert("RGBA")
            upright = Image.new("RGB", cutout.size, "white")
            upright.paste(cutout, mask=cutout)
        return np.array(upright.convert("RGB"))
    except DAMAGE as error:
        raise MediaError(f"{name} is damaged: {error}", path=name, hint="copy or download it again") from error


def is_animated(picture: Image.Image) -> bool:
    """Whether there is a second picture to show after the first."""
    try:
        return picture.format in ANIMATED_FORMATS and bool(getattr(picture, "is_animated", False))
    except DAMAGE:
        return False


def durations_ms(picture: Image.Image) -> list[float]:
    """How long each picture of an animation is shown, up to the first one that is damaged."""
    durations = []
    with suppress(*DAMAGE):
        for index in itertools.count():
            picture.seek(index)
            picture.load()
            durations.append(picture.info.get("duration") or UNTIMED_MS)
    return durations
