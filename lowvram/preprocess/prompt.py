"""Messages and their media -> ModelInputs: the prompt's ids and positions, mel of its sounds, patches on demand.

Follows transformers' `Qwen2_5OmniProcessor` behind qwen-omni-utils, medium by medium. Ids, positions and mel are made
when a prompt is opened; pictures are decoded only while they are being encoded, a temporal patch at a time, so that
memory does not grow with the length of a clip.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    Medium,
    Video,
    open_medium,
    open_video,
    read_image,
    read_sound,
)
from ..media.sources import Stored
from ..options import Limits, MediaParams
from .chat import ChatTokenizer, read_media_tokens
from .counts import (
    MOST_SAMPLES,
    MediumShape,
    PromptSize,
    audio_windows,
    count_image,
    count_video,
    heard_samples,
    is_picked,
    kind_of,
    read_recipe,
    read_size,
    require_agreement,
    shown_frames,
    sound_samples,
    window_frames,
)
from .frames import every_frame
from .layout import (
    AudioSegment,
    Clock,
    ImageSegment,
    Layout,
    Segment,
    TextSegment,
    VideoSegment,
    lay_out,
)
from .mel import MelRecipe, log_mel
from .messages import MediaPart, read_messages, with_kinds
from .pixels import frame_indices, patchify, resize_frame, resize_image

TRAINED_PROMPT_TOKENS = 32_768
"""The longest prompts that the published models were trained on. Their positions reach further, for a frame's tokens
share theirs."""

log = logging.getLogger(__name__)


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
    def size(self) -> PromptSize:
        """All of it, for a plan."""
        return self.prompt_tokens, self.grids, self.audio_windows

    def __str__(self) -> str:
        kinds = (
            f"{self.text_tokens} text, {self.image_tokens} image, {self.audio_tokens} audio, {self.video_tokens} video"
        )
        media = (f"{medium.tokens:>8}  {medium.kind}  {medium.name}" for medium in self.media)
        return "\n".join([f"{self.prompt_tokens} prompt tokens: {kinds}", *media])


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to encode. Its `inputs` may be read only while the prompt is open."""

    inputs: ModelInputs
    shape: PromptShape


@dataclass(frozen=True)
class _Medium:
    """An opened medium: what it adds to the prompt, and how to get its patches and its mel, where it has them."""

    shape: MediumShape
    patches: Callable[[], Iterator[Tensor]] | None = None
    seconds_per_patch: float = 0.0
    content: Callable[[], str] | None = None
    mel: Callable[[], Tensor] | None = None


