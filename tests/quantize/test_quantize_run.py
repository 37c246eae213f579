from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from media_files import numbered_frame, sine, write_sound, write_video
from parity.reference import load_reference
from PIL import Image
from quantized_demo import OPTIONS, Finished, files_in
from safetensors.torch import load_file, save_file

from lowvram.checkpoint import open_checkpoint
from lowvram.device import open_device
from lowvram.errors import CheckpointError, MediaError, OptionError, UnsupportedQuantError
from lowvram.events import Progress
from lowvram.options import TALKER_SAMPLING, SamplingParams, SpeechParams
from lowvram.preprocess import Preprocessor
from lowvram.quant.recipe import LINEARS
from lowvram.quantize import LayerReport, QuantizeOptions, QuantizeReport, quantize_checkpoint, run
from lowvram.quantize.samples import choose_blocks, gather_runs
from lowvram.quantize.state import UNFINISHED
from lowvram.runtime import OmniRuntime

CPU = open_device("cpu")
LINEAR = "thinker.model.layers.0.mlp.up_proj.weight"


def begin(source: Path, target: Path, options: QuantizeOptions = OPTIONS) -> Iterator[object]:
    return quantize_checkpoint(source, target, options, device=CPU)


def finish(source: Path, target: Path, options: QuantizeOptions = OPTIONS) -> QuantizeReport:
    *_, report = begin(source, target, options)
    assert isinstance(report, QuantizeReport)
    return report


def stop_at(stage: str, source: Path, target: Path, options: QuantizeOptions = OPTIONS) -> None:
    """Begin a run, and end it at the first sign of that stage."""
    events = begin(source, target, options)
    next(event for event in events if isinstance(event, Progress) and event.stage == stage)
    events.close()


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def speaking(folder: Path, copy: Path) -> Path:
    """A checkpoint as the library takes it: whole."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"enable_audio_output": True}))
    return copy


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """The source in a folder of its own, to be spoiled."""
    return Path(shutil.copytree(source, tmp_path / "source"))


def change_tensor(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace a tensor, or take it out, and forget the index."""
    (folder / "model.safetensors.index.json").unlink()
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors.pop(name)
            save_file(tensors | ({} if value is None else {name: value}), path)


def test_all_linears_of_the_thinker_are_in_four_bits_and_the_rest_is_as_it_was(source: Path, finished: Finished):
    before, after = tensors_in(source), tensors_in(finished.folder)
    layers = [f"thinker.model.layers.{i}." for i in range(2)]
    linears = {prefix + path for prefix in layers for path in LINEARS}
    assert {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")} == linears
    changed = {f"{linear}.{leaf}" for linear in linears for leaf in ("weight", "qweight", "qzeros", "scales")}
    changed |= {
        f"{prefix}{norm}.weight" for prefix in layers for norm in ("input_layernorm", "post_attention_layernorm")
    }
    for name in before.keys() - changed:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    assert after.keys() - changed == before.keys() - changed
    assert all(after[f"{linear}.scales"].dtype == torch.float16 for linear in linears)


def test_every_other_file_is_copied_byte_for_byte(source: Path, finished: Finished):
    for name in ("spk_dict.pt", "tokenizer.json", "chat_template.json", "preprocessor_config.json"):
        assert (finished.folder / name).read_bytes() == (source / name).read_bytes()
    assert not (finished.folder / UNFINISHED).exists()


def test_weights_in_other_formats_are_left_behind(copy: Path, tmp_path: Path):
    for name in ("consolidated.pth", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (copy / name).write_text("{}")
    finish(copy, tmp_path / "new")
    assert not list((tmp_path / "new").glob("*torch*")) + list((tmp_path / "new").glob("*.pth"))


def test_the_config_says_how_it_is_quantized_and_is_otherwise_the_same(source: Path, finished: Finished):
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, finished.folder))
    assert after.pop("quantization_config")["group_size"] == 32
    assert after == before


def test_the_index_is_one_that_opening_accepts(finished: Finished):
    opened = open_checkpoint(finished.folder)
    index = json.loads((finished.folder / "model.safetensors.index.json").read_text())
    assert {name: entry.path.name for name, entry in opened.tensors.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == opened.weights_bytes


def test_the_result_answers_in_text_and_speech(speaking_source: Path, tmp_path: Path):
    finish(speaking_source, tmp_path / "new")
    speech = SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=30, seed=1), steps=2)
    with OmniRuntime.open(tmp_path / "new", device="cpu", dtype="float32") as omni:
        messages = [{"role": "user", "content": "hello green river"}]
        *_, answer = omni.generate(messages, sampling=SamplingParams(max_tokens=8), speech=speech)
    assert answer.text and answer.codec_ids


