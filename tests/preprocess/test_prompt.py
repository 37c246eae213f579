from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from small_omni import AUDIO, CONFIG, IMAGE, PREPROCESSOR_CONFIG, TEMPLATE, VIDEO, write_small_omni
from transformers import Qwen2Tokenizer, WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lowvram.errors import CheckpointError, MediaError, OptionError
from lowvram.options import Limits, MediaParams
from lowvram.preprocess import Preprocessor

RATE_HZ = 16000
STEP = 6
"""Frame i of a clip is of grey STEP * i, far enough apart to survive the way through YUV."""


def user(*content: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def picture(height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tone(seconds: float) -> np.ndarray:
    return np.sin(np.arange(round(seconds * RATE_HZ)) * 0.2).astype(np.float32) * 0.3


def write_clip(path: Path, n_frames: int, *, sound_s: float = 0.0, fps: int = 10) -> Path:
    """A clip of 64 x 48 pixels, grey and ever lighter, with a tone in uncompressed sound or none."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=fps, width=64, height=48, pix_fmt="yuv420p")
        audio = container.add_stream("pcm_s16le", rate=RATE_HZ, layout="mono") if sound_s else None
        for index in range(n_frames):
            grey = np.full((48, 64, 3), STEP * index, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(video.encode(None))
        if audio:
            samples = (tone(sound_s) * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = RATE_HZ
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_omni(tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def preprocessor(folder: Path) -> Preprocessor:
    return Preprocessor(folder, CONFIG)


@pytest.fixture(scope="module")
def sounding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("media") / "sounding.mkv", 30, sound_s=3.0)


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("media") / "silent.mkv", 30)


def test_a_mixed_prompt_has_the_ids_of_the_reference_pipeline(preprocessor: Preprocessor, folder: Path, sounding: Path):
    parts = [
        {"type": "image", "image": picture()},
        {"type": "text", "text": "\nhi"},
        {"type": "video", "video": str(sounding)},
        {"type": "audio", "audio": tone(1.0)},
    ]
    messages = [{"role": "system", "content": [{"type": "text", "text": "ok"}]}, *user(*parts)]
    with preprocessor.open(messages) as prompt:
        ids = prompt.inputs.input_ids.tolist()

    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True)
    per_frame = 10 * 14  # 48 x 64 pixels grow to 280 x 392, at least 128 tokens
    text = text.replace("<|IMAGE|>", "<|IMAGE|>" * 2 * 3).replace("<|AUDIO|>", "<|AUDIO|>" * 25)
    two_seconds = "<|VIDEO|>" * 2 * per_frame + "<|AUDIO|>" * 50
    third_second = "<|VIDEO|>" * per_frame + "<|AUDIO|>" * 25
    text = text.replace("<|VIDEO|>", f"<|audio_bos|>{two_seconds}{third_second}<|audio_eos|>")
    assert ids == tokenizer(text)["input_ids"]


def test_what_is_measured_is_what_is_opened(preprocessor: Preprocessor, sounding: Path):
    messages = user(
        {"type": "image", "image": picture(200, 300)},
        {"type": "video", "video": sounding},
        {"type": "audio", "audio": tone(4.5)},
    )
    shape = preprocessor.measure(messages)
    with preprocessor.open(messages) as prompt:
        assert prompt.shape == shape
        assert shape.prompt_tokens == len(prompt.inputs.input_ids)
        assert shape.next_position == prompt.inputs.next_position
    assert shape.grids == ((1, 14, 22), (3, 20, 28))
    assert (shape.image_tokens, shape.video_tokens, shape.audio_tokens) == (7 * 11, 3 * 10 * 14, 75 + 112)
    assert shape.text_tokens == shape.prompt_tokens - 77 - 420 - 187
    assert shape.audio_windows == 2 + 3
    assert [medium.tokens for medium in shape.media] == [77, 420 + 75, 112]


def test_a_file_is_what_its_content_is(preprocessor: Preprocessor, sounding: Path):
    said = {"video": sounding, "image": picture(), "audio": tone(1.0)}
    by_kind = user(*({"type": kind, kind: source} for kind, source in said.items()))
    as_files = user(*({"type": "file", "file": source} for source in said.values()))
    with preprocessor.open(by_kind) as expected, preprocessor.open(as_files) as prompt:
        assert prompt.shape == expected.shape
        assert torch.equal(prompt.inputs.input_ids, expected.inputs.input_ids)


def test_rows_hold_the_placeholders_of_their_medium(preprocessor: Preprocessor, sounding: Path, silent: Path):
    messages = user(
        {"type": "video", "video": silent}, {"type": "image", "image": picture()}, {"type": "video", "video": sounding}
    )
    with preprocessor.open(messages) as prompt:
        inputs = prompt.inputs
        held = [set(inputs.input_ids[visual.rows].tolist()) for visual in inputs.visuals]
        assert held == [{VIDEO}, {IMAGE}, {VIDEO}]
        assert [len(visual.rows) * 4 for visual in inputs.visuals] == [t * h * w for t, h, w in prompt.shape.grids]
        (sound,) = inputs.audios
        assert set(inputs.input_ids[sound.rows].tolist()) == {AUDIO}


def test_patches_of_an_image_are_the_reference_processors(preprocessor: Preprocessor):
    reference = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
    expected = reference(Image.fromarray(picture()), return_tensors="pt")
    with preprocessor.open(user({"type": "image", "image": picture()})) as prompt:
        (visual,) = prompt.inputs.visuals
        (patches,) = visual.patches()
    assert [list(visual.grid)] == expected["image_grid_thw"].tolist()
    torch.testing.assert_close(patches, expected["pixel_values"], atol=2e-6, rtol=0)


def test_mel_of_a_sound_is_the_reference_extractors(preprocessor: Preprocessor):
    expected = WhisperFeatureExtractor(feature_size=128, chunk_length=300)(tone(1.0), sampling_rate=RATE_HZ)
    with preprocessor.open(user({"type": "audio", "audio": tone(1.0)})) as prompt:
        (sound,) = prompt.inputs.audios
    assert sound.mel.shape == (128, 100)
    torch.testing.assert_close(sound.mel.numpy(), expected["input_features"][0][:, :100], atol=2e-6, rtol=0)


def frame_levels(patches: torch.Tensor) -> list[int]:
    """The grey, in steps, of the two frames in one temporal patch of `write_clip`."""
    frames = patches.view(-1, 3, 2, 14 * 14)[:, 0].mean(dim=(0, 2))
    mean, std = PREPROCESSOR_CONFIG["image_mean"][0], PREPROCESSOR_CONFIG["image_std"][0]
    return ((frames * std + mean) * 255 / STEP).round().int().tolist()


def test_a_video_shows_frames_spread_over_the_clip_in_order(preprocessor: Preprocessor, silent: Path):
    with preprocessor.open(user({"type": "video", "video": silent})) as prompt:
        (visual,) = prompt.inputs.visuals
        assert [frame_levels(patches) for patches in visual.patches()] == [[0, 6], [12, 17], [23, 29]]
        assert [patches.shape for patches in visual.patches()] == [(20 * 28, 1176)] * 3


def bicubic_weights(n_in: int, n_out: int) -> np.ndarray:
    """[out, in]: Keys' cubic with a = -0.5, stretched over what an output pixel covers, as torch's `antialias=True`."""
    scale = max(n_in / n_out, 1.0)
    centres = (np.arange(n_out)[:, None] + 0.5) * n_in / n_out
    x = np.abs(np.arange(n_in)[None] + 0.5 - centres) / scale
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def unpatchified(patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Patches of one temporal patch back to two frames [2, 3, H, W] of normalized pixels, patch by patch."""
    frames = np.empty((2, 3, rows * 14, columns * 14))
    places = (
        (y + dy, x + dx) for y in range(0, rows, 2) for x in range(0, columns, 2) for dy in (0, 1) for dx in (0, 1)
    )
    for (row, column), patch in zip(places, patches, strict=True):
        pixels = patch.reshape(3, 2, 14, 14).swapaxes(0, 1)
        frames[:, :, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] = pixels
    return frames


@pytest.mark.parametrize(("max_pixels", "grid"), [(602_112, (18, 30)), (12_544, (6, 10))], ids=["grown", "shrunk"])
def test_frames_from_decoding_to_patches_are_those_of_the_formula(
    preprocessor: Preprocessor, tmp_path: Path, max_pixels: int, grid: tuple[int, int]
):
    noise = np.random.default_rng(1).integers(0, 256, (8, 138, 222, 3), dtype=np.uint8)
    path = tmp_path / "noise.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=4, width=222, height=138, pix_fmt="bgr0")
        for pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    params = MediaParams(min_pixels=min(100_352, max_pixels), max_pixels=max_pixels)
    with preprocessor.open(user({"type": "video", "video": path}), params) as prompt:
        (visual,) = prompt.inputs.visuals
        assert visual.grid == (2, *grid)
        seen = np.concatenate([unpatchified(patches.double().numpy(), *grid) for patches in visual.patches()])
    mean, std = (np.array(PREPROCESSOR_CONFIG[key])[None, :, None, None] for key in ("image_mean", "image_std"))
    levels = (seen * std + mean) * 255
    shown = noise[[0, 2, 5, 7]].transpose(0, 3, 1, 2).astype(np.float64)
    exact = bicubic_weights(138, grid[0] * 14) @ shown @ bicubic_weights(222, grid[1] * 14).T
    # Each level is the formula's value, held in 0..255 and rounded. A place of up to 222 pixels is known to 1e-5 in
    # float32, where the steepest noise changes by some 255 a pixel: hence 0.01.
    assert np.abs(levels - levels.round()).max() < 1e-3
    assert np.abs(levels.round() - exact.clip(0, 255)).max() < 0.5 + 0.01


def test_a_cut_shows_and_sounds_only_what_is_inside(preprocessor: Preprocessor, sounding: Path):
    with preprocessor.open(user({"type": "video", "video": sounding, "video_start": 1.0, "video_end": 2.0})) as prompt:
        (visual,), (sound,) = prompt.inputs.visuals, prompt.inputs.audios
        assert [frame_levels(patches) for patches in visual.patches()] == [[10, 13], [17, 20]]
    assert sound.mel.shape[1] == 100


def test_frames_are_decoded_only_when_they_are_asked_for(preprocessor: Preprocessor):
    frames = [picture(), picture(), "gone.png", "gone.png"]
    with preprocessor.open(user({"type": "video", "video": frames})) as prompt:
        patches = prompt.inputs.visuals[0].patches()
        assert next(patches).shape[1] == 1176
        with pytest.raises(MediaError, match=r"gone\.png"):
            next(patches)


def test_every_frame_of_a_list_is_shown_and_the_last_of_an_odd_number_twice(preprocessor: Preprocessor):
    frames = [np.full((48, 64, 3), STEP * index, np.uint8) for index in range(5)]
    with preprocessor.open(user({"type": "video", "video": frames})) as prompt:
        assert [frame_levels(patches) for patches in prompt.inputs.visuals[0].patches()] == [[0, 1], [2, 3], [4, 4]]


def test_a_clip_of_one_frame_shows_it_twice(preprocessor: Preprocessor, tmp_path: Path):
    clip = write_clip(tmp_path / "one.mkv", 1)
    assert preprocessor.measure(user({"type": "video", "video": clip})).grids == ((1, 20, 28),)


def test_the_sound_of_a_video_can_be_left_out(preprocessor: Preprocessor, sounding: Path, silent: Path):
    without = preprocessor.measure(user({"type": "video", "video": sounding}), MediaParams(video_sound=False))
    assert without.audio_tokens == 0
    assert without.prompt_tokens == preprocessor.measure(user({"type": "video", "video": silent})).prompt_tokens


def test_a_sound_that_ends_before_the_cut_leaves_the_video_silent(preprocessor: Preprocessor, tmp_path: Path):
    clip = write_clip(tmp_path / "early.mkv", 40, sound_s=1.0)
    shape = preprocessor.measure(user({"type": "video", "video": clip, "video_start": 2.0}))
    assert (shape.audio_tokens, shape.video_tokens) == (0, 2 * 140)


def test_an_audio_part_may_be_the_sound_of_a_video(preprocessor: Preprocessor, sounding: Path):
    shape = preprocessor.measure(user({"type": "audio", "audio": sounding}))
    assert (shape.audio_tokens, shape.video_tokens) == (75, 0)


def test_an_audio_part_that_begins_after_the_sound_of_its_video_is_refused(preprocessor: Preprocessor, sounding: Path):
    with pytest.raises(MediaError, match="0 samples"):
        preprocessor.measure(user({"type": "audio", "audio": sounding, "audio_start": 9.0}))


def test_positions_follow_the_frame_rate_that_was_asked_for(preprocessor: Preprocessor, silent: Path):
    with preprocessor.open(user({"type": "video", "video": silent, "fps": 4})) as prompt:
        time = prompt.inputs.position_ids[0][prompt.inputs.visuals[0].rows]
    assert (time.unique() - time[0]).tolist() == [0, 12, 25, 37, 50, 62]


def test_the_shortest_sound_still_makes_a_token(preprocessor: Preprocessor):
    assert preprocessor.measure(user({"type": "audio", "audio": tone(1.0)[:1]})).audio_tokens == 1


@pytest.mark.parametrize(
    ("kind", "found"), [("image", "of kind video"), ("audio", "of kind image"), ("video", "of kind image")]
)
def test_a_part_that_contradicts_its_medium_is_named(preprocessor: Preprocessor, silent: Path, kind: str, found: str):
    source = silent if found == "of kind video" else picture()
    with pytest.raises(MediaError, match=f"message 1, part 2 says {kind}, but .* is {found}"):
        preprocessor.measure(user("look", {"type": kind, kind: source}))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_an_animated_picture_given_as_an_image_shows_its_first(preprocessor: Preprocessor, file_format: str):
    red, blue = (Image.new("RGB", (60, 90), colour) for colour in ("red", "blue"))
    file = io.BytesIO()
    red.save(file, file_format, save_all=True, append_images=[blue], duration=200, lossless=True)
    shown = []
    for source in (file.getvalue(), red):
        with preprocessor.open(user({"type": "image", "image": source})) as prompt:
            (visual,) = prompt.inputs.visuals
            shown.append(torch.cat(list(visual.patches())))
            assert visual.grid == (1, 6, 4)
    assert torch.equal(*shown)


def test_an_audio_part_without_sound_is_refused(preprocessor: Preprocessor, silent: Path):
    with pytest.raises(MediaError, match=r"silent\.mkv .* without sound"):
        preprocessor.measure(user({"type": "audio", "audio": silent}))


def test_a_prompt_beyond_its_limit_names_its_largest_medium(preprocessor: Preprocessor, silent: Path, sounding: Path):
    messages = user({"type": "video", "video": silent}, {"type": "video", "video": sounding})
    complaint = r"takes 1,\d+ tokens, but max_prompt_tokens is 500; its largest part is .*sounding\.mkv with 495 tokens"
    with (
        pytest.raises(MediaError, match=complaint),
        preprocessor.open(messages, limits=Limits(max_prompt_tokens=500)),
    ):
        pass


def test_words_beyond_the_limit_are_to_blame_beside_a_small_picture(preprocessor: Preprocessor):
    messages = user({"type": "image", "image": picture()}, "hi " * 100)
    with (
        pytest.raises(OptionError, match=r"[0-9]+ tokens of it are text \(shorten the text\)"),
        preprocessor.open(messages, limits=Limits(max_prompt_tokens=100)),
    ):
        pass


def test_words_beyond_the_limit_are_an_option_error(preprocessor: Preprocessor):
    with (
        pytest.raises(OptionError, match="max_prompt_tokens is 100"),
        preprocessor.open(user("hi " * 100), limits=Limits(max_prompt_tokens=100)),
    ):
        pass


def test_positions_not_tokens_are_what_the_checkpoint_bounds(preprocessor: Preprocessor, silent: Path):
    videos = [{"type": "video", "video": silent}] * 11
    with preprocessor.open(user(*videos)) as prompt:
        assert len(prompt.inputs.input_ids) > CONFIG["thinker_config"]["text_config"]["max_position_embeddings"]
    with (
        pytest.raises(MediaError, match="positions, but max_position_embeddings is 4,096"),
        preprocessor.open(user({"type": "audio", "audio": tone(170.0)})),
    ):
        pass


def test_a_prompt_longer_than_the_model_was_trained_on_is_warned_of_once(
    preprocessor: Preprocessor, caplog: pytest.LogCaptureFixture
):
    wall = np.zeros((3584, 3584, 3), np.uint8)  # 128 x 128 tokens
    with preprocessor.open(user(*[{"type": "image", "image": wall}] * 2)) as prompt:
        tokens = prompt.shape.prompt_tokens
    assert tokens > 32_768
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"takes {tokens:,} tokens, but the model was trained on at most 32,768" in caplog.text


def test_a_prompt_as_long_as_those_of_training_is_not_warned_of(
    preprocessor: Preprocessor, caplog: pytest.LogCaptureFixture
):
    wall = {"type": "image", "image": np.zeros((3584, 3584, 3), np.uint8)}
    parts = [wall, {**wall, "resized_height": 3528, "resized_width": 3584}]
    missing = 32_768 - preprocessor.measure(user(*parts)).prompt_tokens
    assert preprocessor.measure(user(*parts, "x" * missing)).prompt_tokens == 32_768
    assert not caplog.records
    preprocessor.measure(user(*parts, "x" * (missing + 1)))
    assert len(caplog.records) == 1


def open_files() -> set[str]:
    return {file.path for file in psutil.Process().open_files()}


def test_media_are_open_as_long_as_the_prompt_is(preprocessor: Preprocessor, silent: Path):
    with preprocessor.open(user({"type": "video", "video": silent})):
        assert str(silent) in open_files()
    assert str(silent) not in open_files()


def test_a_later_medium_that_is_missing_leaves_nothing_open(preprocessor: Preprocessor, silent: Path, tmp_path: Path):
    missing = {"type": "video", "video": tmp_path / "missing.mp4"}
    with pytest.raises(MediaError, match=r"missing\.mp4"):
        preprocessor.measure(user({"type": "video", "video": silent}, missing))
    assert str(silent) not in open_files()


def without(config: dict[str, Any], *path: str) -> dict[str, Any]:
    config = copy.deepcopy(config)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return config


@pytest.mark.parametrize(
    "path", [("thinker_config",), ("thinker_config", "seconds_per_chunk"), ("thinker_config", "audio_end_token_id")]
)
def test_a_config_that_lacks_a_key_says_which(folder: Path, path: tuple[str, ...]):
    with pytest.raises(CheckpointError, match=rf"config\.json lacks '{path[-1]}'"):
        Preprocessor(folder, without(CONFIG, *path))


@pytest.mark.parametrize("key", ["patch_size", "hop_length", "image_mean"])
def test_a_preprocessor_config_that_lacks_a_key_says_which(tmp_path: Path, key: str):
    write_small_omni(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(without(PREPROCESSOR_CONFIG, key)))
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json lacks '{key}'"):
        Preprocessor(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", "x"),
        ("merge_size", -1),
        ("temporal_patch_size", 0),
        ("min_pixels", "few"),
        ("hop_length", None),
        ("hop_length", 10**12),
        ("chunk_length", 1.5),
        ("feature_size", 10**12),
        ("n_fft", 401),
        ("image_mean", [1, 2]),
        ("image_std", [1, 0, 1]),
    ],
)
def test_a_preprocessor_config_that_makes_no_sense_says_where(tmp_path: Path, key: str, value: object):
    write_small_omni(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR_CONFIG, key: value}))
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json makes no sense: {key} is "):
        Preprocessor(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("key", "value", "published"),
    [
        ("patch_size", 7, "patch_size of 14"),
        ("merge_size", 4, "spatial_merge_size of 2"),
        ("temporal_patch_size", 4, "temporal_patch_size of 2"),
        ("feature_size", 80, "num_mel_bins of 128"),
    ],
)
def test_media_are_cut_as_the_towers_take_them_or_not_at_all(tmp_path: Path, key: str, value: int, published: str):
    write_small_omni(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR_CONFIG, key: value}))
    vision = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    audio = {**CONFIG["thinker_config"]["audio_config"], "num_mel_bins": 128}
    thinker = {**CONFIG["thinker_config"], "vision_config": vision, "audio_config": audio}
    with pytest.raises(CheckpointError, match=rf"has a {key} of {value}, but config\.json a {published} \(take both"):
        Preprocessor(tmp_path, {"thinker_config": thinker})


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_a_checkpoint_error(tmp_path: Path, name: str):
    write_small_omni(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Preprocessor(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json"])
def test_a_missing_file_is_a_checkpoint_error(tmp_path: Path, name: str):
    write_small_omni(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError):
        Preprocessor(tmp_path, CONFIG)


def test_a_checkpoint_that_hears_another_rate_is_refused(tmp_path: Path):
    write_small_omni(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR_CONFIG, "sampling_rate": 24000}))
    with pytest.raises(CheckpointError, match="24000 Hz"):
        Preprocessor(tmp_path, CONFIG)


def test_newer_spellings_mean_the_same(tmp_path: Path, preprocessor: Preprocessor):
    write_small_omni(tmp_path)
    newer = without(without(PREPROCESSOR_CONFIG, "min_pixels"), "max_pixels")
    newer["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(newer))
    thinker = {key.replace("_token_index", "_token_id"): value for key, value in CONFIG["thinker_config"].items()}
    messages = user({"type": "image", "image": picture()})
    assert Preprocessor(tmp_path, {"thinker_config": thinker}).measure(messages) == preprocessor.measure(messages)
