from __future__ import annotations

import pytest

from lowvram.errors import MediaError, OptionError
from lowvram.options import DEFAULT_SYSTEM_PROMPT, MediaParams
from lowvram.preprocess.messages import MediaPart, Message, TextPart, read_messages

DEFAULT = MediaParams()


def only_part(part: dict, params: MediaParams = DEFAULT) -> MediaPart:
    _, message = read_messages([{"role": "user", "content": [part]}], params)
    (read,) = message.parts
    assert isinstance(read, MediaPart)
    return read


def test_the_references_system_prompt_leads_when_there_is_none():
    first, second = read_messages([{"role": "user", "content": "hi"}], DEFAULT)
    assert first == Message("system", (TextPart(DEFAULT_SYSTEM_PROMPT),))
    assert second == Message("user", (TextPart("hi"),))


def test_a_system_prompt_of_the_callers_is_kept():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert [message.role for message in read_messages(messages, DEFAULT)] == ["system", "user"]


def test_parts_keep_their_order():
    content = [
        {"type": "video", "video": "a.mp4"},
        "and",
        {"type": "text", "text": "?"},
        {"type": "image", "image": "b"},
    ]
    _, message = read_messages([{"role": "user", "content": content}], DEFAULT)
    kinds = [part.kind if isinstance(part, MediaPart) else part.text for part in message.parts]
    assert kinds == ["video", "and", "?", "image"]


@pytest.mark.parametrize(
    ("part", "kind", "source"),
    [
        ({"type": "image", "image": "a.png"}, "image", "a.png"),
        ({"type": "image", "path": "a.png"}, "image", "a.png"),
        ({"type": "image_url", "image_url": {"url": "http://x/a.png", "detail": "low"}}, "image", "http://x/a.png"),
        ({"type": "image_url", "image_url": "http://x/a.png"}, "image", "http://x/a.png"),
        ({"type": "audio", "url": "http://x/a.wav"}, "audio", "http://x/a.wav"),
        ({"type": "audio_url", "audio_url": {"url": "http://x/a.wav"}}, "audio", "http://x/a.wav"),
        ({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}, "audio", b"RIFF"),
        ({"type": "input_audio", "input_audio": {"data": "-_-_", "format": "wav"}}, "audio", b"\xfb\xff\xbf"),
        ({"type": "image", "image": bytearray(b"BM")}, "image", b"BM"),
        ({"type": "video", "video": ["1.png", "2.png"]}, "video", ["1.png", "2.png"]),
        ({"type": "video_url", "video_url": {"url": "http://x/a.mp4"}}, "video", "http://x/a.mp4"),
        ({"type": "file", "file": "a.mp4"}, "file", "a.mp4"),
        ({"type": "file", "url": "http://x/a.mp4"}, "file", "http://x/a.mp4"),
    ],
)
def test_every_spelling_of_a_medium_is_understood(part: dict, kind: str, source: object):
    read = only_part(part)
    assert (read.kind, read.source) == (kind, source)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "video", "fps": 1, "max_pixels": 200_000}, MediaParams(fps=1, max_pixels=200_000)),
        ({"type": "video", "min_frames": 8, "max_frames": 16}, MediaParams(min_frames=8, max_frames=16)),
        (
            {"type": "video", "min_pixels": 3136, "total_pixels": 10**7},
            MediaParams(min_pixels=3136, total_pixels=10**7),
        ),
        ({"type": "video", "video_start": 1, "video_end": 2.5}, MediaParams(start_s=1, end_s=2.5)),
        ({"type": "video", "video_start": 0, "video_end": None}, MediaParams(start_s=0)),
        ({"type": "video", "video_sound": False}, MediaParams(video_sound=False)),
        ({"type": "video", "use_audio_in_video": False}, MediaParams(video_sound=False)),
        ({"type": "audio", "audio_start": 1, "audio_end": 2}, MediaParams(start_s=1, end_s=2)),
        (
            {"type": "image", "min_pixels": 784, "max_pixels": 9000},
            MediaParams(image_min_pixels=784, image_max_pixels=9000),
        ),
    ],
)
def test_a_part_overrides_options_for_itself(part: dict, expected: MediaParams):
    assert only_part({**part, part["type"]: "a"}).params == expected


