from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniPreTrainedModelForConditionalGeneration as Reference,
)
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

from lowvram.preprocess.layout import (
    AudioSegment,
    Clock,
    ImageSegment,
    Layout,
    MediaTokens,
    Segment,
    TextSegment,
    VideoSegment,
    lay_out,
)

IMAGE, AUDIO, VIDEO, AUDIO_START, AUDIO_END, VISION_START, VISION_END = range(900, 907)
TOKENS = MediaTokens(IMAGE, AUDIO, VIDEO, AUDIO_START, AUDIO_END)
CLOCK = Clock(25, 2.0)


def with_marks(media: list[Segment], words: list[int]) -> list[Segment]:
    """Each medium between its start and end tokens as the chat template writes them, with words around."""
    prompt: list[Segment] = [TextSegment([7] * words[0])]
    for medium, n_words in zip(media, words[1:], strict=True):
        is_sound = isinstance(medium, AudioSegment)
        start, end = (AUDIO_START, AUDIO_END) if is_sound else (VISION_START, VISION_END)
        prompt += [TextSegment([start]), medium, TextSegment([end] + [7] * n_words)]
    return prompt


def reference_positions(layout: Layout, media: list[Segment], sound_in_video: bool) -> tuple[torch.Tensor, int]:
    """`get_rope_index` on the same ids, called without a model: positions [3, T] and the next one."""
    videos = [m for m in media if isinstance(m, VideoSegment)]
    images = [m for m in media if isinstance(m, ImageSegment)]
    tokens = [m.sound_tokens if isinstance(m, VideoSegment) else m.tokens for m in media if m not in images]
    model = SimpleNamespace(
        spatial_merge_size=2,
        config=SimpleNamespace(
            image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO, vision_start_token_id=VISION_START,
            audio_start_token_id=AUDIO_START, position_id_per_seconds=25, seconds_per_chunk=2,
        ),
        get_chunked_index=lambda *args: Reference.get_chunked_index(None, *args),
        get_llm_pos_ids_for_vision=lambda *args: Reference.get_llm_pos_ids_for_vision(None, *args),
    )  # fmt: skip
    ids = layout.input_ids[None]
    positions, delta = Reference.get_rope_index(
        model,
        ids,
        image_grid_thw=torch.tensor([(1, 2 * m.height, 2 * m.width) for m in images]) if images else None,
        video_grid_thw=torch.tensor([(m.times, 2 * m.height, 2 * m.width) for m in videos]) if videos else None,
        attention_mask=torch.ones_like(ids),
        use_audio_in_video=sound_in_video,
        audio_seqlens=torch.tensor([4 * n for n in tokens if n]),  # 4 mel frames make a token
        second_per_grids=torch.tensor([m.seconds_per_patch for m in videos]),
    )
    return positions[:, 0], int(delta) + ids.shape[1]


sides = st.integers(1, 5)
seconds = st.sampled_from([1.0, 0.5, 2.0, 4.0, 2 / 3, 0.25, 2 / 1.7])
sounds = st.builds(AudioSegment, st.integers(1, 120))
images = st.builds(ImageSegment, sides, sides)
silent_videos = st.builds(VideoSegment, st.integers(1, 6), sides, sides, seconds)
sounding_videos = st.builds(VideoSegment, st.integers(1, 6), sides, sides, seconds, st.integers(1, 160))


def check(media: list[Segment], data: st.DataObject, sound_in_video: bool) -> None:
    n = len(media) + 1
    layout = lay_out(with_marks(media, data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))), TOKENS, CLOCK)
    positions, following = reference_positions(layout, media, sound_in_video)
    assert torch.equal(layout.position_ids, positions)
    assert layout.next_position == following


@settings(max_examples=150, deadline=None)
@given(st.lists(sounds | images | silent_videos, min_size=1, max_size=4), st.data())
def test_positions_equal_the_references_for_images_sounds_and_silent_videos(media: list[Segment], data: st.DataObject):
    check(media, data, sound_in_video=False)


@settings(max_examples=150, deadline=None)
@given(st.lists(images | sounds | sounding_videos, min_size=1, max_size=4), st.data())
def test_positions_equal_the_references_for_videos_with_sound(media: list[Segment], data: st.DataObject):
    check(media, data, sound_in_video=True)


