"""Media -> how many tokens, patches and mel frames each adds to a prompt, in numbers alone: no pixels, no torch.

What is counted here before a model is loaded is what a prompt is then made of: `prompt` takes its grids and lengths
from the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, MediaError
from ..media import SOUND_RATE_HZ, Kind, Medium, Slides, Video, measure_sound, open_video, read_image
from ..options import Limits
from .frames import VisionRecipe, count_frames, every_frame, frame_size, frame_span, image_size

if TYPE_CHECKING:
    from .messages import MediaPart

READABLE_AS: Mapping[str, tuple[str, ...]] = {"image": ("image",), "audio": ("audio", "video"), "video": ("video",)}
"""What a medium may be for each kind of part: the sound of a video is sound, too. The first picture of an animated one
(GIF, APNG, WebP) is an image."""

FEWEST_MEL_FRAMES = 3
"""The fewest that make a token; a shorter sound counts as this long, padded with silence."""

AGREED = (
    ("patch_size", "vision_config", "patch_size"),
    ("merge_size", "vision_config", "spatial_merge_size"),
    ("temporal_patch_size", "vision_config", "temporal_patch_size"),
    ("feature_size", "audio_config", "num_mel_bins"),
)
"""What preprocessor_config.json calls by the first name, config.json calls by the last, in that section: what media are
cut into, and what the towers take."""

MOST_PIXELS = 10**9
MOST_SAMPLES = 10_000
"""Far above what a picture and a window of sound are, and small enough that nothing made of one takes all memory."""

Grid = tuple[int, int, int]
PromptSize = tuple[int, tuple[Grid, ...], int]
"""A prompt's tokens, the patch grids of pictures to encode, and windows of sound to encode."""


@dataclass(frozen=True)
class MediumShape:
    """What one medium adds to a prompt: placeholders, and what its encoders will be given.

    `grid` counts patches (temporal, height, width), None for a sound; `mel_frames` is 0 where there is no sound.
    """

    name: str
    kind: Kind
    tokens: int
    grid: Grid | None
    mel_frames: int


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint cuts media up: pictures into patches, sound into mel frames."""

    vision: VisionRecipe
    hop_samples: int

    def shape(self, name: str, kind: Kind, grid: Grid | None, samples: int) -> MediumShape:
        """A medium of these patches and, unless `samples` is 0, of that much sound."""
        frames = mel_frames(samples, self.hop_samples) if samples else 0
        tokens = audio_tokens(frames) if frames else 0
        if grid is not None:
            tokens += math.prod(self.tokens_along(grid))
        return MediumShape(name, kind, tokens, grid, frames)

    def grid(self, times: int, size: tuple[int, int]) -> Grid:
        """The patches of `times` pictures of (height, width) pixels."""
        height, width = size
        return times, height // self.vision.patch_size, width // self.vision.patch_size

    def tokens_along(self, grid: Grid) -> Grid:
        """Tokens of a grid in time, height and width."""
        times, height, width = grid
        return times, height // self.vision.merge_size, width // self.vision.merge_size

    def size(self, shape: MediumShape) -> tuple[int, int]:
        """Height and width in pixels at which the pictures of a medium are seen."""
        assert shape.grid is not None, shape
        return shape.grid[1] * self.vision.patch_size, shape.grid[2] * self.vision.patch_size


def read_recipe(preprocessor: Mapping[str, Any]) -> Recipe:
    """The recipe in a checkpoint's preprocessor_config.json. Raises KeyError where that lacks a key, ValueError for a
    size that is no such number and for anything but a number per colour."""
    if not isinstance(preprocessor, Mapping):
        raise ValueError(f"it holds {preprocessor!r}, not an object")
    vision = VisionRecipe(
        patch_size=read_size(preprocessor, "patch_size"),
        merge_size=read_size(preprocessor, "merge_size"),
        temporal_patch_size=read_size(preprocessor, "temporal_patch_size"),
        mean=_per_colour(preprocessor, "image_mean"),
        std=_per_colour(preprocessor, "image_std"),
        min_pixels=_pixels(preprocessor, "min_pixels", "shortest_edge"),
        max_pixels=_pixels(preprocessor, "max_pixels", "longest_edge"),
    )
    return Recipe(vision, read_size(preprocessor, "hop_length", MOST_SAMPLES))


def require_agreement(published: Mapping[str, Any], thinker: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError where the preprocessor_config.json at `path` and the thinker's config contradict each
    other."""
    for key, section, name in AGREED:
        expected = thinker.get(section, {}).get(name, published[key])
        if published[key] != expected:
            raise CheckpointError(
                f"{path} has a {key} of {published[key]}, but config.json a {name} of {expected}",
                path=str(path),
                hint="take both files from the same checkpoint",
            )


def _pixels(published: Mapping[str, Any], key: str, edge: str) -> int:
    """A bound on pixels. Newer files write it as an edge of `size`, in pixels all the same."""
    size = published.get("size")
    return read_size(published, key) if published.get(key) or not isinstance(size, Mapping) else read_size(size, edge)