def test_what_is_reported_of_next_words_is_what_the_librarys_own_model_says(
    source: Path, finished: Finished, tmp_path: Path
):
    opened = open_checkpoint(source)
    runs = gather_runs(Preprocessor(source, opened.config), (), seed=0)
    lengths = [run.length for run in runs]
    choice = choose_blocks(lengths, samples=OPTIONS.samples, sample_tokens=OPTIONS.sample_tokens, seed=0)
    with runs[0].inputs() as inputs:
        ids = torch.stack([inputs.input_ids[block.rows] for block in choice.held_out])
    with torch.inference_mode():
        right, ours = (
            load_reference(speaking(folder, tmp_path / folder.name)).thinker(input_ids=ids).logits
            for folder in (source, finished.folder)
        )
    log_p, log_q = right.double().log_softmax(-1), ours.double().log_softmax(-1)
    told = finished.report.quantized
    assert told.kl_divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    assert told.top1 == pytest.approx(float((right.argmax(-1) == ours.argmax(-1)).double().mean()))
    assert finished.report.held_out_tokens == ids.numel()


def test_the_report_is_kept_beside_the_weights(finished: Finished):
    kept = json.loads((finished.folder / "quantize_report.json").read_text())
    assert kept == json.loads(json.dumps(finished.report.to_json()))
    assert [layer["layer"] for layer in kept["layers"]] == [0, 1]


def test_the_report_does_not_tell_where_things_lie(source: Path, tmp_path: Path):
    (tmp_path / "words.txt").write_text("a few words")
    report = finish(source, tmp_path / "new", replace(OPTIONS, calibrate=(str(tmp_path / "words.txt"),)))
    assert (report.model, report.options.calibrate) == ("demo-16-bit", ("words.txt",))


def test_the_same_arguments_give_the_same_bytes(source: Path, finished: Finished, tmp_path: Path):
    finish(source, tmp_path / "again")
    assert files_in(tmp_path / "again") == finished.files


@pytest.mark.parametrize(
    "last",
    [
        Progress("embed calibration samples", 64, 128, "tokens"),
        Progress("embed held-out samples", 32, 32, "tokens"),
        Progress("layer 1 of 2", 128, 256, "tokens"),
        LayerReport,
        Progress("layer 2 of 2", 256, 256, "tokens"),
    ],
    ids=str,
)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    source: Path, finished: Finished, tmp_path: Path, last: Progress | type
):
    events = begin(source, tmp_path / "new")
    next(event for event in events if event == last or type(event) is last)
    events.close()
    assert (tmp_path / "new" / UNFINISHED).is_dir() and not (tmp_path / "new" / "config.json").exists()
    report = finish(source, tmp_path / "new")
    assert files_in(tmp_path / "new") == finished.files
    assert report == finished.report


@pytest.mark.parametrize("writes", [0, 4, 7, 9, 14, 22, 23])
def test_a_run_that_died_while_writing_ends_with_the_same_bytes(
    source: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
):
    replace_file, left = os.replace, [writes]

    def die_at_last(old: Path, new: Path) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace_file(old, new)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", die_at_last)
        finish(source, tmp_path / "new")
    finish(source, tmp_path / "new")
    assert files_in(tmp_path / "new") == finished.files


@pytest.mark.parametrize("changed", [{"seed": 1}, {"samples": 5}, {"sample_tokens": 16}, {"calibrate": ("a.txt",)}])
def test_an_unfinished_run_is_not_continued_with_other_options(
    source: Path, tmp_path: Path, changed: dict[str, object]
):
    stop_at("copy", source, tmp_path / "new")
    with pytest.raises(OptionError, match=f"unfinished run with {next(iter(changed))} "):
        next(begin(source, tmp_path / "new", replace(OPTIONS, **changed)))


def test_an_unfinished_run_is_not_continued_with_other_weights(source: Path, copy: Path, tmp_path: Path):
    stop_at("copy", source, tmp_path / "new")
    change_tensor(copy, "talker.thinker_to_talker_proj.bias", torch.zeros(48))
    with pytest.raises(OptionError, match="unfinished run with weights"):
        next(begin(copy, tmp_path / "new"))


