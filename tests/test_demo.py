"""The demo checkpoint: the published layout, the reference's own opinion of it, and its life in the cache."""

from __future__ import annotations

import errno
import json
import runpy
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2_5OmniForConditionalGeneration

from lowvram.checkpoint import Checkpoint, TensorReader, open_checkpoint
from lowvram.demo import TINY, DemoSize, build_demo, demo_folder
from lowvram.demo.config import omni_config
from lowvram.demo.weights import stored_tensors
from lowvram.errors import CheckpointError, OptionError
from lowvram.quant.packing import unpack_awq
from lowvram.voices import load_speakers

THINKER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Checkpoint:
    """The demo as users get it."""
    folder = tmp_path_factory.mktemp("demo")
    build_demo(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Qwen2_5OmniForConditionalGeneration:
    """The 16-bit demo, loaded by the reference in float32."""
    folder = tmp_path_factory.mktemp("demo16")
    build_demo(folder, quantized=False)
    # Past the model's own from_pretrained, which loses the report.
    load = super(Qwen2_5OmniForConditionalGeneration, Qwen2_5OmniForConditionalGeneration).from_pretrained
    model, report = load(folder, dtype=torch.float32, output_loading_info=True)
    model.load_speakers(folder / "spk_dict.pt")
    # A rotary table is stored as it was published, though constructors compute it; transformers 5.20 wonders about it.
    unexpected = [key for key in report["unexpected_keys"] if not key.endswith("inv_freq")]
    assert not unexpected and not report["missing_keys"] and not report["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo.folder)


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    with safe_open(checkpoint.tensors[name].path, "pt") as file:
        return file.get_tensor(name)


def render(demo: Checkpoint, tokenizer, messages: list[dict], **switches: bool) -> str:
    template = json.loads((demo.folder / "chat_template.json").read_text())["chat_template"]
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **switches)


# --- weights


def test_the_demo_is_small_and_sharded(demo):
    assert demo.weights_bytes < 10e6
    assert len({entry.path for entry in demo.tensors.values()}) >= 2


def test_our_reader_and_the_safetensors_library_agree_on_every_tensor(demo):
    with TensorReader() as reader:
        for entry in demo.tensors.values():
            stored = bytearray(entry.n_bytes)
            reader.read_into(entry, memoryview(stored))
            tensor = read(demo, entry.name)
            assert tuple(tensor.shape) == entry.shape
            assert tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == stored, entry.name


def test_every_thinker_linear_is_stored_as_awq_and_nothing_else_is(demo):
    quantized = {name.removesuffix(".qweight") for name in demo.tensors if name.endswith(".qweight")}
    layers = range(demo.config["thinker_config"]["text_config"]["num_hidden_layers"])
    assert {path.rsplit(".", 1)[1] for path in quantized} == set(THINKER_LINEARS)
    assert len(quantized) == len(layers) * len(THINKER_LINEARS)
    assert all(path.startswith("thinker.model.layers.") for path in quantized)


def test_awq_weights_keep_the_variance_of_what_they_multiply(demo):
    path = "thinker.model.layers.0.mlp.down_proj."
    group_size = demo.quantization["group_size"]
    weight = unpack_awq(
        *(read(demo, path + leaf) for leaf in ("qweight", "qzeros", "scales")),
        group_size=group_size,
        dtype=torch.float32,
    )
    assert weight.shape == (128, 256)
    assert weight.mean().abs() < 0.01
    assert weight.std() == pytest.approx(256**-0.5, rel=0.03)


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_sixteen_bit_checkpoints_keep_token2wav_in_float32(tmp_path, dtype, stored):
    build_demo(tmp_path, quantized=False, dtype=dtype, size=TINY)
    opened = open_checkpoint(tmp_path)
    assert opened.quantization is None
    assert {entry.dtype for name, entry in opened.tensors.items() if name.startswith("token2wav.")} == {"F32"}
    assert {entry.dtype for name, entry in opened.tensors.items() if not name.startswith("token2wav.")} == {stored}


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        build_demo(tmp_path / name, size=TINY)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "second").iterdir())
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_another_seed_gives_other_weights_and_voices(tmp_path):
    for seed in (0, 1):
        build_demo(tmp_path / str(seed), seed=seed, size=TINY)
    for first in [*(tmp_path / "0").glob("*.safetensors"), tmp_path / "0" / "spk_dict.pt"]:
        assert first.read_bytes() != (tmp_path / "1" / first.name).read_bytes(), first.name


