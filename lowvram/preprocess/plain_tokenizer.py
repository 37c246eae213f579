"""A checkpoint's tokenizer.json and chat template, as far as a prompt is counted, without the modelling library.

`ChatTokenizer` asks its tokenizer for four things. Loading them by `tokenizers` and jinja2 alone takes no torch. The
ids are the library's, which splits text as Qwen2 does whatever tokenizer.json says; published ones say the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import AddedToken

TOKENIZER_FILE = "tokenizer.json"


class PlainTokenizer:
    """The tokenizer in `folder`. Raises CheckpointError where its file cannot be read."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / TOKENIZER_FILE
        try:
            self._tokenizer = Tokenizer.from_buffer(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}", path=str(path)) from error
        self._folder = folder

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Tokens outside of the vocabulary, special ones among them, by id."""
        return self._tokenizer.get_added_tokens_decoder()

    def encode(self, words: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
        """Ids of `words`; special tokens in them are words like others if they are to be split."""
        self._tokenizer.encode_special_tokens = split_special_tokens
        return self._tokenizer.encode(words, add_special_tokens=add_special_tokens).ids

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of one token."""
        return self._tokenizer.token_to_id(token)

    def apply_chat_template(
        self, turns: Sequence[Mapping[str, Any]], *, chat_template: str | None, tokenize: bool, **variables: object
    ) -> str:
        """The chat as text, by the given template or by the tokenizer's own. Raises TemplateError, ValueError."""
        assert not tokenize, "text is all that is asked for"
        template = self._own_template() if chat_template is None else chat_template
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        sandbox.globals["raise_exception"] = _raise
        return sandbox.from_string(template).render(messages=turns, **variables)

    def _own_template(self) -> str:
        """From its newest place, or else from tokenizer_config.json."""
        newest = self._folder / "chat_template.jinja"
        if newest.exists():
            return newest.read_text(encoding="utf-8")
        try:
            text = (self._folder / "tokenizer_config.json").read_text(encoding="utf-8")
            return str(json.loads(text)["chat_template"])
        except (OSError, LookupError, TypeError) as error:
            raise ValueError(f"{self._folder} has no chat template") from error


def _raise(message: str) -> None:
    raise TemplateError(message)