def test_what_a_part_does_not_say_stays_as_the_caller_chose():
    part = {"type": "video", "video": "a.mp4", "video_end": 5}
    assert only_part(part, MediaParams(fps=1, start_s=2)).params == MediaParams(fps=1, start_s=2, end_s=5)


def test_frames_and_size_can_be_asked_for_outright():
    read = only_part({"type": "video", "video": "a.mp4", "nframes": 6, "resized_height": 112, "resized_width": 224})
    assert (read.n_frames, read.size) == (6, (112, 224))


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages must be a list of at least 1 message"),
        ("hi", "messages must be a list"),
        ({"role": "user", "content": "hi"}, "messages must be a list"),
        (["hi"], "message 1 is of type str"),
        ([{"role": "user", "content": "hi"}, {"role": "tool", "content": "hi"}], "message 2 has the role 'tool'"),
        ([{"content": "hi"}], "message 1 has the role None"),
        ([{"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": []}], "message 1 has no content"),
        ([{"role": "user", "content": b"hi"}], "message 1 has no content"),
        ([{"role": "user", "content": ["hi", 3]}], "message 1, part 2 is of type int"),
        ([{"role": "user", "content": "hi \udcff"}], "message 1 is not text at character 4"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1, part 1 has no text"),
        ([{"role": "user", "content": [{"type": "smell", "smell": "x"}]}], "part 1 has the type 'smell'"),
        ([{"role": "user", "content": [{"text": "hi"}]}], "part 1 has the type None"),
    ],
)
def test_a_message_that_makes_no_sense_is_named(messages: object, complaint: str):
    with pytest.raises(OptionError, match=complaint):
        read_messages(messages, DEFAULT)


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ({"type": "image"}, r"part 1 \(image\) has no source"),
        ({"type": "image", "image": None}, "has no source"),
        ({"type": "image", "video": "a"}, "has no source"),
        ({"type": "video", "video": "a", "video_url": "b"}, "has video and video_url"),
        ({"type": "video", "video": {"file": "a"}}, "a source without url or data"),
        ({"type": "video", "video": "a", "max_pixel": 9}, "the unknown key 'max_pixel'"),
        ({"type": "audio", "audio": "a", "resized_height": 9}, "the unknown key 'resized_height'"),
        ({"type": "file", "file": "a", "fps": 1}, r"part 1 \(file\) has the unknown key 'fps' \(options need a type"),
        ({"type": "video", "video": "a", "fps": "2"}, "has fps '2', but must be a number"),
        ({"type": "video", "video": "a", "fps": True}, "has fps True, but must be a number"),
        ({"type": "video", "video": "a", "fps": -1}, "message 1, part 1: fps is -1"),
        ({"type": "video", "video": "a", "video_start": 3, "video_end": 2}, "end is 2 s, not after the start at 3 s"),
        ({"type": "video", "video": "a", "video_sound": 1}, "video_sound 1, but must be true or false"),
        ({"type": "video", "video": "a", "nframes": 4.5}, "nframes 4.5, but must be a whole number"),
        ({"type": "video", "video": "a", "nframes": 4, "fps": 1}, "both fps and nframes"),
        ({"type": "video", "video": "a", "resized_width": 84}, "one of resized_height and resized_width"),
    ],
)
def test_a_part_that_makes_no_sense_is_named(part: dict, complaint: str):
    with pytest.raises(OptionError, match=complaint):
        only_part(part)


@pytest.mark.parametrize("data", ["***", "\ud800", "AAAAA"])
def test_data_that_is_not_base64_is_a_media_error(data: str):
    with pytest.raises(MediaError, match="message 1, part 1 has data that is not base64"):
        only_part({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})


@pytest.mark.parametrize("content", [b"hello", bytearray(b"hello"), memoryview(b"hello")])
def test_bytes_are_no_words(content: object):
    with pytest.raises(OptionError, match="message 1 has no content"):
        read_messages([{"role": "user", "content": content}], DEFAULT)
