from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lowvram.detokenize import TextStream


def decode_bytes(ids: Sequence[int]) -> str:
    """A byte-level tokenizer whose ids are bytes."""
    return bytes(ids).decode(errors="replace")


@given(st.text())
def test_pieces_add_up_to_the_whole_text(text: str):
    stream = TextStream(decode_bytes)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join([*pieces, stream.finish()]) == text


@given(st.text())
def test_no_piece_holds_half_a_character(text: str):
    stream = TextStream(decode_bytes)
    assert all("\ufffd" not in stream.push(byte) for byte in text.replace("\ufffd", "").encode())


def test_an_unfinished_character_at_the_end_is_shown_as_such():
    stream = TextStream(decode_bytes)
    assert [stream.push(byte) for byte in "ä".encode()[:1]] == [""]
    assert stream.finish() == "\ufffd"


def test_finishing_twice_adds_nothing():
    stream = TextStream(decode_bytes)
    stream.push(65)
    assert stream.finish() == stream.finish() == ""


def test_context_dependent_spacing_is_kept():
    """Some tokenizers drop the space of a first word: decoding a piece alone would lose it."""
    words = {0: "Hello", 1: " world"}
    stream = TextStream(lambda ids: "".join(words[i] for i in ids).lstrip())
    assert stream.push(0) + stream.push(1) == "Hello world"
