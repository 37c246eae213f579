from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lowvram.errors import MediaError, OptionError
from lowvram.options import Limits
from lowvram.preprocess import Preprocessor
from lowvram.quantize.samples import (
    BUILT_IN,
    Block,
    Embedder,
    choose_blocks,
    embedded_blocks,
    gather_runs,
    read_lines,
    read_source,
)
from lowvram.runtime import OmniRuntime

LIMITS = Limits()


@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    samples=st.integers(1, 40),
    sample_tokens=st.integers(1, 50),
    seed=st.integers(0, 5),
)
def test_blocks_are_distinct_inside_their_runs_and_at_most_as_many_as_asked_for(
    lengths: list[int], samples: int, sample_tokens: int, seed: int
):
    try:
        choice = choose_blocks(lengths, samples=samples, sample_tokens=sample_tokens, seed=seed)
    except OptionError:
        assert sum(max(length // sample_tokens, length > 0) for length in lengths) < 2
        return
    blocks = [*choice.calibrated, *choice.held_out]
    assert len({(block.run, row) for block in blocks for row in range(block.start, block.rows.stop)}) == sum(
        block.length for block in blocks
    )
    assert all(block.rows.stop <= lengths[block.run] and block.length <= sample_tokens for block in blocks)
    assert 1 <= len(choice.calibrated) <= samples
    assert 1 <= len(choice.held_out) <= max(1, samples // 8)


def test_with_enough_to_choose_from_an_eighth_as_many_are_held_out():
    choice = choose_blocks([10_000], samples=64, sample_tokens=10, seed=0)
    assert (len(choice.calibrated), len(choice.held_out)) == (64, 8)


def test_with_less_than_was_asked_for_all_is_used():
    choice = choose_blocks([185], samples=64, sample_tokens=10, seed=0)
    assert (len(choice.calibrated), len(choice.held_out)) == (16, 2)


def test_a_seed_decides_which_blocks():
    one, same, other = (choose_blocks([10_000], samples=5, sample_tokens=10, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


def test_a_run_shorter_than_a_sample_is_a_sample():
    choice = choose_blocks([7, 20], samples=5, sample_tokens=20, seed=0)
    assert {block.length for block in (*choice.calibrated, *choice.held_out)} == {7, 20}


def test_the_built_in_texts_are_conversations():
    examples = list(read_lines(BUILT_IN))
    assert len(examples) > 15
    for messages in examples:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() for message in messages)


def test_the_built_in_texts_are_many_and_none_comes_twice():
    said = [message["content"] for messages in read_lines(BUILT_IN) for message in messages]
    assert BUILT_IN.stat().st_size > 130_000
    long = [text for text in said if len(text) > 40]
    assert len(long) == len(set(long))


def test_folders_are_read_by_content_and_hidden_files_left_alone(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "deep" / "picture.dat", format="png")
    (tmp_path / "a.txt").write_text("some words")
    (tmp_path / "b.jsonl").write_text(
        '"one"\n\n{"text": "two"}\n{"messages": [{"role": "user", "content": "three"}]}\n'
    )
    (tmp_path / ".hidden").write_text("?")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("?")
    words, one, two, three, picture = read_source(str(tmp_path), LIMITS)
    assert (words, one, two) == ("some words", "one", "two")
    assert three == [{"role": "user", "content": "three"}]
    assert picture[0]["content"][0] == {"type": "image", "image": str(tmp_path / "deep" / "picture.dat")}


def test_what_else_lies_in_a_folder_of_media_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 99)
    (tmp_path / "a.txt").write_text("some words")
    (tmp_path / "notes.md").touch()
    assert list(read_source(str(tmp_path), LIMITS)) == ["some words"]
    skipped = f"passed over: {tmp_path / 'Thumbs.db'}, 396 bytes, is not a medium that can be read"
    assert caplog.messages == [skipped, f"passed over: {tmp_path / 'notes.md'} is empty: 0 bytes"]


@pytest.mark.parametrize("name", [".hidden", "notes.docx"])
def test_a_folder_with_nothing_to_use_in_it_is_refused(name: str, tmp_path: Path):
    (tmp_path / name).write_text("?")
    with pytest.raises(OptionError, match="holds 0 files to calibrate on"):
        list(read_source(str(tmp_path), LIMITS))


def test_an_empty_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("some words")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="a path to calibrate on is empty: 0 characters"):
        list(read_source("", LIMITS))


def test_texts_are_known_by_their_names_in_capitals_too_and_may_begin_with_a_mark(tmp_path: Path):
    (tmp_path / "A.TXT").write_text("some words", encoding="utf-8-sig")
    (tmp_path / "B.JSONL").write_text('"others"', encoding="utf-8-sig")
    assert list(read_source(str(tmp_path), LIMITS)) == ["some words", "others"]


def test_a_line_ends_where_the_file_says_so_and_not_within_a_text(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('"one\u2028line\u0085"\r\n"two"', encoding="utf-8", newline="")
    assert list(read_lines(tmp_path / "a.jsonl")) == ["one\u2028line\u0085", "two"]


@pytest.mark.parametrize("line", ["{", "3", '{"words": "x"}', '"\\ud800"'])
def test_a_line_that_is_no_text_is_named(tmp_path: Path, line: str):
    (tmp_path / "a.jsonl").write_text(f'"fine"\n{line}\n')
    with pytest.raises(OptionError, match=r"a\.jsonl, line 2 is no"):
        list(read_source(str(tmp_path / "a.jsonl"), LIMITS))


def test_a_conversation_that_makes_no_sense_is_named_by_its_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('"fine"\n{"messages": [{"role": "user"}]}\n')
    with pytest.raises(OptionError, match=r"a\.jsonl, line 2: message 1 has no content"):
        list(read_source(str(tmp_path / "a.jsonl"), LIMITS))


def test_what_is_not_there_or_not_a_medium_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.wav").write_bytes(b"nothing")
    with pytest.raises(OptionError, match=r"a\.txt is not text at byte 3"):
        list(read_source(str(tmp_path / "a.txt"), LIMITS))
    for name in ("b.wav", "c.mp4"):
        with pytest.raises(MediaError):
            list(read_source(str(tmp_path / name), LIMITS))


def test_texts_are_one_run_in_an_order_of_the_seeds(source: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("green river far away")
    preprocessor = Preprocessor(source, json.loads((source / "config.json").read_text()))
    (plain,), (run,), (other,) = (
        gather_runs(preprocessor, paths, seed=seed)
        for paths, seed in (((), 0), ((str(tmp_path),), 0), ((str(tmp_path),), 1))
    )
    assert run.length == plain.length + len(preprocessor.tokenize("green river far away"))
    with run.inputs() as inputs, other.inputs() as shuffled:
        assert len(inputs.input_ids) == run.length
        assert not torch.equal(inputs.input_ids, shuffled.input_ids)
        assert torch.equal(inputs.input_ids.sort().values, shuffled.input_ids.sort().values)


def test_blocks_of_a_medium_are_rows_of_its_prompt_as_an_answer_would_see_them(source: Path, tmp_path: Path):
    Image.radial_gradient("L").resize((112, 112)).save(tmp_path / "a.png")
    with OmniRuntime.open(source, device="cpu", dtype="float32") as omni:
        runs = gather_runs(omni.preprocessor, [str(tmp_path)], seed=0)
        length = runs[1].length
        blocks = [Block(1, 0, 10), Block(0, 5, 4), Block(1, 10, length - 10)]
        with Embedder(omni._model, omni.device.torch) as embedder:
            rows = {start: (embeds, positions) for start, embeds, positions in embedded_blocks(embedder, runs, blocks)}
        (talker_rows,) = prompt_rows(omni, tmp_path / "a.png")
    assert sorted(rows) == [0, 10, 14]
    torch.testing.assert_close(torch.cat([rows[0][0], rows[14][0]]), talker_rows)
    assert all(positions.min() == 0 and positions.shape == (3, len(embeds)) for embeds, positions in rows.values())


def prompt_rows(omni: OmniRuntime, picture: Path) -> list[torch.Tensor]:
    """The rows that a turn about `picture` prefills, caught on their way into the first layer."""
    seen: list[torch.Tensor] = []
    layer = omni._model.components["thinker"][0].module
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    question = {"type": "text", "text": "Describe what you see and hear."}
    messages = [{"role": "user", "content": [{"type": "image", "image": str(picture)}, question]}]
    next(event for event in omni.generate(messages, speech=None) if getattr(event, "stage", "") == "prefill")
    handle.remove()
    return seen[:1]
