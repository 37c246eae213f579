from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image, features

from lowvram.errors import MediaError
from lowvram.media.pictures import durations_ms, is_animated, open_picture, to_rgb
from lowvram.media.sources import open_stored
from lowvram.options import Limits

LIMITS = Limits()
RED, WHITE = [255, 0, 0], [255, 255, 255]
CORNERS = np.array([[RED, WHITE], [[0, 0, 255], [0, 255, 0]]], np.uint8).repeat(8, axis=0).repeat(16, axis=1)


def saved(picture: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def read(content: bytes, limits: Limits = LIMITS) -> np.ndarray:
    with open_stored(content, limits) as stored, open_picture(stored, limits) as picture:
        assert picture is not None
        return to_rgb(picture, stored.name)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_picture_is_read_as_it_was_saved(file_format: str):
    options = {"lossless": True} if file_format == "WEBP" else {}
    assert np.array_equal(read(saved(Image.fromarray(CORNERS), file_format, **options)), CORNERS)


needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")


@pytest.mark.parametrize("file_format", ["JPEG", pytest.param("AVIF", marks=needs_avif)])
def test_a_lossy_picture_is_read_to_within_its_loss(file_format: str):
    subsampling = 0 if file_format == "JPEG" else "4:4:4"
    content = saved(Image.fromarray(CORNERS), file_format, quality=95, subsampling=subsampling)
    pixels = read(content).astype(int)
    assert abs(pixels - CORNERS).mean() < 3


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [(1, CORNERS), (2, CORNERS[:, ::-1]), (3, CORNERS[::-1, ::-1]), (6, np.rot90(CORNERS, -1)), (8, np.rot90(CORNERS))],
)
def test_a_photo_stands_upright(orientation: int, shown: np.ndarray):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read(saved(Image.fromarray(CORNERS), exif=exif)), shown)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode: str):
    cutout = Image.fromarray(np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8))
    picture = cutout.convert(mode)
    pixels = read(saved(picture))
    assert pixels.tolist() == [[[0, 0, 0], WHITE]]


def test_half_transparency_is_half_white():
    assert read(saved(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))).tolist() == [[[255, 127, 127]]]


def test_grey_of_16_bits_keeps_its_shades():
    grey = np.array([[0, 1 << 8, 128 << 8, 65_535]], np.uint16)
    assert read(saved(Image.fromarray(grey)))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(("mode", "colour"), [("L", 255), ("1", 1), ("CMYK", (0, 0, 0, 0)), ("P", 0)])
def test_every_mode_becomes_rgb(mode: str, colour: int | tuple[int, ...]):
    picture = Image.new(mode, (3, 2), colour)
    if mode == "P":
        picture.putpalette(WHITE)
    pixels = read(saved(picture, "TIFF"))
    assert pixels.shape == (2, 3, 3) and pixels.dtype == np.uint8 and (pixels == 255).all()


def test_a_picture_above_the_limit_is_refused_undecoded():
    with pytest.raises(MediaError, match="32 x 16 pixels, where at most 511 pixels") as caught:
        read(saved(Image.fromarray(CORNERS)), Limits(max_source_pixels=511))
    assert caught.value.limit == "max_source_pixels"


def test_a_picture_of_20_000_by_20_000_pixels_is_refused_by_its_header():
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    with pytest.raises(MediaError, match="20000 x 20000 pixels, where at most 178,956,970"):
        read(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1000) + b"IDAT" + b"\0" * 1000)


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="older readers of WebP call this header damaged, not too large"
)
def test_a_picture_that_pillows_own_reader_refuses_is_too_large():
    size = struct.pack("<I", 16_383)[:3]
    content = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size + size + b"VP8L" + bytes(12)
    with pytest.raises(MediaError, match=r"too large a picture: .*268435456 pixels"):
        read(b"RIFF" + struct.pack("<I", len(content)) + content)


def test_a_truncated_picture_is_damaged():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with pytest.raises(MediaError, match=r"damaged.*truncated"):
        read(saved(Image.fromarray(noise), "JPEG")[:-1000])


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "TIFF"])
def test_pillow_does_not_warn_of_a_picture_that_the_limit_allows(file_format: str, recwarn: pytest.WarningsRecorder):
    width, height = 10_000, Image.MAX_IMAGE_PIXELS // 10_000 + 1
    content = saved(Image.new("1", (width, height)), file_format)
    with open_stored(content, LIMITS) as stored, open_picture(stored, LIMITS) as picture:
        assert picture.size == (width, height)
    assert not [warning for warning in recwarn if warning.category is Image.DecompressionBombWarning]


def test_the_limit_is_the_callers_and_not_pillows():
    width, height = 20_000, 2 * Image.MAX_IMAGE_PIXELS // 20_000 + 1
    content = saved(Image.new("1", (width, height)))
    with pytest.raises(MediaError, match="20000 x 8948 pixels, where at most 178,956,970 pixels"):
        read(content)
    allowed = Limits(max_source_pixels=width * height)
    with open_stored(content, allowed) as stored, open_picture(stored, allowed) as picture:
        assert picture.size == (width, height)


def test_what_is_no_picture_is_none():
    with open_stored(b"once upon a time", LIMITS) as stored, open_picture(stored, LIMITS) as picture:
        assert picture is None


def test_a_format_that_runs_a_program_is_no_picture():
    content = saved(Image.new("RGB", (4, 4)), "EPS")
    with open_stored(content, LIMITS) as stored, open_picture(stored, LIMITS) as picture:
        assert picture is None


def animation(file_format: str) -> bytes:
    shades = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 100, 200)]
    return saved(shades[0], file_format, save_all=True, append_images=shades[1:], duration=[40, 80, 120], lossless=True)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", pytest.param("AVIF", marks=needs_avif)])
def test_an_animation_knows_its_durations(file_format: str):
    with open_stored(animation(file_format), LIMITS) as stored, open_picture(stored, LIMITS) as picture:
        assert is_animated(picture)
        assert durations_ms(picture) == [40, 80, 120]


def test_a_torn_animation_ends_where_it_is_torn():
    content = animation("PNG")
    with open_stored(content[: content.rindex(b"fdAT") + 6], LIMITS) as stored, open_picture(stored, LIMITS) as picture:
        assert durations_ms(picture) == [40, 80]


def test_an_animation_ends_before_a_picture_beyond_reason():
    content = bytearray(animation("GIF"))
    third = content.rindex(b"\x2c\0\0\0\0\x08\0\x08\0")
    content[third + 5 : third + 9] = b"\xff\xff\xff\xff"
    with open_stored(bytes(content), LIMITS) as stored, open_picture(stored, LIMITS) as picture:
        assert durations_ms(picture) == [40, 80]


def test_a_second_picture_that_is_damaged_does_not_count_as_movement():
    content = animation("GIF")
    second = content.index(b"\x2c", content.index(b"\x2c\0\0\0\0\x08\0\x08\0") + 1)
    with open_stored(content[: second + 6], LIMITS) as stored, open_picture(stored, LIMITS) as picture:
        assert not is_animated(picture)


def test_one_frame_does_not_move():
    with open_stored(saved(Image.fromarray(CORNERS), "GIF"), LIMITS) as stored, open_picture(stored, LIMITS) as picture:
        assert not is_animated(picture)


def test_pages_of_a_tiff_do_not_move():
    pages = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    content = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with open_stored(content, LIMITS) as stored, open_picture(stored, LIMITS) as picture:
        assert not is_animated(picture)