def test_values_do_not_depend_on_how_many_rows_are_drawn_at_a_time(tmp_path, monkeypatch):
    build_demo(tmp_path / "whole", size=TINY)
    monkeypatch.setattr("lowvram.demo.weights.PIECE_BYTES", 1000)
    build_demo(tmp_path / "pieces", size=TINY)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "pieces" / path.name).read_bytes()


def test_a_dtype_or_size_that_cannot_be_built_is_refused(tmp_path):
    with pytest.raises(OptionError, match="dtype 'int8' is unknown"):
        build_demo(tmp_path, dtype="int8")
    with pytest.raises(OptionError, match="intermediate is 100, not a multiple of group_size 32"):
        DemoSize(intermediate=100)
    with pytest.raises(OptionError, match="vocab_size 500 has no room"):
        DemoSize(vocab_size=500)


# --- what the reference makes of it


def test_the_reference_hears_sees_thinks_and_speaks_with_it(reference):
    config, g = reference.config, torch.Generator().manual_seed(0)
    thinker, talker = config.thinker_config, config.talker_config
    audio, image = [thinker.audio_token_index] * 25, [thinker.image_token_index] * 4
    ids = torch.tensor([[1, 2, *audio, 3, *image, 4]])
    text_ids, wave = reference.generate(
        input_ids=ids,
        input_features=torch.randn(1, 128, 100, generator=g),
        feature_attention_mask=torch.ones(1, 100, dtype=torch.long),
        thinker_pixel_values=torch.randn(16, 1176, generator=g),
        thinker_image_grid_thw=torch.tensor([[1, 4, 4]]),
        speaker="Ethan",
        thinker_max_new_tokens=8,
        talker_max_new_tokens=30,
        talker_do_sample=False,
        talker_eos_token_id=[talker.tts_codec_pad_token_id, talker.tts_codec_end_token_id],
    )
    assert text_ids.shape[1] > ids.shape[1] + 1
    assert len(wave) == 480 * 30
    assert 0.01 < wave.std() < 0.5


def test_variance_is_kept_through_the_thinker(reference):
    ids = torch.randint(0, 360, (1, 50), generator=torch.Generator().manual_seed(0))
    states = reference.thinker(input_ids=ids, output_hidden_states=True).hidden_states
    assert all(0.5 < state.std() < 5 for state in states)


def test_sound_depends_on_the_neighbouring_blocks_of_codes(reference):
    dit, voice = reference.token2wav.code2wav_dit_model, reference.speaker_map["Chelsie"]
    codes = torch.arange(48)[None]
    changed = codes.clone()
    changed[0, 24:36] += 50
    mels = []
    for tokens in (codes, changed):
        torch.manual_seed(0)
        mels.append(dit.sample(voice["cond"], voice["ref_mel"], tokens, num_steps=3))
    effect = (mels[0] - mels[1]).abs().amax(1)[0].view(4, 24).amax(1)  # by block of 12 codes
    assert effect.min() > 1e-3


# --- tokenizer, template, voices


def test_special_tokens_have_the_ids_that_the_config_names(demo, tokenizer):
    thinker, first = demo.config["thinker_config"], DemoSize().first_special_id
    assert tokenizer.convert_ids_to_tokens(first) == "<|endoftext|>"
    for token, key in {
        "<|im_start|>": "bos_token_id",
        "<|im_end|>": "eos_token_id",
        "<|AUDIO|>": "audio_token_index",
        "<|audio_bos|>": "audio_start_token_id",
        "<|audio_eos|>": "audio_end_token_id",
        "<|IMAGE|>": "image_token_index",
        "<|VIDEO|>": "video_token_index",
        "<|vision_bos|>": "vision_start_token_id",
        "<|vision_eos|>": "vision_end_token_id",
        "<|vision_pad|>": "vision_token_id",
        "user": "user_token_id",
    }.items():
        assert tokenizer.encode(token) == [thinker[key]], token