def test_times_that_float32_rounds_down_are_rounded_down():
    media: list[Segment] = [VideoSegment(40, 1, 1, 2 / 1.3)]  # patch 39 is at 60 s, position 1500, but for rounding
    layout = lay_out(with_marks(media, [1, 1]), TOKENS, CLOCK)
    assert torch.equal(layout.position_ids, reference_positions(layout, media, False)[0])


@pytest.mark.skipif(
    not hasattr(Qwen2_5OmniProcessor, "replace_video_with_audio_token"),
    reason="before transformers 5.21 the processor lays a video out in no function of its own",
)
@settings(max_examples=150, deadline=None)
@given(sounding_videos)
def test_placeholders_of_a_video_with_sound_are_in_the_processors_order(video: VideoSegment):
    layout = lay_out([TextSegment([VISION_START]), video, TextSegment([VISION_END])], TOKENS, CLOCK)
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2),
        audio_bos_token="[", audio_eos_token="]", audio_token="a", video_token="v",
        get_chunked_index=lambda *args: Qwen2_5OmniProcessor.get_chunked_index(None, *args),
    )  # fmt: skip
    written = Qwen2_5OmniProcessor.replace_video_with_audio_token(
        processor,
        {
            "video_grid_thw": np.array([(video.times, 2 * video.height, 2 * video.width)]),
            "video_second_per_grid": [video.seconds_per_patch],
        },
        0,
        {"num_audio_tokens": [video.sound_tokens]},
        0,
        position_id_per_seconds=25,
        seconds_per_chunk=2.0,
    )
    letters = {AUDIO_START: "[", AUDIO_END: "]", AUDIO: "a", VIDEO: "v"}
    assert "".join(letters[i] for i in layout.input_ids[1:-1].tolist()) == written


def test_rows_point_at_each_mediums_own_placeholders():
    media = [
        ImageSegment(2, 3),
        VideoSegment(3, 1, 2, 1.0, sound_tokens=70),
        AudioSegment(5),
        VideoSegment(1, 1, 1, 1.0),
    ]
    layout = lay_out(with_marks(media, [4, 0, 1, 2, 3]), TOKENS, CLOCK)
    image, film, sound, silent = layout.rows
    assert [len(rows.picture) for rows in layout.rows] == [6, 6, 0, 1]
    assert [len(rows.sound) for rows in layout.rows] == [0, 70, 5, 0]
    assert layout.input_ids[image.picture].unique().tolist() == [IMAGE]
    assert layout.input_ids[torch.cat([film.picture, silent.picture])].unique().tolist() == [VIDEO]
    assert layout.input_ids[torch.cat([film.sound, sound.sound])].unique().tolist() == [AUDIO]
    every_row = torch.cat([row for rows in layout.rows for row in (rows.picture, rows.sound)])
    assert (
        len(every_row.unique())
        == len(every_row)
        == int((layout.input_ids >= IMAGE).logical_and(layout.input_ids <= VIDEO).sum())
    )


def test_picture_comes_before_the_sound_of_the_same_two_seconds():
    layout = lay_out([TextSegment([1]), VideoSegment(3, 1, 1, 1.0, sound_tokens=60)], TOKENS, CLOCK)
    assert layout.input_ids.tolist() == [1, AUDIO_START, VIDEO, VIDEO, *[AUDIO] * 50, VIDEO, *[AUDIO] * 10, AUDIO_END]


def test_videos_with_and_without_sound_meet_in_one_prompt():
    sounding, silent = VideoSegment(2, 1, 1, 1.0, sound_tokens=50), VideoSegment(2, 1, 1, 1.0)
    layout = lay_out(with_marks([sounding, silent, AudioSegment(2)], [1, 0, 0, 0]), TOKENS, CLOCK)
    time, _, _ = layout.position_ids
    _, rows, sound = layout.rows
    assert layout.input_ids[time == 1].tolist() == [VISION_START, AUDIO_START]
    assert layout.input_ids[time == 52].tolist() == [AUDIO_END, VISION_END]
    assert time[rows.picture].tolist() == [54, 79]
    assert time[sound.sound].tolist() == [82, 83]


@pytest.mark.parametrize("n", [1, 5])
def test_text_is_numbered_in_a_line(n: int):
    layout = lay_out([TextSegment([3] * n)], TOKENS, CLOCK)
    assert layout.position_ids.tolist() == [list(range(n))] * 3
    assert layout.next_position == n
