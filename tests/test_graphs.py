"""Captured steps say what steps one by one say. A tape stands for a card's graph: it repeats what it has recorded, so
that any number of the host, any shape and any address that belongs to one step alone would be heard in the next."""

from __future__ import annotations

import gc
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from tape import Operators, Tape
from test_room import Turn, runs_out

from lowvram import graphs
from lowvram.events import AudioChunk, Finished, TextDelta
from lowvram.flow import Attempt, PromptEmbeds, ThinkerStep, at_once
from lowvram.graphs import CapturedSteps, CudaRecorder, Stepping, one_by_one, open_recorder
from lowvram.offload.budget import Budget
from lowvram.offload.plan import Phase, Placement
from lowvram.options import TALKER_SAMPLING, Limits, SamplingParams, SpeechParams
from lowvram.runtime import OmniRuntime
from lowvram.sampling import Sampler
from lowvram.talker import Talker, TextRows, seen_by_penalty, talk
from lowvram.thinker import Prefilled, Thinker, decode

T = TypeVar("T")

CPU = torch.device("cpu")
PROMPT_TOKENS, CODES = 6, 150
QUESTION = [{"role": "user", "content": "hello green river"}]
SAMPLING = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
SPEECH = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=100, seed=5), steps=2, seed=1)


class Stage:
    """The talker with its weights in place, and a prompt and a reply of fixed random rows. Its last cache stays."""

    def __init__(self, omni: OmniRuntime) -> None:
        self.residency = omni._machine.residency
        phase = Phase("talk", ("talker",), {"talker": Placement.PHASE}, 0, 0, 0, 0)
        list(self.residency.enter(phase))
        *self.layers, self.rest = self.residency.component("talker")
        self.speech = omni._machine.model.speech
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(PROMPT_TOKENS + 8, self.speech.codec_embed.width, generator=generator)

    def whereabouts(self) -> tuple[int, ...] | None:
        return self.residency.whereabouts("talker")

    def say(
        self, stepping: Stepping, seed: int = 0, max_codes: int = CODES, attempt: Attempt = at_once
    ) -> Iterator[int]:
        """Codes drawn as the reference draws; the id that would end the speech is never drawn."""
        prompt, ids = self.rows[:PROMPT_TOKENS], self.speech.codec_ids
        sampler = Sampler(
            TALKER_SAMPLING,
            vocab_size=len(self.speech.codec_embed),
            device=CPU,
            seed=seed,
            suppressed=[ids.start, ids.end, ids.pad],
            seen=seen_by_penalty(ids),
        )
        self.cache = self.speech.decoder.new_cache(PROMPT_TOKENS + 2 + max_codes, CPU)
        return talk(
            Talker(self.speech, self.layers, self.rest, attempt, stepping),
            PromptEmbeds(prompt, torch.zeros(PROMPT_TOKENS, dtype=torch.bool), torch.arange(6).expand(3, -1), 6),
            prompt,
            [ThinkerStep(0, row) for row in self.rows[PROMPT_TOKENS:-3]],
            TextRows(*self.rows[-3:]),
            self.cache,
            sampler,
            chunk_tokens=lambda: PROMPT_TOKENS,
            max_codes=max_codes,
            device=CPU,
        )


@pytest.fixture
def stage(omni: OmniRuntime) -> Stage:
    return Stage(omni)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_capture_repeated_149_times_says_what_149_steps_say(stage: Stage, seed: int):
    tape = Tape()
    captured = list(stage.say(CapturedSteps(tape, stage.whereabouts), seed))
    assert captured == list(stage.say(one_by_one, seed))
    assert (len(set(captured)) > 20, tape.captures) == (True, 1)


