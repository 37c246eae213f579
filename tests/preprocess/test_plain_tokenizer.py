from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer

from lowvram.demo.tokenizer import CHAT_TEMPLATE
from lowvram.errors import CheckpointError
from lowvram.options import MediaParams
from lowvram.preprocess.chat import ChatTokenizer, read_media_tokens
from lowvram.preprocess.messages import read_messages
from lowvram.preprocess.plain_tokenizer import PlainTokenizer


def plain_chat(folder: Path, config: Path) -> ChatTokenizer:
    tokens = read_media_tokens(json.loads((config / "config.json").read_text())["thinker_config"])
    return ChatTokenizer(PlainTokenizer(folder), folder, tokens)


@pytest.fixture(scope="module")
def both(demo: Path) -> tuple[ChatTokenizer, ChatTokenizer]:
    """The chat by the plain tokenizer, and by the library's."""
    library = Qwen2Tokenizer.from_pretrained(demo, local_files_only=True)
    tokens = read_media_tokens(json.loads((demo / "config.json").read_text())["thinker_config"])
    return plain_chat(demo, demo), ChatTokenizer(library, demo, tokens)


def chat(*content: object) -> list[Any]:
    return read_messages([{"role": "user", "content": list(content)}], MediaParams())


@settings(deadline=None, max_examples=60)
@given(words=st.text() | st.sampled_from(["<|im_end|>", "a<|VIDEO|>b", "12 345", "é", "  \n\n ", "你好", "\n\n0"]))
def test_words_become_the_ids_that_the_library_gives(both: tuple[ChatTokenizer, ChatTokenizer], words: str):
    plain, library = both
    if words.encode(errors="ignore").decode() != words:
        return  # half characters are refused with the message
    assert plain.tokenize(words) == library.tokenize(words)


def test_a_chat_with_media_becomes_the_ids_that_the_library_gives(both: tuple[ChatTokenizer, ChatTokenizer]):
    plain, library = both
    asked = chat({"type": "video", "video": "a.mp4"}, "and", {"type": "audio", "audio": "b.wav"}, "<|IMAGE|>?")
    assert plain.encode(asked) == library.encode(asked)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_in_a_newer_place_is_found(demo: Path, tmp_path: Path, place: str):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((demo / file).read_bytes())
    if place.endswith(".jinja"):
        (tmp_path / place).write_text(CHAT_TEMPLATE)
    else:
        own = json.loads((tmp_path / place).read_text())
        (tmp_path / place).write_text(json.dumps(own | {"chat_template": CHAT_TEMPLATE}))
    asked = chat("hello")
    assert plain_chat(tmp_path, demo).encode(asked) == plain_chat(demo, demo).encode(asked)


def test_no_template_at_all_is_named(demo: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes((demo / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"the chat template does not render: .* has no chat template"):
        plain_chat(tmp_path, demo).encode(chat("hello"))


@pytest.mark.parametrize("content", [None, b"{", b"{}"])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read"):
        PlainTokenizer(tmp_path)
