"""What is counted without a model is what the model's own preprocessor then measures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import numbered_frame, sine, write_video
from PIL import Image

from lowvram.checkpoint import Headers, open_checkpoint
from lowvram.demo.config import PREPROCESSOR_CONFIG
from lowvram.errors import CheckpointError, MediaError, OptionError
from lowvram.options import TALKER_SAMPLING, Limits, MediaParams, SamplingParams, SpeechParams
from lowvram.preprocess import Preprocessor, PromptShape
from lowvram.shapes import shipped_headers
from lowvram.workload import StandIn, Workload, count_turn, read_stand_ins, turn_of


@pytest.fixture(scope="module")
def at_hand(demo: Path) -> Headers:
    """The tiny demo, tokenizer and all."""
    opened = open_checkpoint(demo)
    return Headers("demo", opened.config, opened.tensors, demo, "the demo")


@pytest.fixture(scope="module")
def preprocessor(at_hand: Headers) -> Preprocessor:
    return Preprocessor(at_hand.folder, at_hand.config)


def clip(path: Path, seconds: float, size: tuple[int, int] = (64, 48), fps: int = 25, sound: bool = True) -> Path:
    width, height = size
    frames = [numbered_frame(i % 256, width, height) for i in range(round(seconds * fps))]
    return write_video(path, frames, fps=fps, sound=sine(48_000, seconds) if sound else None)


def user(*content: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def assert_same(counted: Workload, measured: PromptShape) -> None:
    assert not counted.is_estimate
    assert counted.text_tokens == measured.text_tokens
    assert counted.media == measured.media
    expected = turn_of(
        measured.prompt_tokens, measured.grids, measured.audio_windows, SamplingParams(), None, Limits().kv
    )
    assert counted.turn == expected


@pytest.mark.parametrize(
    ("seconds", "size", "fps"),
    [(0.4, (64, 48), 25), (3.3, (64, 48), 10), (7.0, (64, 48), 25), (2.2, (120, 200), 10), (1.7, (640, 360), 25)],
)
@pytest.mark.parametrize("sound", [True, False])
def test_a_clip_counts_as_it_is_measured(
    at_hand: Headers,
    preprocessor: Preprocessor,
    tmp_path: Path,
    seconds: float,
    size: tuple[int, int],
    fps: int,
    sound: bool,
):
    path = clip(tmp_path / "clip.mp4", seconds, size, fps, sound)
    asked = user({"type": "video", "video": str(path)}, "Who speaks?")
    assert_same(count_turn(at_hand, asked), preprocessor.measure(asked))


@pytest.mark.parametrize(
    "media",
    [
        MediaParams(fps=1, max_frames=4),
        MediaParams(max_pixels=200_000, min_pixels=50_000),
        MediaParams(start_s=1, end_s=2.5),
        MediaParams(video_sound=False),
    ],
)
def test_options_count_as_they_are_measured(
    at_hand: Headers, preprocessor: Preprocessor, tmp_path: Path, media: MediaParams
):
    path = clip(tmp_path / "clip.mp4", 4)
    asked = user({"type": "video", "video": str(path)}, {"type": "audio", "audio": str(path)})
    assert_same(count_turn(at_hand, asked, media=media), preprocessor.measure(asked, media))


def test_media_of_all_kinds_in_a_conversation_count_as_they_are_measured(
    at_hand: Headers, preprocessor: Preprocessor, tmp_path: Path
):
    Image.fromarray(numbered_frame(7, 300, 200)).save(tmp_path / "a.png")
    frames = np.stack([numbered_frame(i) for i in range(5)])
    asked = [
        {"role": "system", "content": "Be brief. <|im_end|>"},
        *user({"type": "image", "image": str(tmp_path / "a.png")}, {"type": "video", "video": frames}, "and 42?"),
        {"role": "assistant", "content": "a bird"},
        *user({"type": "audio", "audio": sine(16_000, 2.5)}, {"type": "file", "file": str(tmp_path / "a.png")}, "why"),
    ]
    assert_same(count_turn(at_hand, asked), preprocessor.measure(asked))


def test_a_medium_of_another_kind_is_refused_as_it_would_be(at_hand: Headers, tmp_path: Path):
    path = clip(tmp_path / "clip.mp4", 0.4)
    with pytest.raises(MediaError, match=r"message 1, part 1 says image, but .*clip\.mp4 is of kind video"):
        count_turn(at_hand, user({"type": "image", "image": str(path)}))


def test_a_stand_in_counts_as_a_clip_of_its_length_and_size(at_hand: Headers, tmp_path: Path):
    """Uncompressed sound: a codec may add most of a frame of its own."""
    frames = [numbered_frame(i % 256, 160, 120) for i in range(90)]
    path = write_video(tmp_path / "clip.mkv", frames, "ffv1", fps=30, sound=sine(48_000, 3.0), sound_codec="pcm_s16le")
    real = count_turn(at_hand, user({"type": "video", "video": str(path)}, "?"))
    stand_in = count_turn(at_hand, user("?"), [StandIn("video", 3.0, (120, 160))])
    assert (stand_in.turn, stand_in.text_tokens) == (real.turn, real.text_tokens)


def test_a_minute_of_video_that_nobody_has_is_44_700_tokens():
    """60 temporal patches of 20 x 36 tokens, 25 tokens of sound a second, and words nobody has counted."""
    counted = count_turn(shipped_headers("Qwen/Qwen2.5-Omni-7B-AWQ"), stand_ins=read_stand_ins(video_s=60))
    assert [medium.tokens for medium in counted.media] == [60 * 20 * 36 + 60 * 25]
    assert counted.is_estimate
    assert str(counted).startswith(
        f"about {counted.turn.prompt_tokens:,} prompt tokens: about {counted.text_tokens} of"
    )


def test_stand_ins_of_all_kinds_fill_a_turn():
    counted = count_turn(
        shipped_headers("Qwen/Qwen2.5-Omni-7B"), stand_ins=read_stand_ins(video_s=2, audio_s=10, images=2)
    )
    assert [medium.kind for medium in counted.media] == ["video", "audio", "image", "image"]
    assert counted.turn.audio_windows == 1 + 5
    assert [times for times, _, _ in counted.turn.grids] == [2, 1, 1]


def test_a_cut_of_real_media_does_not_shorten_stand_ins_and_silence_takes_their_sound(at_hand: Headers):
    stand_ins = read_stand_ins(video_s=8)
    whole = count_turn(at_hand, stand_ins=stand_ins)
    assert count_turn(at_hand, stand_ins=stand_ins, media=MediaParams(start_s=1, end_s=2)).turn == whole.turn
    silent = count_turn(at_hand, stand_ins=stand_ins, media=MediaParams(video_sound=False))
    assert (silent.turn.audio_windows, silent.media[0].tokens) == (0, whole.media[0].tokens - 8 * 25)


def test_an_estimate_of_text_is_rather_high(at_hand: Headers, preprocessor: Preprocessor):
    """The demo's tokenizer spells most words byte by byte, so the comparison is with words that it knows."""
    asked = user("we are by the river and the sea, the moon is blue. " * 20)
    unknown = count_turn(replace(at_hand, folder=None), [{"role": "system", "content": "you"}, *asked])
    exact = preprocessor.measure([{"role": "system", "content": "you"}, *asked])
    assert unknown.is_estimate
    assert exact.text_tokens <= unknown.text_tokens <= 2 * exact.text_tokens