def test_a_stretch_has_one_capture(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graphs, "STRETCH_TOKENS", 40)
    tape = Tape()
    captured = list(stage.say(CapturedSteps(tape, stage.whereabouts)))
    assert captured == list(stage.say(one_by_one))
    assert tape.captures == -(-149 // 40)


def test_a_step_allocates_nothing_of_the_cache_anew(stage: Stage):
    codes = stage.say(CapturedSteps(Tape(), stage.whereabouts))
    next(codes)
    before = [store.data_ptr() for store in stage.cache._stores]
    assert len(list(codes)) == CODES - 1
    assert [store.data_ptr() for store in stage.cache._stores] == before


def test_a_step_asks_the_device_for_the_code_and_for_nothing_else(stage: Stage):
    codes = stage.say(one_by_one)
    next(codes), next(codes)
    with torch.autograd.profiler.profile() as profiled:  # sees what operators ask for inside, too
        next(codes)
    asked = {event.key: event.count for event in profiled.key_averages()}
    assert asked["aten::_local_scalar_dense"] == 1
    assert "aten::nonzero" not in asked


def test_what_is_captured_asks_the_device_for_nothing(stage: Stage):
    class Watched(Tape):
        def capture(self, step):
            with Operators() as seen:
                step()
            names.extend(seen.names())
            return super().capture(step)

    names: list[str] = []
    list(stage.say(CapturedSteps(Watched(), stage.whereabouts), max_codes=3))
    assert len(names) > 50
    assert not {"_local_scalar_dense", "item", "nonzero", "exponential_", "multinomial"} & set(names)


def test_weights_that_have_moved_are_captured_anew(stage: Stage):
    tape, place = Tape(), iter([1] * 5 + [2] * 5 + [1] * 5)
    said = list(stage.say(CapturedSteps(tape, lambda: next(place)), max_codes=16))
    assert said == list(stage.say(one_by_one, max_codes=16))
    assert tape.captures == 3


def test_while_weights_pass_through_slots_nothing_is_captured(stage: Stage):
    tape, place = Tape(), iter([1] * 5 + [None] * 5 + [1] * 5)
    said = list(stage.say(CapturedSteps(tape, lambda: next(place)), max_codes=16))
    assert said == list(stage.say(one_by_one, max_codes=16))
    assert tape.captures == 2


def test_streamed_weights_have_no_whereabouts(deep_demo: Path):
    with OmniRuntime.open(deep_demo, device="cpu", dtype="float32") as omni:
        residency = omni._machine.residency
        for placement, stays in ((Placement.STREAMED, False), (Placement.PHASE, True)):
            list(residency.enter(Phase("talk", ("talker",), {"talker": placement}, 0, 0, 0, 0)))
            assert (residency.whereabouts("talker") is not None) == stays
        *_, last = (use._block for use in residency.component("talker"))
        assert residency.whereabouts("talker")[-1] == next(last.module.parameters()).data_ptr()


def test_a_cache_that_has_moved_is_captured_anew(stage: Stage):
    tape = Tape()
    codes = stage.say(CapturedSteps(tape, stage.whereabouts), max_codes=30)
    said = list(islice(codes, 10))
    stage.cache._stores = [store.clone() for store in stage.cache._stores]
    said += codes
    assert said == list(stage.say(one_by_one, max_codes=30))
    assert tape.captures == 2


def test_what_was_dropped_holds_no_cache(stage: Stage):
    steps = CapturedSteps(Tape(), stage.whereabouts)
    codes = stage.say(steps, max_codes=30)
    said = list(islice(codes, 10))
    cache = weakref.ref(stage.cache._stores[0].untyped_storage())
    steps.drop()
    stage.cache._stores = [store.clone() for store in stage.cache._stores]
    gc.collect()
    assert cache() is None
    assert said + list(codes) == list(stage.say(one_by_one, max_codes=30))


def test_a_step_that_fails_is_taken_again_with_the_same_random_numbers(stage: Stage):
    class Fragile(Tape):
        def capture(self, step: Callable[[], T]) -> Callable[[], T]:
            repeat, times = super().capture(step), count(1)

            def again() -> T:
                result = repeat()
                if next(times) % 4 == 0:
                    raise torch.OutOfMemoryError("no room")
                return result

            return again

    def retry(step: Callable[[], T], undo: Callable[[], object] = lambda: None) -> T:
        with suppress(torch.OutOfMemoryError):
            return step()
        undo()
        failed.append(step)
        return step()

    failed: list[Any] = []
    said = list(stage.say(CapturedSteps(Fragile(), stage.whereabouts), attempt=retry))
    assert said == list(stage.say(one_by_one))
    assert len(failed) > CODES // 5


def test_the_thinker_writes_the_same(omni: OmniRuntime):
    residency, model = omni._machine.residency, omni._machine.model
    placements = {"thinker": Placement.PHASE, "lm_head": Placement.PHASE}
    list(residency.enter(Phase("think", ("thinker",), placements, 0, 0, 0, 0)))
    *layers, rest = residency.component("thinker")
    (head,) = residency.component("lm_head")

    def written(stepping: Stepping) -> list[tuple[int, list[float]]]:
        sampler = Sampler(SAMPLING, vocab_size=len(model.embed_tokens), device=CPU, seed=0)
        cache = model.thinker.new_cache(130, CPU)
        thinker = Thinker(model.thinker, layers, rest, head, model.embed_tokens, stepping=stepping)
        start = Prefilled(torch.ones(1, model.embed_tokens.width), 5)
        thought = list(decode(thinker, start, cache, sampler, stop_ids=frozenset(), max_tokens=120))
        return [(step.token_id, [] if step.reply_row is None else step.reply_row.tolist()) for step in thought]

    tape = Tape()
    captured = written(CapturedSteps(tape, partial(residency.whereabouts, "thinker")))
    expected = written(one_by_one)
    assert [token for token, _ in captured] == [token for token, _ in expected]
    for (_, row), (_, other) in zip(captured, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    assert tape.captures == 1


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    """Captures in turns on this device."""
    tape = Tape()
    monkeypatch.setattr("lowvram.turn.open_recorder", lambda device: tape)
    return tape


def answer(omni: OmniRuntime, disturb: Callable[[OmniRuntime], object] = lambda omni: None) -> tuple[Any, Any]:
    """The ids of an answer. Something happens after its second piece of text, and again after its first sound."""
    met: Counter[type] = Counter()
    for event in omni.generate(QUESTION, sampling=SAMPLING, speech=SPEECH):
        met[type(event)] += 1
        if (type(event), met[type(event)]) in ((TextDelta, 2), (AudioChunk, 1)):
            disturb(omni)
    assert isinstance(event, Finished)
    return event.text_ids, event.codec_ids


def alive() -> int:
    """Captures that hold memory."""
    gc.collect()
    return sum(type(thing) is graphs._Captured for thing in gc.get_objects())


@pytest.fixture
def expected(omni: OmniRuntime) -> tuple[Any, Any]:
    """The answer one by one."""
    return answer(omni)


def test_a_turn_captures_both_decoders_and_holds_nothing_afterwards(expected: Any, omni: OmniRuntime, tape: Tape):
    assert answer(omni) == expected
    assert (tape.captures, alive()) == (2, 0)


def test_a_release_gives_back_what_was_captured_and_the_answer_goes_on(expected: Any, omni: OmniRuntime, tape: Tape):
    def interrupt(omni: OmniRuntime) -> None:
        held.append(alive())
        omni.release()
        held.append(alive())
        omni.resume()

    held: list[int] = []
    assert answer(omni, interrupt) == expected
    assert held[0] > 0 and held[1] == 0
    assert held[2] > 0 and held[3] == 0
    assert tape.captures == 4


def test_another_budget_is_captured_anew(expected: Any, omni: OmniRuntime, tape: Tape):
    assert answer(omni, lambda omni: omni.set_budget(omni.budget.vram_bytes // 2)) == expected
    assert tape.captures == 4


MOVES: dict[str, Callable[[Turn], object]] = {
    "a step runs out": lambda turn: turn.room.attempt(runs_out(1)),
    "another budget is heeded": lambda turn: (turn.room.accept(Budget(500)), turn.room.adapt()),
    "the device is released": lambda turn: (turn.control.release(), turn.room.adapt()),
    "the phase is over": lambda turn: next(turn.phases),
    "the turn is over": lambda turn: turn.room.leave(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_room_drops_captures_before_anything_leaves(move: Callable[[Turn], object]):
    turn = Turn()
    turn.room.before_moving(lambda: turn.shelf.diary.append("drop"))
    move(turn)
    entries = [entry if isinstance(entry, str) else entry[0] for entry in turn.shelf.diary]
    left = [entries.index(word) for word in ("trim", "release", "way", "leave", "plan") if word in entries]
    assert entries.index("drop") < min(left)


def test_a_cache_in_8_bits_is_not_captured(demo: Path, tape: Tape):
    with OmniRuntime.open(demo, device="cpu", dtype="float32", limits=Limits(kv="int8")) as omni:
        answer(omni)
    assert tape.captures == 0


def test_without_a_card_nothing_captures():
    assert open_recorder(CPU) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch refuses where there is no card")
def test_a_capture_that_is_refused_costs_no_answer(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        again = CudaRecorder(torch.device("cuda:0")).capture(lambda: 7)
    assert again() == 7
    assert "cannot be captured" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch refuses where there is no card")
def test_a_card_is_asked_no_more_after_three_refusals(caplog: pytest.LogCaptureFixture):
    recorder = CudaRecorder(torch.device("cuda:0"))
    with caplog.at_level(logging.WARNING):
        assert [recorder.capture(lambda: 7)() for _ in range(5)] == [7] * 5
    assert [record.getMessage().count(", as all later ones are") for record in caplog.records] == [0, 0, 1]


def stand_for_a_card(monkeypatch: pytest.MonkeyPatch, stream_in_use: Any = None, graph: Any = nullcontext) -> None:
    """Torch's own names for what a capture needs, none of which the CPU's build carries out."""
    for name in ("CUDAGraph", "graph_pool_handle", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: graph())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream_in_use)
    monkeypatch.setattr(graphs, "_capture_stream", lambda device: "the one that captures")


def test_the_stream_in_use_is_ordered_after_a_capture(monkeypatch: pytest.MonkeyPatch):
    """For who watches streams: nothing runs in the one that captures."""

    @contextmanager
    def graph() -> Iterator[None]:
        diary.append("begin")
        yield
        diary.append("end")

    diary: list[Any] = []
    stand_for_a_card(monkeypatch, SimpleNamespace(wait_stream=diary.append), graph)
    CudaRecorder(torch.device("cuda:0")).capture(lambda: diary.append("step"))
    assert diary == ["begin", "step", "end", "the one that captures"]


@pytest.mark.parametrize("torch_has", ["a capture that is over", "nothing that ends one"])
def test_a_capture_that_breaks_costs_no_answer(
    torch_has: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    stand_for_a_card(monkeypatch)

    def breaks(reason: str = "the card refuses") -> int:
        raise RuntimeError(reason)

    if torch_has == "nothing that ends one":
        monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    else:
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: breaks("not currently recording"))
    with caplog.at_level(logging.WARNING):
        assert CudaRecorder(torch.device("cuda:0")).capture(breaks) is breaks
    assert caplog.text.strip().endswith("the card refuses")


def test_a_card_has_one_recorder_for_all_turns():
    card = torch.device("cuda:0")
    assert open_recorder(card) is open_recorder(card) is not open_recorder(torch.device("cuda:1"))


def test_torch_has_what_ends_a_broken_capture():
    assert callable(torch._C._cuda_endAllocateToPool)
