"""What was read of one prompt -> where the next one may begin that starts like it.

Who asks again about a clip sends the same media behind the same words. What the thinker made of them, its keys and
values and the rows that the talker hears, waits on the host meanwhile: a prompt is read from where it differs, and
media that lie before are not encoded again. Only what was read is kept, never what was written: a reply comes back
inside the next prompt, and is read there as the reference reads it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .flow import AudioInput, ModelInputs, VisualInput
from .kv_cache import KVCache

log = logging.getLogger(__name__)

Encoded = VisualInput | AudioInput
Mark = tuple[str, bytes]
"""A medium by its content, and by the rows of the prompt that it fills."""


@dataclass(frozen=True)
class Remembered:
    """The beginning of a prompt, n tokens of it, on the host: `heads` are what a cache holds of them, `talker_rows`
    [n, H] what the talker hears, where there was one. `media` are all that the prompt had."""

    input_ids: Tensor
    position_ids: Tensor
    media: frozenset[Mark]
    heads: tuple[Tensor, ...]
    talker_rows: Tensor | None


class Recall:
    """What stays of the last prompt, in at most `most_bytes` of the host's memory; 0 keeps nothing."""

    def __init__(self, most_bytes: int = 0) -> None:
        self.most_bytes = most_bytes
        self.last: Remembered | None = None

    def reading(self, inputs: ModelInputs, *, talks: bool) -> Reading:
        """A prompt to be read, from where it differs from the last one. `talks`: a talker will hear it."""
        if not self.most_bytes:
            return Reading(inputs)
        media: tuple[Encoded, ...] = (*inputs.visuals, *inputs.audios)
        marks = [_mark(medium) for medium in media]
        unknown = [medium for medium, mark in zip(media, marks, strict=True) if not self._knows(mark)]
        return Reading(inputs, self, self._known_tokens(inputs, unknown, talks=talks), frozenset(marks))

    def _knows(self, mark: Mark) -> bool:
        return self.last is not None and mark in self.last.media

    def _known_tokens(self, inputs: ModelInputs, unknown: Sequence[Encoded], *, talks: bool) -> int:
        """How many tokens at the beginning are the last prompt's, at the same positions and before `unknown` media."""
        last = self.last
        if last is None or (talks and last.talker_rows is None):
            return 0
        most = min(len(last.input_ids), len(inputs.input_ids) - 1)  # the last is read again, for what follows it
        differs = (last.input_ids[:most] != inputs.input_ids[:most]) | (
            last.position_ids[:, :most] != inputs.position_ids[:, :most]
        ).any(0)
        known = int(differs.nonzero()[0]) if differs.any() else most
        return min([known, *(int(medium.rows[0]) for medium in unknown)])


class Reading:
    """One prompt on its way through the thinker: what of it is known, and what shall stay of it."""

    def __init__(
        self,
        inputs: ModelInputs,
        recall: Recall | None = None,
        known_tokens: int = 0,
        media: frozenset[Mark] = frozenset(),
    ) -> None:
        self.inputs, self.known_tokens = inputs, known_tokens
        self._recall, self._media = recall, media

    @property
    def visuals(self) -> tuple[VisualInput, ...]:
        """Images and videos that are still to be encoded."""
        return tuple(visual for visual in self.inputs.visuals if int(visual.rows[-1]) >= self.known_tokens)

    @property
    def audios(self) -> tuple[AudioInput, ...]:
        """Sounds that are still to be encoded."""
        return tuple(audio for audio in self.inputs.audios if int(audio.rows[-1]) >= self.known_tokens)

    def recall(self, cache: KVCache, talker_rows: Tensor | None) -> None:
        """Bring what is known into an empty cache and the rows [T, H] of this prompt. It is then no longer kept."""
        if self._recall is None or self._recall.last is None or not self.known_tokens:
            return
        last = self._recall.last
        cache.resume(last.heads, self.known_tokens)
        if talker_rows is not None and last.talker_rows is not None:
            talker_rows[: self.known_tokens] = last.talker_rows[: self.known_tokens]
        self._recall.last = None

    def keep(self, cache: KVCache, talker_rows: Tensor | None, read_tokens: int) -> None:
        """Remember the first `read_tokens` of this prompt, or as many of them as there is memory for. Where that fails,
        the next prompt is read whole."""
        if self._recall is None:
            return
        row_bytes = 0 if talker_rows is None else talker_rows.nbytes // len(talker_rows)
        n = min(read_tokens, self._recall.most_bytes // (cache.bytes_per_token + row_bytes))
        if not n:
            return
        self._recall.last = None  # first: there is one copy at a time
        try:
            self._recall.last = Remembered(
                self.inputs.input_ids[:n],
                self.inputs.position_ids[:, :n],
                self._media,
                cache.first(n),
                None if talker_rows is None else talker_rows[:n].clone(),
            )
        except (RuntimeError, MemoryError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__  # Python's own MemoryError says nothing
            log.warning("the next prompt will be read from its beginning: %s", reason)


def _mark(medium: Encoded) -> Mark:
    if isinstance(medium, AudioInput):
        content = _digest([medium.mel])
    else:
        content = medium.content() if medium.content else _digest(medium.patches())
    return content, medium.rows.numpy().tobytes()


def _digest(tensors: Iterable[Tensor]) -> str:
    """What tensors on the host hold."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.reshape(-1).numpy().data)
    return found.hexdigest()
