from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowvram.flow import PromptEmbeds, ThinkerStep
from lowvram.offload.plan import Phase, Placement
from lowvram.options import TALKER_SAMPLING
from lowvram.runtime import OmniRuntime
from lowvram.sampling import Sampler
from lowvram.talker import Talker, TextRows, seen_by_penalty, talk

CPU = torch.device("cpu")
GREEDY = replace(TALKER_SAMPLING, temperature=0.0)
PROMPT_TOKENS = 6


class Stage:
    """A talker with its weights in place, and a prompt and a reply of fixed random rows."""

    params = GREEDY

    def __init__(self, omni: OmniRuntime) -> None:
        residency = omni._machine.residency
        list(residency.enter(Phase("talk", ("talker",), {"talker": Placement.PHASE}, 0, 0, 0, 0)))
        *layers, rest = residency.component("talker")
        self.speech = omni._machine.model.speech
        self.talker = Talker(self.speech, tuple(layers), rest)
        generator = torch.Generator().manual_seed(0)
        width = self.speech.codec_embed.width
        self.rows = torch.randn(PROMPT_TOKENS, width, generator=generator)
        self.reply = torch.randn(5, width, generator=generator)
        self.text_rows = TextRows(*torch.randn(3, width, generator=generator))

    def say(self, steps: Iterator[ThinkerStep], max_codes: int = 12, chunk_tokens: int = 64) -> Iterator[int]:
        positions = torch.arange(PROMPT_TOKENS).expand(3, -1)
        prompt = PromptEmbeds(self.rows, torch.zeros(PROMPT_TOKENS, dtype=torch.bool), positions, PROMPT_TOKENS)
        ids = self.speech.codec_ids
        sampler = Sampler(
            self.params,
            vocab_size=len(self.speech.codec_embed),
            device=CPU,
            seed=0,
            suppressed=[ids.start],
            seen=seen_by_penalty(ids),
        )
        cache = self.speech.decoder.new_cache(PROMPT_TOKENS + 2 + max_codes, CPU)
        return talk(
            self.talker,
            prompt,
            self.rows,
            steps,
            self.text_rows,
            cache,
            sampler,
            chunk_tokens=lambda: chunk_tokens,
            max_codes=max_codes,
            device=CPU,
        )

    def steps(self, count: int = 5) -> Iterator[ThinkerStep]:
        yield from (ThinkerStep(i, self.reply[i]) for i in range(count))
        yield ThinkerStep(99, None)


@pytest.fixture
def stage(omni: OmniRuntime) -> Stage:
    return Stage(omni)


def test_code_i_needs_reply_row_i_plus_1_and_no_more(stage: Stage):
    drawn = 0

    def counting() -> Iterator[ThinkerStep]:
        nonlocal drawn
        for step in stage.steps():
            drawn += 1
            yield step

    codes = stage.say(counting())
    needed = []
    for _ in range(4):
        next(codes)
        needed.append(drawn)
    assert needed == [1, 2, 3, 4]


def test_following_the_thinker_says_what_waiting_for_it_would(stage: Stage):
    assert list(stage.say(stage.steps())) == list(stage.say(iter(list(stage.steps()))))


def test_a_later_row_cannot_change_an_earlier_code(stage: Stage):
    whole = list(stage.say(stage.steps()))
    stage.reply[4] += 10
    changed = list(stage.say(stage.steps()))
    assert changed[:4] == whole[:4]
    assert changed != whole


def test_the_end_row_and_the_pad_row_carry_speech_on(stage: Stage):
    whole = list(stage.say(stage.steps()))
    stage.text_rows = replace(stage.text_rows, end=stage.text_rows.end + 10)
    assert list(stage.say(stage.steps())) != whole


def test_prompt_chunks_change_nothing(stage: Stage):
    assert list(stage.say(stage.steps(), chunk_tokens=2)) == list(stage.say(stage.steps()))


class Fragile:
    """A block of which every third use finds no room."""

    def __init__(self, block: AbstractContextManager[nn.Module]) -> None:
        self._block = block
        self._uses = count(1)
        self.failures = 0

    def __enter__(self) -> nn.Module:
        if next(self._uses) % 3 == 0:
            self.failures += 1
            raise torch.OutOfMemoryError("no room")
        return self._block.__enter__()

    def __exit__(self, *details: Any) -> None:
        self._block.__exit__(*details)


def tried_twice(step: Callable[[], Any], undo: Callable[[], object] = lambda: None) -> Any:
    with suppress(torch.OutOfMemoryError):
        return step()
    undo()
    return step()


@pytest.mark.parametrize("part", ["the last layer", "the head"])
def test_a_step_that_fails_midway_is_taken_again(stage: Stage, part: str):
    stage.params = TALKER_SAMPLING
    whole = list(stage.say(stage.steps()))
    *layers, last = stage.talker.layers
    fragile = Fragile(stage.talker.rest if part == "the head" else last)
    parts = {"rest": fragile} if part == "the head" else {"layers": (*layers, fragile)}
    stage.talker = replace(stage.talker, attempt=tried_twice, **parts)
    assert list(stage.say(stage.steps())) == whole
    assert fragile.failures > 3


def test_a_reply_without_words_has_no_speech(stage: Stage):
    assert list(stage.say(stage.steps(0))) == []


def test_no_more_codes_than_allowed(stage: Stage):
    assert len(list(stage.say(stage.steps(), max_codes=3))) == 3


def test_the_penalty_has_seen_mask_pad_and_start(demo: Path, stage: Stage):
    """The reference's talker prompt is mask for every prompt token, then pad, then start."""
    ids = stage.speech.codec_ids
    assert seen_by_penalty(ids).tolist() == [ids.mask, ids.pad, ids.start]