class Preprocessor:
    """Prepares prompts for one checkpoint.

    `folder` holds the checkpoint's small files (tokenizer, chat template, preprocessor_config.json), `config` is its
    config.json. Raises `CheckpointError` where one of them is missing or does not fit the others.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        path = folder / "preprocessor_config.json"
        published = _read_json(path)
        try:
            self._recipe = read_recipe(published)
            self._mel = _mel_recipe(published)
        except KeyError as error:
            raise CheckpointError(f"{path} lacks {error}", path=str(path)) from error
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} makes no sense: {error}", path=str(path)) from error
        try:
            thinker = config["thinker_config"]
            self._tokens = read_media_tokens(thinker)
            self._clock = Clock(thinker["position_id_per_seconds"], thinker["seconds_per_chunk"])
            self._max_positions = int(thinker["text_config"]["max_position_embeddings"])
            self._window_frames = window_frames(config)
            require_agreement(published, thinker, path)
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
        opened = [self._open_part(part, limits, stack) for part in parts]
        return self._chat.encode(with_kinds(chat, (medium.shape.kind for medium in opened))), opened

    def _open_part(self, part: MediaPart, limits: Limits, stack: ExitStack) -> _Medium:
        medium = stack.enter_context(open_medium(part.source, limits))
        openers = {"image": self._open_image, "audio": self._open_audio, "video": self._open_video}
        return openers[kind_of(part, medium)](part, medium, limits)

    def _open_image(self, part: MediaPart, medium: Medium, limits: Limits) -> _Medium:
        # Decoded for its size, which its orientation may turn, and forgotten until it is encoded.
        height, width, _ = read_image(medium, limits).shape
        shape = count_image(part, medium.name, height, width, self._recipe)
        return _Medium(shape, partial(self._image_patches, medium, shape, limits))

    def _open_audio(self, part: MediaPart, medium: Medium, limits: Limits) -> _Medium:
        shape = self._recipe.shape(medium.name, "audio", None, heard_samples(part, medium))
        return _Medium(shape, mel=partial(self._listen, medium, part.params, limits))

    def _open_video(self, part: MediaPart, medium: Medium, limits: Limits) -> _Medium:
        video, picked = open_video(medium, limits), is_picked(medium)
        samples = sound_samples(part, medium, video)
        shape = count_video(part, video, samples, self._recipe, picked)
        indices = every_frame(video.frame_count) if picked else frame_indices(*shown_frames(part, video))
        return _Medium(
            shape,
            partial(self._video_patches, video, indices, shape),
            # As the processor's `fps` option: what was asked for, not what rounding made of it.
            self._recipe.vision.temporal_patch_size / part.params.fps,
            partial(_clip_content, medium.content, indices, shape) if isinstance(medium.content, Stored) else None,
            partial(self._listen, medium, part.params, limits) if samples else None,
        )

    def _listen(self, medium: Medium, params: MediaParams, limits: Limits) -> Tensor:
        return log_mel(read_sound(medium, params.start_s, params.end_s, limits), self._mel)

    def _image_patches(self, medium: Medium, shape: MediumShape, limits: Limits) -> Iterator[Tensor]:
        vision = self._recipe.vision
        still = resize_image(read_image(medium, limits), self._recipe.size(shape))
        yield patchify(still.expand(vision.temporal_patch_size, *still.shape), vision)

    def _video_patches(self, video: Video, indices: Sequence[int], shape: MediumShape) -> Iterator[Tensor]:
        vision, size = self._recipe.vision, self._recipe.size(shape)
        frames = (resize_frame(frame, size) for frame in video.frames(indices))
        while together := list(islice(frames, vision.temporal_patch_size)):
            yield patchify(torch.stack(together), vision)

    def _lay_out(self, runs: Sequence[Sequence[int]], opened: Sequence[_Medium]) -> Layout:
        segments: list[Segment] = [TextSegment(runs[0])]
        for medium, run in zip(opened, runs[1:], strict=True):
            segments += [self._segment(medium), TextSegment(run)]
        return lay_out(segments, self._tokens, self._clock)

    def _segment(self, medium: _Medium) -> Segment:
        shape = medium.shape
        if shape.grid is None:
            return AudioSegment(shape.tokens)
        times, height, width = self._recipe.tokens_along(shape.grid)
        if shape.kind == "image":
            return ImageSegment(height, width)
        return VideoSegment(times, height, width, medium.seconds_per_patch, shape.tokens - times * height * width)

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
            media=tuple(medium.shape for medium in opened),
            audio_windows=sum(audio_windows(medium.shape.mel_frames, self._window_frames) for medium in opened),
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
    costliest = max(shape.media, key=lambda medium: medium.tokens, default=None)
    if costliest is None or costliest.tokens < shape.text_tokens:
        return OptionError(f"{message}; {shape.text_tokens:,} tokens of it are text", hint="shorten the text")
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
        tuple(
            VisualInput(m.shape.grid, rows.picture, m.patches, m.content)
            for m, rows in placed
            if m.shape.grid and m.patches
        ),
        tuple(AudioInput(m.mel(), rows.sound) for m, rows in placed if m.mel),
    )


def _clip_content(stored: Stored, indices: Sequence[int], shape: MediumShape) -> str:
    """What the patches of a clip are made from: its bytes, the frames that are shown, and their size."""
    return f"{stored.digest()} {shape.grid} {[*indices]}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", path=str(path)) from error


def _mel_recipe(published: Mapping[str, Any]) -> MelRecipe:
    names = ("feature_size", "hop_length", "chunk_length", "n_fft")
    sizes = {name: read_size(published, name, MOST_SAMPLES) for name in names}
    if sizes["n_fft"] % 2:
        raise ValueError(f"n_fft is {sizes['n_fft']}, but must be even")
    if published["sampling_rate"] != SOUND_RATE_HZ:
        raise CheckpointError(
            f"the checkpoint hears {published['sampling_rate']} Hz, where media give {SOUND_RATE_HZ} Hz"
        )
    extractor = WhisperFeatureExtractor(sampling_rate=SOUND_RATE_HZ, **sizes)
    return MelRecipe(
        extractor.hop_length,
        extractor.n_fft,
        extractor.n_samples,
        torch.from_numpy(extractor.mel_filters).float().T.contiguous(),
    )


def _read_tokenizer(folder: Path) -> Qwen2Tokenizer:
    try:
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}", path=str(folder)) from error
