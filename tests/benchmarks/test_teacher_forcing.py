"""What a model thinks when words are put into its mouth, beside the modelling library's own logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import divergence
from parity.clips import chirp, noise_picture, write_clip
from parity.reference import Pair, answer, load_reference
from prompts import text_prompts
from quality import Work, both_heads, measure
from teacher_forcing import read_answer, read_words, say
from torch import Tensor

from lowvram import Finished, OmniRuntime, SamplingParams, SpeechParams
from lowvram.demo import TINY, build_demo
from lowvram.options import TALKER_SAMPLING

WORDS = "The ball goes round, 3 times, 天地."
MAX_TOKENS = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("checkpoint")
    build_demo(folder, seed=1, size=TINY)
    with OmniRuntime.open(folder, device="cpu", dtype="float32") as omni:
        yield Pair(omni, load_reference(folder))


@pytest.fixture(scope="module")
def conversation(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A picture, a sound and a video with its own."""
    clip = tmp_path_factory.mktemp("clips") / "loud.mkv"
    write_clip(clip, True)
    media = [{"type": "image", "image": noise_picture(140, 200, 1)}, {"type": "audio", "audio": chirp(1.5, 3)}]
    parts = [*media, {"type": "video", "video": str(clip)}, {"type": "text", "text": "compare"}]
    return [{"role": "user", "content": parts}]


def logits_of(omni: OmniRuntime, hidden: Tensor) -> Tensor:
    with torch.inference_mode(), both_heads(omni, omni) as (head, _):
        return head(hidden)


def spoken(omni: OmniRuntime, max_codes: int) -> Finished:
    """What the runtime itself says of the words."""
    sampling = SamplingParams(**{**vars(TALKER_SAMPLING), "max_tokens": max_codes, "seed": 5})
    *_, finished = omni.speak(WORDS, speech=SpeechParams(sampling=sampling, seed=5))
    assert isinstance(finished, Finished)
    return finished


def test_bare_words_are_read_as_the_reference_reads_them(pair: Pair):
    ids = torch.tensor([pair.omni.preprocessor.tokenize(WORDS)])
    with torch.inference_mode():
        expected = pair.reference.thinker(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    assert torch.allclose(logits_of(pair.omni, read_words(pair.omni, WORDS)), expected, atol=2e-4)


def test_an_answer_put_into_its_mouth_is_thought_as_the_reference_thinks_its_own(
    pair: Pair, conversation: list[dict[str, Any]]
):
    expected: list[Tensor] = []
    note = pair.reference.thinker.lm_head.register_forward_hook(lambda *args: expected.append(args[2][0, -1]))
    with pair.omni.preprocessor.open(conversation) as prompt:
        limits = {"max_tokens": MAX_TOKENS, "max_codes": 1}
        said = answer(pair.reference, prompt.inputs, voice="Chelsie", stop_ids=pair.omni.stop_ids, **limits)
    note.remove()
    assert len(said.text_ids) == len(expected) == MAX_TOKENS
    logits = logits_of(pair.omni, read_answer(pair.omni, conversation, said.text_ids))
    assert len(logits) == MAX_TOKENS + 1
    assert torch.allclose(logits[:-1], torch.stack(expected), atol=2e-4)


def test_what_waits_on_the_host_grows_with_the_answer_alone(pair: Pair, conversation: list[dict[str, Any]]):
    hidden = read_answer(pair.omni, conversation, (5, 6, 7))
    assert hidden.untyped_storage().nbytes() == 4 * TINY.hidden * 4


def test_a_text_aloud_is_what_the_runtime_says(pair: Pair):
    finished = spoken(pair.omni, max_codes=20)
    said = say(pair.omni, WORDS, max_codes=20, seed=5)
    assert said.codes == finished.codec_ids and len(said.codes) > 5
    assert len(said.samples) == round(finished.audio_s * finished.sample_rate_hz)


def test_its_own_codes_dictated_to_a_talker_change_nothing(pair: Pair):
    said = say(pair.omni, WORDS, max_codes=20, seed=5)
    again = say(pair.omni, WORDS, said.codes, max_codes=20, seed=5)
    assert again.codes == said.codes and not torch.equal(said.logits[0], said.logits[1])
    assert torch.equal(again.logits, said.logits) and (again.samples == said.samples).all()


def test_dictated_codes_are_said_whatever_the_talker_would_have_said(pair: Pair):
    codes = (3, 1, 4, 1, 5)
    said = say(pair.omni, WORDS, codes, max_codes=20, seed=5)
    assert said.codes == codes
    assert len(said.logits) == len(codes) + 1  # the end is drawn, too


def test_a_budget_that_cuts_the_turn_changes_nothing(pair: Pair, conversation: list[dict[str, Any]]):
    smallest_bytes = pair.omni.plan(conversation).smallest_budget_bytes
    assert smallest_bytes
    with OmniRuntime.open(pair.omni.checkpoint.folder, device="cpu", dtype="float32", vram=smallest_bytes) as small:
        assert len(small.plan(conversation).phases) > 1
        said = [say(omni, WORDS, max_codes=20, seed=5) for omni in (pair.omni, small)]
        hidden = [read_answer(omni, conversation, (5, 6)) for omni in (pair.omni, small)]
    assert torch.equal(*hidden) and torch.equal(said[0].logits, said[1].logits)
    assert (said[0].samples == said[1].samples).all()


def test_the_divergence_in_the_table_is_that_of_the_reference_s_whole_logits(tmp_path: Path):
    folders = tmp_path / "one", tmp_path / "other"
    for seed, folder in enumerate(folders):
        build_demo(folder, seed=seed, size=TINY)
    (prompt, *_) = text_prompts()
    work = Work([prompt], (), (), max_tokens=1, max_codes=1)
    found = measure(*map(str, folders), work, vram=None, device="cpu", dtype="float32")
    with OmniRuntime.open(folders[0], device="cpu") as omni:
        ids = torch.tensor([omni.preprocessor.tokenize(prompt.words or "")])
    with torch.inference_mode():
        whole = [load_reference(folder).thinker(input_ids=ids).logits[0] for folder in folders]
    expected = divergence(*whole).summary()
    assert found["next_token"]["text"] == {name: pytest.approx(value, rel=1e-3) for name, value in expected.items()}