def test_the_frame_of_an_estimate_is_that_of_the_template(at_hand: Headers, preprocessor: Preprocessor):
    """Without words, only starts, roles, ends and media's own marks are left, and these are counted exactly."""
    asked = [{"role": role, "content": "1"} for role in ("system", "user", "assistant", "user")]
    unknown = count_turn(replace(at_hand, folder=None), asked)
    assert unknown.text_tokens == preprocessor.measure(asked).text_tokens


def test_speech_and_the_cache_are_as_the_options_have_them(at_hand: Headers):
    speech = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=500), steps=5, chunk_s=0.24)
    turn = count_turn(at_hand, speech=speech, limits=Limits(kv="int8"), sampling=SamplingParams(max_tokens=9)).turn
    assert (turn.text_tokens, turn.codes, turn.ode_evaluations, turn.speech_chunk_codes) == (9, 500, 4, 12)
    assert turn.kv == "int8"
    assert count_turn(at_hand).turn.codes == 0


def test_how_speech_is_decoded_is_part_of_the_work(at_hand: Headers):
    """Balanced: two blocks of 12 codes are solved again, and sound waits for two and these."""
    turn = count_turn(at_hand, speech=SpeechParams(mode="balanced", dtype="float16")).turn
    assert (turn.speech_mode, turn.speech_dtype) == ("balanced", "float16")
    assert (turn.speech_ahead_codes, turn.first_sound_codes) == (24, 48)
    exact = count_turn(at_hand, speech=SpeechParams()).turn
    assert (exact.speech_ahead_codes, exact.first_sound_codes, exact.is_conditioned) == (0, 144, False)


@pytest.mark.parametrize("size", ["720p", "0x10", "1280 x 720", ""])
def test_a_size_that_is_none_is_refused(size: str):
    with pytest.raises(OptionError, match="is not a size in pixels"):
        read_stand_ins(images=1, size=size)


@pytest.mark.parametrize(
    "amounts", [{"video_s": -1}, {"audio_s": float("nan")}, {"images": -2}, {"video_s": 1e30}, {"images": 10_001}]
)
def test_amounts_that_no_prompt_has_are_refused(amounts: dict[str, Any]):
    with pytest.raises(OptionError, match="must be 0 to"):
        read_stand_ins(**amounts)


def test_a_config_that_lacks_what_media_are_cut_by_is_named(at_hand: Headers):
    with pytest.raises(CheckpointError, match=r"config\.json of demo lacks '"):
        count_turn(replace(at_hand, config={"thinker_config": {}}))


def test_configs_that_contradict_each_other_are_refused_as_by_the_model_itself(at_hand: Headers, tmp_path: Path):
    published = {**PREPROCESSOR_CONFIG, "patch_size": 7}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"has a patch_size of 7, but config\.json a patch_size of 14"):
        count_turn(replace(at_hand, folder=tmp_path))


def test_counting_loads_neither_torch_nor_transformers(demo: Path, tmp_path: Path):
    path = clip(tmp_path / "clip.mp4", 0.4)
    code = f"""
import sys
from lowvram.planning import find_headers
from lowvram.workload import count_turn
counted = count_turn(find_headers({str(demo)!r}), [{{"role": "user", "content": [
    {{"type": "video", "video": {str(path)!r}}}, "hello"]}}])
print(counted.is_estimate, sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False []"
