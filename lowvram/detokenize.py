"""Token ids to text as it comes: a piece is shown only when it can no longer change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What a byte-level tokenizer decodes an unfinished character to."""


class TextStream:
    """Turns ids into pieces whose concatenation is the text of all ids.

    `decode` maps ids to text. Ids whose text ends in an unfinished character wait for the next one; only the ids since
    the last piece, with one piece of context before them, are decoded again.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that this id completes, possibly none yet."""
        self._ids.append(token_id)
        return self._piece(final=False)

    def finish(self) -> str:
        """Whatever still waits, unfinished characters included."""
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        now = self._decode(self._ids[self._context :])
        if now.endswith(REPLACEMENT) and not final:
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return now[len(before) :]
