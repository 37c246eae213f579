"""The whole pipeline against transformers' own model: the same greedy text and the same greedy codec ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from clips import chirp, noise_picture
from reference import Pair, answer

from lowvram.events import Finished
from lowvram.options import TALKER_SAMPLING, MediaParams, SamplingParams, SpeechParams

MAX_TOKENS, MAX_CODES = 12, 20
GREEDY_SPEECH = replace(TALKER_SAMPLING, temperature=0.0, max_tokens=MAX_CODES)

Messages = list[dict[str, Any]]


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(seed: int) -> dict[str, Any]:
    return {"type": "image", "image": noise_picture(140 + 40 * seed, 200, seed)}


def audio(seconds: float, seed: int) -> dict[str, Any]:
    return {"type": "audio", "audio": chirp(seconds, seed)}


CONVERSATIONS: dict[str, Callable[[Callable[[bool], Path]], Messages]] = {
    "text": lambda clip: [user(text("tell me about the river"))],
    "image": lambda clip: [user(image(1), text("what is this?"))],
    "audio": lambda clip: [user(audio(2.5, 3), text("what do you hear?"))],
    "silent video": lambda clip: [user({"type": "video", "video": clip(False)}, text("describe"))],
    "video with sound": lambda clip: [user({"type": "video", "video": clip(True)}, text("describe"))],
    "mixed media": lambda clip: [
        user(image(0), text("and"), audio(1.7, 4), {"type": "video", "video": clip(False)}, image(2), text("compare"))
    ],
    "three turns": lambda clip: [
        user(text("look"), image(1)),
        {"role": "assistant", "content": "a green picture"},
        user(audio(1.0, 5)),
        {"role": "assistant", "content": [text("a tone")]},
        user(text("which came first?")),
    ],
}
SMALL_FRAMES = MediaParams(min_pixels=28 * 28, max_pixels=30 * 28 * 28)
"""The official floor of 128 tokens a frame would only be slower. 30 tokens still span several attention windows."""


def ours(pair: Pair, messages: Messages, voice: str) -> Finished:
    speech = SpeechParams(voice=voice, sampling=GREEDY_SPEECH, steps=2)
    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    *_, finished = pair.omni.generate(messages, sampling=sampling, speech=speech, media=SMALL_FRAMES)
    assert isinstance(finished, Finished)
    return finished


@pytest.mark.parametrize("voice", ["Chelsie", "Ethan"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_text_and_codec_ids_equal_the_references(pair: Pair, clip: Callable, kind: str, voice: str):
    messages = CONVERSATIONS[kind](clip)
    stop_ids = pair.omni.stop_ids
    with pair.omni.preprocessor.open(messages, SMALL_FRAMES) as prompt:
        expected = answer(
            pair.reference, prompt.inputs, voice=voice, stop_ids=stop_ids, max_tokens=MAX_TOKENS, max_codes=MAX_CODES
        )
    said = ours(pair, messages, voice)
    assert list(said.text_ids) == [i for i in expected.text_ids if i not in stop_ids]
    assert list(said.codec_ids) == expected.codec_ids
