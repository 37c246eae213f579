"""Messages and their media -> ModelInputs: the prompt's ids and positions, mel of its sounds, patches on demand.

Follows transformers' `Qwen2_5OmniProcessor` behind qwen-omni-utils, medium by medium. Ids, positions and mel are made
when a prompt is opened; pictures are decoded only while they are being encoded, a temporal patch at a time, so that
memory does not grow with the length of a clip.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Qwen2Tokenizer, WhisperFeatureExtractor

from ..errors import CheckpointError, LowVRAMError, MediaError, OptionError
from ..flow import AudioInput, ModelInputs, VisualInput
from ..media import (
    SOUND_RATE_HZ,
    Kind,
    Medium,
    Slides,
    Video,
    measure_sound,
    open_medium,
    open_video,
    read_image,
    read_sound,
)
from ..options import Limits, MediaParams
from .chat import ChatTokenizer
from .frames import (
    VisionRecipe,
    count_frames,
    every_frame,
    frame_indices,
    frame_size,
    frame_span,
    image_size,
    patchify,
    resize_frame,
    resize_image,
)
from .layout import (
    AudioSegment,
    Clock,
    ImageSegment,
    Layout,
    MediaTokens,
    Segment,
    TextSegment,
    VideoSegment,
    lay_out,
)
from .mel import MelRecipe, audio_tokens, log_mel
from .messages import MediaPart, read_messages

READABLE_AS: Mapping[str, tuple[str, ...]] = {"image": ("image",), "audio": ("audio", "video"), "video": ("video",)}
"""What a medium may be for each kind of part: the sound of a video is sound, too. The first picture of an animated one
(GIF, APNG, WebP) is an image."""

TRAINED_PROMPT_TOKENS = 32_768
"""The longest prompts that the published models were trained on. Their positions reach further, for a frame's tokens
share theirs."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MediumShape:
    """What one medium adds to a prompt: placeholders, and what its encoders will be given.

    `grid` counts patches (temporal, height, width), None for a sound; `mel_frames` is 0 where there is no sound.
    """

    name: str
    kind: Kind
    tokens: int
    grid: tuple[int, int, int] | None
    mel_frames: int


