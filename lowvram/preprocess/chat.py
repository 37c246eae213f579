"""A chat as token ids, by the checkpoint's own tokenizer and template, and generated ids as text.

Special tokens count only where the template wrote them. In the words of a message they are encoded as the characters
they are made of, so that nobody can forge a turn or a medium by writing `<|im_end|>` or `<|IMAGE|>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from ..errors import CheckpointError
from .messages import MediaPart, Message, TextPart

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

    from ..media import Kind
    from .plain_tokenizer import PlainTokenizer


@dataclass(frozen=True)
class MediaTokens:
    """Ids of the placeholders, and of the tokens that open and close the sound inside a video."""

    image: int
    audio: int
    video: int
    audio_start: int
    audio_end: int


def read_media_tokens(thinker: Mapping[str, Any]) -> MediaTokens:
    """The ids in a thinker's config, in either spelling of their keys. Raises KeyError where it lacks one."""

    def placeholder(kind: Kind) -> int:
        older = f"{kind}_token_index"
        return cast(int, thinker[older] if older in thinker else thinker[f"{kind}_token_id"])

    return MediaTokens(
        image=placeholder("image"),
        audio=placeholder("audio"),
        video=placeholder("video"),
        audio_start=thinker["audio_start_token_id"],
        audio_end=thinker["audio_end_token_id"],
    )


class ChatTokenizer:
    """A checkpoint's tokenizer with the chat template in its `folder`; `tokens` are the media's ids by config.json.

    A `PlainTokenizer` is enough to `encode`; what is about answers asks for the library's.

    Raises `CheckpointError` where the template cannot be read or the tokenizer does not know `tokens`.
    """

    def __init__(self, tokenizer: Qwen2Tokenizer | PlainTokenizer, folder: Path, tokens: MediaTokens) -> None:
        self._tokenizer: Any = tokenizer
        self._template = _read_template(folder)
        self._kinds: dict[int, Kind] = {tokens.image: "image", tokens.audio: "audio", tokens.video: "video"}
        special = {i: token.content for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        for name, token in vars(tokens).items():
            if token not in special:
                raise CheckpointError(
                    f"the tokenizer in {folder} has no special token {token}, which config.json names for {name}",
                    path=str(folder),
                    hint="tokenizer and config.json must come from the same checkpoint",
                )
        longest_first = sorted(special.values(), key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @property
    def stop_ids(self) -> frozenset[int]:
        """The id that the tokenizer ends an answer with, if it names one."""
        end = self._tokenizer.eos_token_id
        return frozenset() if end is None else frozenset({end})

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens left out; unfinished characters become U+FFFD."""
        return cast(str, self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def tokenize(self, words: str) -> list[int]:
        """Ids of plain words; special tokens written in them are taken as words."""
        return cast("list[int]", self._tokenizer.encode(words, add_special_tokens=False, split_special_tokens=True))

    def encode(self, chat: Sequence[Message]) -> list[list[int]]:
        """Ids of the chat and of the answer's beginning: the run before the first medium, between media, after the
        last. Media themselves are left out; what opens and closes them is not.

        Equal to tokenizing the rendered chat whole, since a tokenizer takes special tokens out first.
        """
        mark = _unused_character(chat)
        runs: list[list[int]] = [[]]
        kinds: list[Kind] = []
        for index, piece in enumerate(self._special.split(self._render(chat, mark))):
            if index % 2 == 0:
                runs[-1] += self.tokenize(piece.replace(mark, ""))
            elif (token := self._tokenizer.convert_tokens_to_ids(piece)) in self._kinds:
                kinds.append(self._kinds[token])
                runs.append([])
            else:
                runs[-1].append(cast(int, token))
        _check_places(kinds, chat)
        return runs

    def _render(self, chat: Sequence[Message], mark: str) -> str:
        """The template's text, with `mark` inside special tokens that a part's words hold, and after its last word."""

        def disarm(words: str) -> str:
            return self._special.sub(lambda found: found[0][0] + mark + found[0][1:], words) + mark

        def content(part: TextPart | MediaPart) -> dict[str, str]:
            if isinstance(part, TextPart):
                return {"type": "text", "text": disarm(part.text)}
            return {"type": part.kind, part.kind: ""}

        turns: list[dict[str, Any]] = [
            {"role": turn.role, "content": [content(part) for part in turn.parts]} for turn in chat
        ]
        try:
            rendered = self._tokenizer.apply_chat_template(
                turns, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError) as error:
            raise CheckpointError(f"the chat template does not render: {error}", path="chat_template") from error
        return cast(str, rendered)


def _check_places(kinds: Sequence[Kind], chat: Sequence[Message]) -> None:
    wanted = [part.kind for turn in chat for part in turn.parts if isinstance(part, MediaPart)]
    if kinds != wanted:
        raise CheckpointError(
            f"the chat template has places for {', '.join(kinds) or 'no media'}, where the messages have"
            f" {', '.join(wanted) or 'none'}",
            path="chat_template",
            hint="use the template published with the checkpoint",
        )


def _unused_character(chat: Sequence[Message]) -> str:
    """A private-use character that no text of the chat contains."""
    used = {letter for turn in chat for part in turn.parts if isinstance(part, TextPart) for letter in part.text}
    return next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in used)


def _read_template(folder: Path) -> str | None:
    """The template in a JSON file, as first published; None where the tokenizer reads a newer place itself."""
    path = folder / "chat_template.json"
    if (folder / "chat_template.jinja").exists() or not path.exists():
        return None
    try:
        template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
        if isinstance(template, str):
            return template
        raise TypeError(f"chat_template is {template!r}, but must be text")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}", path=str(path)) from error
