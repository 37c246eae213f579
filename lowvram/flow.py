"""What travels between stages: a prompt ready to encode, its rows ready to think, and one thinker step.

Shapes use T prompt tokens, H the thinker's hidden size, F mel frames. All tensors here live on the host; a stage
carries to the device only what it computes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class VisualInput:
    """An image or a video inside the prompt, decoded only while it is being encoded.

    `grid` counts patches (temporal, height, width); `rows` [n] are its positions in the prompt, in the order in which
    the encoder returns features. `patches()` yields one temporal patch at a time, [height*width, 3*2*14*14] float32,
    patches in merge order as `Qwen2VLImageProcessor` lays them out; each call decodes anew. `content()`, where it is
    given, tells what they are made from, sooner than they would: two inputs that it names alike have the same patches.
    """

    grid: tuple[int, int, int]
    rows: Tensor
    patches: Callable[[], Iterator[Tensor]]
    content: Callable[[], str] | None = None


@dataclass(frozen=True)
class AudioInput:
    """A sound inside the prompt: `mel` [128, F] float32 log-mel, `rows` [n] its positions in the prompt."""

    mel: Tensor
    rows: Tensor


@dataclass(frozen=True)
class ModelInputs:
    """One prompt: ids and positions, and the media that fill its placeholders.

    `input_ids` [T] int64; `position_ids` [3, T] int64 (time, height, width); `next_position` numbers the first
    generated token in all three.
    """

    input_ids: Tensor
    position_ids: Tensor
    next_position: int
    visuals: tuple[VisualInput, ...] = ()
    audios: tuple[AudioInput, ...] = ()


@dataclass(frozen=True)
class PromptEmbeds:
    """The prompt as rows: `embeds` [T, H] with media features in place, `is_media` [T] bool marks those rows."""

    embeds: Tensor
    is_media: Tensor
    position_ids: Tensor
    next_position: int


@dataclass(frozen=True)
class ThinkerStep:
    """One generated text token. `reply_row` [H] is the talker's view of it: its embedding plus the thinker's last
    hidden state after reading it; None for the token that ends the answer, which nothing reads."""

    token_id: int
    reply_row: Tensor | None


class Attempt(Protocol):
    """How a stage gets a step done: everything it computes on the device goes through here, no block in use before.

    The step may wait, may find its weights elsewhere than the last one did, and is computed again after `undo` where
    the device ran out in the middle of it.
    """

    def __call__(self, step: Callable[[], T], undo: Callable[[], object] = ...) -> T: ...


def at_once(step: Callable[[], T], undo: Callable[[], object] = lambda: None) -> T:
    """The plainest way: nothing is waited for and nothing is tried twice."""
    return step()


class Weights(Protocol):
    """A run of blocks in the order in which a stage walks them.

    Entering a block puts its weights on the device and gives its module; leaving it lets the plan take the room back.
    """

    def __iter__(self) -> Iterator[AbstractContextManager[nn.Module]]: ...