@dataclass(frozen=True)
class PromptShape:
    """A prompt in numbers, exact: the counts by kind add up to `prompt_tokens`; a video's sound counts as audio.

    `audio_windows` counts the windows of the audio tower over all sounds.
    """

    prompt_tokens: int
    text_tokens: int
    image_tokens: int
    audio_tokens: int
    video_tokens: int
    next_position: int
    media: tuple[MediumShape, ...]
    audio_windows: int

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """Patch grids of images and videos, in order."""
        return tuple(medium.grid for medium in self.media if medium.grid)

    @property
    def largest_visual_patches(self) -> int:
        """Patches of the largest temporal patch, which the vision tower must see whole."""
        return max((height * width for _, height, width in self.grids), default=0)


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to encode. Its `inputs` may be read only while the prompt is open."""

    inputs: ModelInputs
    shape: PromptShape


@dataclass(frozen=True)
class _Medium:
    """An opened medium: how many mel frames and which grid of patches it will give, and how to get them.

    A sound has no grid; a picture without sound has 0 mel frames.
    """

    name: str
    kind: Kind
    grid: tuple[int, int, int] | None = None
    patches: Callable[[], Iterator[Tensor]] | None = None
    seconds_per_patch: float = 0.0
    mel_frames: int = 0
    mel: Callable[[], Tensor] | None = None


class Preprocessor:
    """Prepares prompts for one checkpoint.

    `folder` holds the checkpoint's small files (tokenizer, chat template, preprocessor_config.json), `config` is its
    config.json. Raises `CheckpointError` where one of them is missing or does not fit the others.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        published = _read_json(folder / "preprocessor_config.json")
        try:
            self._vision = _vision_recipe(published)
            self._mel = _mel_recipe(published)
        except KeyError as error:
            path = str(folder / "preprocessor_config.json")
            raise CheckpointError(f"{path} lacks {error}", path=path) from error
        try:
            thinker = config["thinker_config"]
            self._tokens = _read_tokens(thinker)
            self._clock = Clock(thinker["position_id_per_seconds"], thinker["seconds_per_chunk"])
            self._max_positions = int(thinker["text_config"]["max_position_embeddings"])
            self._window_frames = 2 * int(thinker["audio_config"]["n_window"])
        except KeyError as error:
            raise CheckpointError(f"config.json lacks {error}", path=str(folder / "config.json")) from error
        self._chat = ChatTokenizer(_read_tokenizer(folder), folder, self._tokens)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer, by the tokenizer."""
        return self._chat.stop_ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens left out; unfinished characters become U+FFFD."""
        return self._chat.detokenize(ids)

    def tokenize(self, words: str) -> list[int]:
        """Ids of plain words; special tokens written in them are taken as words."""
        return self._chat.tokenize(words)

    def measure(
        self, messages: Sequence[Mapping[str, Any]], media: MediaParams | None = None, limits: Limits | None = None
    ) -> PromptShape:
        """The shape that the opened prompt will have, in flat memory.

        Of a video one frame is decoded, of a sound its length (see `media.measure_sound`), images whole. Raises and
        warns as `open` does, but for a prompt beyond a limit, whose shape is the answer to why.
        """
        with ExitStack() as stack:
            runs, opened = self._open_all(messages, media or MediaParams(), limits or Limits(), stack)
            shape = self._shape(self._lay_out(runs, opened), opened)
            _warn_beyond_training(shape)
            return shape

    @contextmanager
    def open(
        self, messages: Sequence[Mapping[str, Any]], media: MediaParams | None = None, limits: Limits | None = None
    ) -> Iterator[Prompt]:
        """Open a prompt's media, in order, and lay it out; on leaving, the media are closed.

        Sounds are decoded here, pictures by `inputs.visuals[i].patches()`. Raises OptionError for messages that make
        no sense or a prompt beyond a limit, MediaError for a medium that cannot be used or takes the prompt there.
        Logs one warning for a prompt of more than `TRAINED_PROMPT_TOKENS`.
        """
        limits = limits or Limits()
        with ExitStack() as stack:
            runs, opened = self._open_all(messages, media or MediaParams(), limits, stack)
            layout = self._lay_out(runs, opened)
            shape = self._shape(layout, opened)
            self._refuse_beyond(shape, limits)
            _warn_beyond_training(shape)
            yield Prompt(_model_inputs(layout, opened), shape)

    def _open_all(
        self, messages: Sequence[Mapping[str, Any]], params: MediaParams, limits: Limits, stack: ExitStack
    ) -> tuple[list[list[int]], list[_Medium]]:
        chat = read_messages(messages, params)
        parts = [part for message in chat for part in message.parts if isinstance(part, MediaPart)]
        return self._chat.encode(chat), [self._open_part(part, limits, stack) for part in parts]

    def _open_part(self, part: MediaPart, limits: Limits, stack: ExitStack) -> _Medium:
        medium = stack.enter_context(open_medium(part.source, limits))
        is_first_picture = part.kind == "image" and medium.is_animation
        if medium.kind not in READABLE_AS[part.kind] and not is_first_picture:
            raise MediaError(
                f"{part.where} says {part.kind}, but {medium.name} is of kind {medium.kind}", path=medium.name
            )
        openers = {"image": self._open_image, "audio": self._open_audio, "video": self._open_video}
        return openers[part.kind](part, medium, limits)

    def _open_image(self, part: MediaPart, medium: Medium, limits: Limits) -> _Medium:
        # Decoded for its size, which its orientation may turn, and forgotten until it is encoded.
        height, width, _ = read_image(medium, limits).shape
        size = image_size(height, width, self._vision, part.params, part.size, medium.name)
        patches = partial(self._image_patches, medium, size, limits)
        return _Medium(medium.name, "image", self._grid(1, size), patches)

    def _open_audio(self, part: MediaPart, medium: Medium, limits: Limits) -> _Medium:
        samples = measure_sound(medium, part.params.start_s, part.params.end_s)
        if not samples:
            raise MediaError(f"{medium.name} has 0 samples between its start and end", path=medium.name)
        mel = partial(self._listen, medium, part.params, limits)
        return _Medium(medium.name, "audio", mel_frames=self._mel.frames(samples), mel=mel)

    def _open_video(self, part: MediaPart, medium: Medium, limits: Limits) -> _Medium:
        video, params, vision = open_video(medium, limits), part.params, self._vision
        indices = self._choose_frames(video, part, all_of_them=isinstance(medium.content, Slides))
        n_frames = len(indices)
        size = frame_size(video.height, video.width, n_frames, vision, params, part.size, medium.name)
        opened = _Medium(
            medium.name,
            "video",
            self._grid(n_frames // vision.temporal_patch_size, size),
            partial(self._video_patches, video, indices, size),
            # As the processor's `fps` option: what was asked for, not what rounding made of it.
            vision.temporal_patch_size / params.fps,
        )
        samples = measure_sound(medium, params.start_s, params.end_s) if params.video_sound and video.has_sound else 0
        if not samples:
            return opened
        return replace(opened, mel_frames=self._mel.frames(samples), mel=partial(self._listen, medium, params, limits))

    def _choose_frames(self, video: Video, part: MediaPart, all_of_them: bool) -> list[int]:
        if all_of_them:
            return every_frame(video.frame_count)
        params = part.params
        first, last = frame_span(video.frame_count, video.fps, params.start_s, params.end_s, video.name)
        n_frames = count_frames(last - first + 1, video.fps, params, part.n_frames, video.name)
        return frame_indices(first, last, n_frames)

    def _listen(self, medium: Medium, params: MediaParams, limits: Limits) -> Tensor:
        return log_mel(read_sound(medium, params.start_s, params.end_s, limits), self._mel)

    def _grid(self, times: int, size: tuple[int, int]) -> tuple[int, int, int]:
        height, width = size
        return times, height // self._vision.patch_size, width // self._vision.patch_size

    def _image_patches(self, medium: Medium, size: tuple[int, int], limits: Limits) -> Iterator[Tensor]:
        still = resize_image(read_image(medium, limits), size)
        yield patchify(still.expand(self._vision.temporal_patch_size, *still.shape), self._vision)

    def _video_patches(self, video: Video, indices: Sequence[int], size: tuple[int, int]) -> Iterator[Tensor]:
        frames = (resize_frame(frame, size) for frame in video.frames(indices))
        while together := list(islice(frames, self._vision.temporal_patch_size)):
            yield patchify(torch.stack(together), self._vision)

    def _lay_out(self, runs: Sequence[Sequence[int]], opened: Sequence[_Medium]) -> Layout:
        segments: list[Segment] = [TextSegment(runs[0])]
        for medium, run in zip(opened, runs[1:], strict=True):
            segments += [self._segment(medium), TextSegment(run)]
        return lay_out(segments, self._tokens, self._clock)

    def _segment(self, medium: _Medium) -> Segment:
        sound_tokens = audio_tokens(medium.mel_frames) if medium.mel_frames else 0
        if medium.grid is None:
            return AudioSegment(sound_tokens)
        times, height, width = medium.grid
        height, width = height // self._vision.merge_size, width // self._vision.merge_size
        if medium.kind == "image":
            return ImageSegment(height, width)
        return VideoSegment(times, height, width, medium.seconds_per_patch, sound_tokens)

    def _shape(self, layout: Layout, opened: Sequence[_Medium]) -> PromptShape:
        placeholders = (self._tokens.image, self._tokens.audio, self._tokens.video)
        image, audio, video = (int((layout.input_ids == token).sum()) for token in placeholders)
        prompt_tokens = len(layout.input_ids)
        return PromptShape(
            prompt_tokens=prompt_tokens,
            text_tokens=prompt_tokens - image - audio - video,
            image_tokens=image,
            audio_tokens=audio,
            video_tokens=video,
            next_position=layout.next_position,
            media=tuple(
                MediumShape(m.name, m.kind, len(rows.picture) + len(rows.sound), m.grid, m.mel_frames)
                for m, rows in zip(opened, layout.rows, strict=True)
            ),
            audio_windows=sum(math.ceil(medium.mel_frames / self._window_frames) for medium in opened),
        )

    def _refuse_beyond(self, shape: PromptShape, limits: Limits) -> None:
        """Refuse what the caller bounds (tokens) or the checkpoint: positions, since a frame's tokens share theirs."""
        if limits.max_prompt_tokens is not None and shape.prompt_tokens > limits.max_prompt_tokens:
            raise _too_long(shape, "max_prompt_tokens", shape.prompt_tokens, limits.max_prompt_tokens)
        if shape.next_position >= self._max_positions:
            raise _too_long(shape, "max_position_embeddings", shape.next_position, self._max_positions)


def _warn_beyond_training(shape: PromptShape) -> None:
    if shape.prompt_tokens > TRAINED_PROMPT_TOKENS:
        log.warning(
            "the prompt takes %s tokens, but the model was trained on at most %s: quality is unknown beyond"
            " (max_pixels and fps make prompts shorter)",
            f"{shape.prompt_tokens:,}",
            f"{TRAINED_PROMPT_TOKENS:,}",
        )


def _too_long(shape: PromptShape, limit: str, needed: int, allowed: int) -> LowVRAMError:
    unit = "tokens" if limit == "max_prompt_tokens" else "positions"
    message = f"the prompt takes {needed:,} {unit}, but {limit} is {allowed:,}"
    if not shape.media:
        return OptionError(message, hint="shorten the text")
    costliest = max(shape.media, key=lambda medium: medium.tokens)
    return MediaError(
        f"{message}; its largest part is {costliest.name} with {costliest.tokens:,} tokens",
        path=costliest.name,
        limit=limit,
        hint="take a shorter cut (start, end), fewer frames (fps) or smaller ones (max_pixels)",
    )


def _model_inputs(layout: Layout, opened: Sequence[_Medium]) -> ModelInputs:
    placed = list(zip(opened, layout.rows, strict=True))
    return ModelInputs(
        layout.input_ids,
        layout.position_ids,
        layout.next_position,
        tuple(VisualInput(m.grid, rows.picture, m.patches) for m, rows in placed if m.grid and m.patches),
        tuple(AudioInput(m.mel(), rows.sound) for m, rows in placed if m.mel),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", path=str(path)) from error


def _vision_recipe(published: Mapping[str, Any]) -> VisionRecipe:
    # Newer files write the pixel bounds as edges of `size`, in pixels all the same.
    size = published.get("size") or {}
    return VisionRecipe(
        patch_size=published["patch_size"],
        merge_size=published["merge_size"],
        temporal_patch_size=published["temporal_patch_size"],
        mean=tuple(published["image_mean"]),
        std=tuple(published["image_std"]),
        min_pixels=published.get("min_pixels") or size["shortest_edge"],
        max_pixels=published.get("max_pixels") or size["longest_edge"],
    )


def _mel_recipe(published: Mapping[str, Any]) -> MelRecipe:
    names = ("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft")
    if published["sampling_rate"] != SOUND_RATE_HZ:
        raise CheckpointError(
            f"the checkpoint hears {published['sampling_rate']} Hz, where media give {SOUND_RATE_HZ} Hz"
        )
    extractor = WhisperFeatureExtractor(**{name: published[name] for name in names})
    return MelRecipe(
        extractor.hop_length,
        extractor.n_fft,
        extractor.n_samples,
        torch.from_numpy(extractor.mel_filters).float().T.contiguous(),
    )


def _read_tokens(thinker: Mapping[str, Any]) -> MediaTokens:
    def placeholder(kind: Kind) -> int:
        older = f"{kind}_token_index"
        return thinker[older] if older in thinker else thinker[f"{kind}_token_id"]

    return MediaTokens(
        image=placeholder("image"),
        audio=placeholder("audio"),
        video=placeholder("video"),
        audio_start=thinker["audio_start_token_id"],
        audio_end=thinker["audio_end_token_id"],
    )


def _read_tokenizer(folder: Path) -> Qwen2Tokenizer:
    try:
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}", path=str(folder)) from error
