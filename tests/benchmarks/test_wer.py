from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wer import Errors, compare_rates, count_errors, edit_distance, read_recordings, words_of

from lowvram.errors import OptionError

WORDS = st.lists(st.sampled_from("abc"), max_size=7)


def by_definition(one: list[str], other: list[str]) -> int:
    """The shortest edit, tried out from the front."""

    @cache
    def from_here(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return len(one) - i + len(other) - j
        same = from_here(i + 1, j + 1) + (one[i] != other[j])
        return min(same, from_here(i + 1, j) + 1, from_here(i, j + 1) + 1)

    return from_here(0, 0)


@given(WORDS, WORDS)
def test_an_edit_distance_is_the_shortest_edit(one: list[str], other: list[str]):
    assert edit_distance(one, other) == by_definition(one, other)


@given(WORDS, WORDS, WORDS)
def test_an_edit_distance_is_a_distance(one: list[str], other: list[str], third: list[str]):
    assert (edit_distance(one, other) == 0) == (one == other)
    assert edit_distance(one, other) == edit_distance(other, one)
    assert edit_distance(one, third) <= edit_distance(one, other) + edit_distance(other, third)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Mr. QUILTER's manner, isn't it?", ["mr", "quilter's", "manner", "isn't", "it"]),
        ("don’t – “stop”", ["don't", "stop"]),
        ("the dogs' 3 bones_here", ["the", "dogs", "3", "bones", "here"]),
        ("今天下雨，take２ umbrellas。", ["今", "天", "下", "雨", "take2", "umbrellas"]),
        ("‘so he’d say’", ["so", "he'd", "say"]),
        ("ÉTÉ straße", ["été", "straße"]),
        (" … ", []),
    ],
)
def test_words_are_what_is_left_without_case_and_punctuation(text: str, words: list[str]):
    assert words_of(text) == words


def test_errors_are_edits_of_the_transcript_s_words():
    assert count_errors("THE CAT SAT ON THE MAT", "The cat sat at the red mat.") == Errors(edits=2, words=6)


def test_recordings_are_found_as_librispeech_lays_them_out(tmp_path: Path):
    chapter = tmp_path / "19" / "198"
    chapter.mkdir(parents=True)
    for name in ("19-198-0001", "19-198-0000"):
        (chapter / f"{name}.flac").touch()
    listing = "19-198-0000 NORTHANGER ABBEY\n19-198-0001 THIS LITTLE WORK\n19-198-0002 NOT HERE\n"
    (chapter / "19-198.trans.txt").write_text(listing)
    found = read_recordings(tmp_path)
    assert [(r.sound.name, r.transcript) for r in found] == [
        ("19-198-0000.flac", "NORTHANGER ABBEY"),
        ("19-198-0001.flac", "THIS LITTLE WORK"),
    ]
    assert read_recordings(tmp_path, 1) == found[:1]


def test_a_transcript_may_lie_beside_its_sound(tmp_path: Path):
    (tmp_path / "hello.wav").touch()
    (tmp_path / "hello.txt").write_text("hello there\n")
    (tmp_path / "notes.txt").write_text("no sound of that name")
    assert [r.transcript for r in read_recordings(tmp_path)] == ["hello there"]


def test_a_folder_without_transcripts_is_refused_with_what_is_looked_for(tmp_path: Path):
    (tmp_path / "hello.wav").touch()
    with pytest.raises(OptionError, match=r"has 0 recordings with a transcript \(sounds .* LibriSpeech"):
        read_recordings(tmp_path)


def test_a_rate_is_of_all_words_together():
    found = compare_rates([Errors(0, 98), Errors(1, 2)], [Errors(2, 98), Errors(1, 2)])
    assert found["words"] == 100
    assert (found["reference"]["rate"], found["candidate"]["rate"]) == (0.01, 0.03)
    assert found["surplus"]["rate"] == pytest.approx(0.02)


def test_what_both_models_get_wrong_alike_leaves_no_doubt_about_the_surplus():
    alike = [Errors(n % 5, 10) for n in range(40)]
    found = compare_rates(alike, alike)
    low, high = found["reference"]["interval"]
    assert low < found["reference"]["rate"] < high
    assert found["surplus"] == {"rate": 0.0, "interval": [0.0, 0.0]}


def test_an_interval_narrows_with_the_number_of_recordings():
    few, many = ([Errors(n % 3, 10) for n in range(count)] for count in (10, 1000))
    widths = [high - low for low, high in (compare_rates(e, e)["reference"]["interval"] for e in (few, many))]
    assert widths[1] < widths[0] / 5