def test_the_tokenizer_knows_what_the_processor_asks_for(tokenizer):
    assert (tokenizer.image_token, tokenizer.audio_token, tokenizer.video_token) == (
        "<|IMAGE|>",
        "<|AUDIO|>",
        "<|VIDEO|>",
    )
    assert (tokenizer.vision_bos_token, tokenizer.vision_eos_token) == ("<|vision_bos|>", "<|vision_eos|>")
    assert (tokenizer.audio_bos_token, tokenizer.audio_eos_token) == ("<|audio_bos|>", "<|audio_eos|>")
    assert tokenizer.image_token_id == tokenizer.convert_tokens_to_ids("<|IMAGE|>")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_the_tokenizer(tokenizer, text):
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(tokenizer.encode(text)) == normal


def test_the_template_writes_turns_and_media_as_published(demo, tokenizer):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "video", "video": "x"}, {"type": "audio", "audio": "y"}]},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": [{"type": "image", "image": "z"}, {"type": "text", "text": " And this?\n"}]},
    ]
    assert render(demo, tokenizer, messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_bos|><|VIDEO|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|><|im_end|>\n"
        "<|im_start|>assistant\nFine.<|im_end|>\n"
        "<|im_start|>user\n<|vision_bos|><|IMAGE|><|vision_eos|> And this?\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_template_adds_a_system_turn_where_there_is_none(demo, tokenizer):
    assert render(demo, tokenizer, [{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_the_template_numbers_media_when_asked(demo, tokenizer):
    picture, sound = {"type": "image", "image": "x"}, {"type": "audio", "audio": "y"}
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": [picture, sound, picture]}]
    text = render(demo, tokenizer, messages, add_vision_id=True, add_audio_id=True)
    assert [text.count(label) for label in ("Picture 1: <|vision", "Audio 1: <|audio", "Picture 2: <|vision")] == [
        1,
        1,
        1,
    ]


def test_voices_begin_with_ids_of_the_text_vocabulary(demo):
    voices = load_speakers(demo.speakers_path)
    assert list(voices) == ["Chelsie", "Ethan"]
    vocab_size = demo.config["thinker_config"]["text_config"]["vocab_size"]
    assert all(voice["bos_token"] < vocab_size for voice in voices.values())
    assert {(voice["cond"].shape, voice["ref_mel"].shape) for voice in voices.values()} == {((1, 192), (1, 60, 80))}


# --- cache


def test_the_demo_is_built_once(tmp_path):
    folder = demo_folder(tmp_path)
    (folder / "mark").touch()
    assert demo_folder(tmp_path) == folder
    assert (folder / "mark").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_two_builders_at_once_end_with_one_whole_demo(tmp_path):
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(demo_folder(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders[0] == folders[1]
    assert list(tmp_path.iterdir()) == folders[:1]
    assert open_checkpoint(folders[0]).speakers_path.exists()


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fill_the_disk(folder: Path, *arguments: object) -> None:
        (folder / "model.safetensors").touch()
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("lowvram.demo.weights.write_weights", fill_the_disk)
    with pytest.raises(CheckpointError, match=r"cannot be written to .*: no space left"):
        demo_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"the demo checkpoint .* cannot be written to"):
        demo_folder(tmp_path / "file" / "cache")


def test_the_cache_is_where_the_system_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_folder().parent == tmp_path / "lowvram"


# --- the same recipe at full size


def test_the_recipe_at_7b_has_the_published_parameters_ids_and_linears():
    size = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "synthetic.py"))["SIZE_7B"]
    config = omni_config(size, user_id=872, quantized=True, dtype="float16")
    tensors = list(stored_tensors(config, size, "F16"))
    words = sum(tensor.n_bytes // 4 for tensor in tensors if tensor.name.endswith(".qweight"))
    others = sum(
        tensor.n_bytes // 2 for tensor in tensors if tensor.dtype == "F16" and not tensor.name.endswith(".scales")
    )
    assert sum(tensor.name.endswith(".qweight") for tensor in tensors) == 196
    assert 8 * words + others == pytest.approx(10.73e9, rel=1e-3)
    talker = config["talker_config"]
    assert (talker["tts_codec_pad_token_id"], talker["tts_codec_mask_token_id"]) == (8292, 8296)
    assert (talker["tts_text_start_token_id"], talker["video_token_index"]) == (151860, 151656)
    assert talker["rope_scaling"]["mrope_section"] == [16, 24, 24]
