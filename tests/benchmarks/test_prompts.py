from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from media_files import numbered_frame, write_video
from PIL import Image
from prompts import TEXTS, at_most, media_prompts, text_prompts

from lowvram.errors import OptionError
from lowvram.quantize.samples import BUILT_IN, read_lines


def test_without_anything_given_there_is_a_prompt_of_every_kind():
    prompts = at_most(1, iter([*media_prompts(), *text_prompts()]))
    assert [prompt.kind for prompt in prompts] == ["text", "picture", "sound", "video"]
    assert prompts[0].words == TEXTS[0] and all(prompt.words is None for prompt in prompts[1:])


def test_no_text_is_one_that_checkpoints_are_calibrated_on():
    learned = " ".join(" ".join(m["content"] for m in messages) for messages in read_lines(BUILT_IN))
    for text in TEXTS:
        assert not [text[i : i + 30] for i in range(len(text) - 29) if text[i : i + 30] in learned]


def test_texts_in_a_file_are_parted_by_empty_lines(tmp_path: Path):
    path = tmp_path / "texts.txt"
    path.write_text("\nOne line,\nand another.\n\n \n\nThe second.\n", encoding="utf-8")
    prompts = list(text_prompts(path))
    assert [prompt.words for prompt in prompts] == ["One line,\nand another.", "The second."]
    assert prompts[1].messages == [{"role": "user", "content": "The second."}]


def test_media_of_a_folder_are_asked_about_by_what_they_are(tmp_path: Path):
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "b.wav", np.zeros(1600), 16_000)
    write_video(tmp_path / "c.mp4", [numbered_frame(n) for n in range(4)], fps=2)
    (tmp_path / "d.txt").write_text("no medium")
    prompts = list(media_prompts(tmp_path))
    assert [(prompt.kind, prompt.name) for prompt in prompts] == [
        ("picture", "a.png"),
        ("sound", "b.wav"),
        ("video", "c.mp4"),
    ]
    assert prompts[0].messages[0]["content"][0] == {"type": "image", "image": str(tmp_path / "a.png")}


def test_a_folder_or_a_file_with_nothing_in_it_is_refused(tmp_path: Path):
    with pytest.raises(OptionError, match="has 0 pictures, sounds or videos"):
        list(media_prompts(tmp_path))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(OptionError, match="has 0 paragraphs"):
        list(text_prompts(tmp_path / "empty.txt"))
    with pytest.raises(OptionError, match="cannot be read"):
        list(text_prompts(tmp_path / "missing.txt"))