def read_size(published: Mapping[str, Any], key: str, most: int = MOST_PIXELS) -> int:
    """A whole number from 1 to `most`. Raises KeyError where it is missing, ValueError where it is anything else."""
    size = published[key]
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
        raise ValueError(f"{key} is {size!r}, but must be a whole number from 1 to {most:,}")
    return size


def _per_colour(published: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    match published[key]:
        case [int() | float() as red, int() | float() as green, int() | float() as blue] if all(
            0 < value < math.inf for value in (red, green, blue)
        ):
            return red, green, blue
    raise ValueError(f"{key} is {published[key]!r}, but must be a number above 0 for each of 3 colours")


def window_frames(config: Mapping[str, Any]) -> int:
    """Mel frames in a window of the audio tower, by config.json. Raises KeyError where that lacks the key."""
    return 2 * int(config["thinker_config"]["audio_config"]["n_window"])


def audio_windows(mel_frames: int, window_frames: int) -> int:
    """Windows of the audio tower for a sound of so many mel frames."""
    return math.ceil(mel_frames / window_frames)


def kind_of(part: MediaPart, medium: Medium) -> Kind:
    """What a medium is for its message: what that says, or what the content is. Raises MediaError where they differ."""
    if part.kind == "file":
        return medium.kind
    if medium.kind not in READABLE_AS[part.kind] and not medium.is_animation:
        raise MediaError(
            f"{part.where} says {part.kind}, but {medium.name} is of kind {medium.kind}",
            path=medium.name,
            hint=f'make it {{"type": "{medium.kind}", "{medium.kind}": ...}}',
        )
    return part.kind


def count_medium(part: MediaPart, medium: Medium, recipe: Recipe, limits: Limits) -> MediumShape:
    """What an opened medium adds. Of a video one frame is decoded, of a sound its length, an image whole.

    Raises MediaError for a medium that is not what its message says, or cannot be used.
    """
    match kind_of(part, medium):
        case "image":
            height, width, _ = read_image(medium, limits).shape
            return count_image(part, medium.name, height, width, recipe)
        case "audio":
            return recipe.shape(medium.name, "audio", None, heard_samples(part, medium))
        case "video":
            video = open_video(medium, limits)
            return count_video(part, video, sound_samples(part, medium, video), recipe, is_picked(medium))


def count_image(part: MediaPart, name: str, height: int, width: int, recipe: Recipe) -> MediumShape:
    """What an image of that many pixels adds."""
    size = image_size(height, width, recipe.vision, part.params, part.size, name)
    return recipe.shape(name, "image", recipe.grid(1, size), 0)


def count_video(part: MediaPart, video: Video, samples: int, recipe: Recipe, picked: bool) -> MediumShape:
    """What a video with `samples` of sound (0: silent) adds; all of its frames are seen if they were `picked`."""
    n_frames = len(every_frame(video.frame_count)) if picked else shown_frames(part, video)[2]
    size = frame_size(video.height, video.width, n_frames, recipe.vision, part.params, part.size, video.name)
    grid = recipe.grid(n_frames // recipe.vision.temporal_patch_size, size)
    return recipe.shape(video.name, "video", grid, samples)


def shown_frames(part: MediaPart, video: Video) -> tuple[int, int, int]:
    """First and last frame (inclusive) of the cut, and how many of them the model sees."""
    params = part.params
    first, last = frame_span(video.frame_count, video.fps, params.start_s, params.end_s, video.name)
    return first, last, count_frames(last - first + 1, video.fps, params, part.n_frames, video.name)


def is_picked(medium: Medium) -> bool:
    """Whether a video is a list of frames that the caller has chosen himself."""
    return isinstance(medium.content, Slides)


def heard_samples(part: MediaPart, medium: Medium) -> int:
    """Samples of a sound between its start and end. Raises MediaError where there are none."""
    samples = measure_sound(medium, part.params.start_s, part.params.end_s)
    if not samples:
        raise MediaError(f"{medium.name} has 0 samples between its start and end", path=medium.name)
    return samples


def sound_samples(part: MediaPart, medium: Medium, video: Video) -> int:
    """Samples of the sound inside a video, 0 where there is none or none is wanted."""
    if not (part.params.video_sound and video.has_sound):
        return 0
    return measure_sound(medium, part.params.start_s, part.params.end_s)


def mel_frames(samples: int, hop_samples: int) -> int:
    """Mel frames of a sound of `samples` samples: one per hop begun, at least as many as one token takes."""
    return max(FEWEST_MEL_FRAMES, math.ceil(samples / hop_samples))


def audio_tokens(mel_frames: int) -> int:
    """Tokens the audio tower makes of `mel_frames` frames: a convolution of stride 2, then pairs averaged."""
    return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1


def samples_in(seconds: float) -> int:
    """Samples that the audio tower hears in that time."""
    return round(seconds * SOUND_RATE_HZ)