@pytest.mark.parametrize("seed", [OPTIONS.seed, 1])
def test_what_another_process_began_while_samples_were_chosen_is_gone_on_with_or_refused(
    source: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
):
    target, choose = tmp_path / "new", run.choose_blocks

    def choose_slowly(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(run, "choose_blocks", choose)
        stop_at("layer 2 of 2", source, target, replace(OPTIONS, seed=seed))
        return choose(*arguments, **options)

    monkeypatch.setattr(run, "choose_blocks", choose_slowly)
    if seed == OPTIONS.seed:
        finish(source, target)
        assert files_in(target) == files_in(finished.folder)
    else:
        with pytest.raises(OptionError, match="unfinished run with seed 1, not 0"):
            finish(source, target)


def test_weights_of_the_same_shape_but_other_values_are_others(copy: Path, tmp_path: Path):
    stop_at("copy", copy, tmp_path / "new")
    entry = open_checkpoint(copy).tensors[LINEAR]
    with open(entry.path, "r+b") as file:
        file.seek(entry.offset)
        file.write(bytes(64))
    with pytest.raises(OptionError, match="unfinished run with weights"):
        next(begin(copy, tmp_path / "new"))


def test_what_cannot_be_calibrated_on_is_named_before_anything_is_written(source: Path, tmp_path: Path):
    options = replace(OPTIONS, calibrate=(str(tmp_path / "missing.mp4"),))
    with pytest.raises(MediaError, match=r"missing\.mp4"):
        next(begin(source, tmp_path / "new", options))
    assert not (tmp_path / "new").exists()


def test_a_run_whose_media_break_may_begin_anew_without_them(
    source: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")

    def broken(*_: object) -> None:
        raise MediaError("picture.png breaks off", path="picture.png")

    with monkeypatch.context() as patched, pytest.raises(MediaError):
        patched.setattr("lowvram.quantize.run.embedded_blocks", broken)
        finish(source, tmp_path / "new", replace(OPTIONS, calibrate=(str(tmp_path / "picture.png"),)))
    finish(source, tmp_path / "new")
    assert files_in(tmp_path / "new") == finished.files


def test_held_out_tokens_are_compared_a_few_at_a_time(
    source: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lowvram.quantize.run.COMPARED_TOKENS", 7)
    events = list(begin(source, tmp_path / "new"))
    report = events[-1]
    assert isinstance(report, QuantizeReport)
    assert report.quantized.kl_divergence == pytest.approx(finished.report.quantized.kl_divergence, rel=1e-5)
    assert report.quantized.top1 == pytest.approx(finished.report.quantized.top1)
    told = [event for event in events if isinstance(event, Progress) and event.stage == "compare next words"]
    assert len(told) == -(-report.held_out_tokens // 7) and told[-1].done == told[-1].total


def test_a_folder_with_something_else_in_it_is_refused(source: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match="neither empty nor an unfinished run"):
        next(begin(source, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_finished_folder_is_refused(source: Path, finished: Finished):
    with pytest.raises(OptionError, match="neither empty"):
        next(begin(source, finished.folder))


def test_a_checkpoint_that_is_quantized_already_is_refused(finished: Finished, tmp_path: Path):
    with pytest.raises(CheckpointError, match="quantized already, by awq in 4 bits"):
        next(begin(finished.folder, tmp_path / "new"))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(OptionError, match=r"takes 1\.\d+ MiB of disk, but .* has 976\.6 KiB free"):
        next(begin(source, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_meanwhile_stops_a_run_that_can_go_on(
    source: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    events = begin(source, tmp_path / "new")
    next(event for event in events if isinstance(event, LayerReport))
    with monkeypatch.context() as patched, pytest.raises(OptionError, match="cannot be written: No space left"):
        patched.setattr(os, "fsync", full)
        list(events)
    finish(source, tmp_path / "new")
    assert files_in(tmp_path / "new") == finished.files


def test_a_folder_that_cannot_be_made_is_named(source: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"file.* cannot be written: Not a directory"):
        next(begin(source, tmp_path / "file" / "new"))


def test_groups_that_do_not_divide_the_linears_are_refused(source: Path, tmp_path: Path):
    with pytest.raises(UnsupportedQuantError, match="groups of 128"):
        next(begin(source, tmp_path / "new", replace(OPTIONS, group_size=128)))
    assert not (tmp_path / "new").exists()


def test_a_missing_tensor_is_named(copy: Path, tmp_path: Path):
    change_tensor(copy, LINEAR, None)
    with pytest.raises(CheckpointError, match=f"tensor {LINEAR} is missing"):
        next(begin(copy, tmp_path / "new"))


def test_a_layer_that_computes_what_is_not_a_number_is_named(copy: Path, tmp_path: Path):
    change_tensor(copy, LINEAR.replace(".0.", ".1."), torch.full((96, 64), float("nan"), dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"thinker\.model\.layers\.1 gave no finite numbers for 128 of 128"):
        finish(copy, tmp_path / "new")


def test_too_few_tokens_to_calibrate_on_are_refused(source: Path, tmp_path: Path):
    with pytest.raises(OptionError, match="make 1 of the 2 samples needed"):
        finish(source, tmp_path / "new", replace(OPTIONS, sample_tokens=100_000))


def test_it_calibrates_on_sounds_pictures_and_clips_too(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    media = tmp_path / "media"
    media.mkdir()
    write_sound(media / "tone.flac", sine(16_000, 1.0)[None], 16_000, "flac")
    Image.new("RGB", (64, 64), "red").save(media / "picture.png")
    write_video(media / "clip.mp4", [numbered_frame(n) for n in range(4)], fps=2, sound=sine(48_000, 2.0))
    (tmp_path / "texts.jsonl").write_text('"a few words"')
    monkeypatch.setattr("lowvram.quantize.samples.BUILT_IN", tmp_path / "texts.jsonl")
    options = replace(OPTIONS, sample_tokens=2_000, calibrate=(str(media),))
    report = finish(source, tmp_path / "new", options)
    runs = gather_runs(Preprocessor(source, open_checkpoint(source).config), options.calibrate, seed=0)
    assert len(runs) == 4
    assert report.calibration_tokens + report.held_out_tokens == sum(run.length for run in runs)
