"""Which frames of a clip the model sees, and at what size.

Arithmetic only: decoding is `media`'s, and pixels are `pixels`'. Rules are those of qwen-omni-utils 0.0.9
(`fetch_image`, `fetch_video`) and of transformers' `Qwen2VLImageProcessor`; where they refuse a clip that could be
shown, the docstring says what happens here instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import MediaError, OptionError
from ..options import MediaParams

FRAMES_STEP = 2
"""Frames are counted in pairs, one temporal patch each."""

MAX_ASPECT_RATIO = 200
MAX_FRAME_PIXELS = 768 * 28**2
"""No frame of a video is larger, whatever was asked for."""


@dataclass(frozen=True)
class VisionRecipe:
    """How a checkpoint cuts pictures: sizes in pixels, `mean` and `std` per RGB channel of values in 0..1.

    `min_pixels` and `max_pixels` bound one still image.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int
    max_pixels: int

    @property
    def factor(self) -> int:
        """Pixels along one side of a token."""
        return self.patch_size * self.merge_size


def fit_size(
    height: int, width: int, factor: int, min_pixels: float, max_pixels: float, name: str = ""
) -> tuple[int, int]:
    """The size (height, width) nearest to the given one whose sides are multiples of `factor` and whose area is
    within the bounds, aspect ratio kept (`smart_resize`).

    A side never falls below `factor`, where the official utilities can return 0 for a very long picture. A picture
    more than 200 times longer than wide is a `MediaError`, as it is there.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise MediaError(
            f"{name or 'a picture'} is {width}x{height} pixels, but one side may be at most {MAX_ASPECT_RATIO}"
            " times the other",
            path=name,
            limit="aspect ratio",
            hint="crop it",
        )
    fitted_height, fitted_width = (max(factor, round(side / factor) * factor) for side in (height, width))
    if fitted_height * fitted_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if fitted_height * fitted_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return fitted_height, fitted_width


def image_size(
    height: int, width: int, recipe: VisionRecipe, params: MediaParams, resized: tuple[int, int] | None, name: str
) -> tuple[int, int]:
    """The size at which a still image is seen; `resized` asks for one outright and is rounded to whole tokens.

    The caller's pixel bounds narrow the checkpoint's and cannot widen them: the checkpoint's processor resizes after
    the utilities, and has the last word.
    """
    if resized is not None:
        return fit_size(*resized, recipe.factor, recipe.min_pixels, recipe.max_pixels, name)
    min_pixels = min(max(params.image_min_pixels, recipe.min_pixels), recipe.max_pixels)
    max_pixels = max(min(params.image_max_pixels, recipe.max_pixels), min_pixels)
    return fit_size(height, width, recipe.factor, min_pixels, max_pixels, name)


def frame_size(
    height: int,
    width: int,
    n_frames: int,
    recipe: VisionRecipe,
    params: MediaParams,
    resized: tuple[int, int] | None,
    name: str,
) -> tuple[int, int]:
    """The size at which each of a video's `n_frames` is seen: at most `max_pixels`, and an even share of
    `total_pixels` for each pair, but never pressed below 1.05 times `min_pixels`.

    Smaller `min_pixels`/`max_pixels` than the default are kept. The official processor, called after the utilities
    without repeating them, would enlarge such frames again to 128 tokens.
    """
    if resized is not None:
        return fit_size(*resized, recipe.factor, recipe.min_pixels, MAX_FRAME_PIXELS, name)
    share = params.total_pixels / n_frames * FRAMES_STEP
    ceiling = max(min(MAX_FRAME_PIXELS, share), int(params.min_pixels * 1.05))
    return fit_size(height, width, recipe.factor, params.min_pixels, min(params.max_pixels, ceiling), name)


def frame_span(total: int, fps: float, start_s: float | None, end_s: float | None, name: str = "") -> tuple[int, int]:
    """First and last frame (inclusive) between two times of a clip of `total` frames.

    The one frame between close times is a span, where the official utilities want two.
    """
    duration_s = total / fps
    first = 0 if start_s is None else math.ceil(min(start_s, duration_s) * fps)
    last = total - 1 if end_s is None else min(math.floor(min(end_s, duration_s) * fps), total - 1)
    if first > last:
        between = f"between {start_s or 0.0:g} s and {end_s:g} s" if end_s is not None else f"from {start_s:g} s on"
        raise MediaError(
            f"{name or 'a video'} has no frame {between}: it is {duration_s:.2f} s long"
            f" ({total} frames at {fps:.4g} frames/s)",
            path=name,
            limit="start/end",
            hint="move the start or the end",
        )
    return first, last


def count_frames(available: int, fps: float, params: MediaParams, n_frames: int | None = None, name: str = "") -> int:
    """How many of `available` frames at `fps` the model sees: an even number (`smart_nframes`).

    A clip of one frame shows it twice, where the official utilities refuse it. Asking outright for more frames
    (`n_frames`) than there are is an `OptionError`.
    """
    most = max(available, FRAMES_STEP)
    if n_frames is not None:
        wanted = round(n_frames / FRAMES_STEP) * FRAMES_STEP
        if not FRAMES_STEP <= wanted <= most:
            raise OptionError(
                f"nframes is {n_frames}, but {name or 'the video'} can show {FRAMES_STEP} to {most} frames"
            )
        return wanted
    fewest = math.ceil(params.min_frames / FRAMES_STEP) * FRAMES_STEP
    limit = math.floor(params.max_frames / FRAMES_STEP) * FRAMES_STEP
    wanted_frames = min(max(available / fps * params.fps, fewest), limit, most)
    return math.floor(wanted_frames / FRAMES_STEP) * FRAMES_STEP


def every_frame(total: int) -> list[int]:
    """All of `total` frames that a caller has picked himself, the last one twice where they are odd in number."""
    return [*range(total), *([total - 1] if total % FRAMES_STEP else [])]
