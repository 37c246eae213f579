"""Eight bits, and parts besides the thinker: what is written, what is told of it, and that it answers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.clips import chirp, noise_picture
from parity.reference import answer, load_reference
from quantized_demo import OPTIONS, Finished, files_in
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniForConditionalGeneration

from lowvram.checkpoint import TensorReader, open_checkpoint
from lowvram.device import open_device
from lowvram.errors import CheckpointError, OptionError, UnsupportedQuantError
from lowvram.events import Progress
from lowvram.model import build_model
from lowvram.options import TALKER_SAMPLING, MediaParams, SamplingParams, SpeechParams
from lowvram.planning import find_headers, footprint_of
from lowvram.quant.int8 import round_to_int8, unpack_int8
from lowvram.quant.linear import PackedLinear
from lowvram.quant.packing import fake_quantize
from lowvram.quant.recipe import LINEARS
from lowvram.quant.reference import ReferenceBackend
from lowvram.quantize import Deviations, PartReport, QuantizeOptions, QuantizeReport, quantize_checkpoint
from lowvram.quantize.options import ALSO
from lowvram.runtime import OmniRuntime

CPU = open_device("cpu")
EIGHT = replace(OPTIONS, bits=8)
MIXED = replace(OPTIONS, also=("lm_head", "talker", "encoders"))
FOUR = replace(OPTIONS, also=ALSO, also_bits=4)
HEAD, TABLE = "thinker.lm_head", "thinker.model.embed_tokens.weight"
PREFIXES = {"talker": "talker.", "encoders": ("thinker.visual.", "thinker.audio_tower."), "lm_head": HEAD}
LOOK_AND_LISTEN = [
    {"type": "image", "image": noise_picture(140, 200, 1)},
    {"type": "audio", "audio": chirp(1.2, 3)},
    {"type": "text", "text": "what is this?"},
]
MESSAGES = [{"role": "user", "content": LOOK_AND_LISTEN}]
SMALL = MediaParams(min_pixels=28 * 28, max_pixels=30 * 28 * 28)
needs_judge = pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="needs compressed-tensors, the judge")


def begin(source: Path, target: Path, options: QuantizeOptions) -> Iterator[object]:
    return quantize_checkpoint(source, target, options, device=CPU)


def finish(source: Path, target: Path, options: QuantizeOptions) -> Finished:
    *_, report = begin(source, target, options)
    assert isinstance(report, QuantizeReport)
    return Finished(target, report)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module", params=[EIGHT, MIXED, FOUR], ids=["8 bits", "mixed", "4 bits"])
def made(request: pytest.FixtureRequest, speaking_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(speaking_source, tmp_path_factory.mktemp("made") / "new", request.param)


@pytest.fixture(scope="module")
def mixed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(source, tmp_path_factory.mktemp("mixed") / "new", MIXED)


def widths(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Published path -> bits of every packed linear, from what is stored alone."""
    return {
        name.removesuffix(".weight_packed"): 32 * tensor.shape[1] // int(tensors[f"{name[:-7]}_shape"][1])
        for name, tensor in tensors.items()
        if name.endswith(".weight_packed")
    }


def test_what_is_asked_for_is_packed_and_the_rest_is_as_it_was(speaking_source: Path, made: Finished):
    before, after = tensors_in(speaking_source), tensors_in(made.folder)
    options, packed = made.report.options, widths(after)
    thinker = {f"thinker.model.layers.{i}.{path}" for i in range(2) for path in LINEARS}
    assert {path for path, bits in packed.items() if path in thinker and bits == options.bits} == thinker
    others = {path: bits for path, bits in packed.items() if path not in thinker}
    assert set(others.values()) == ({options.also_bits} if options.also else set())
    assert len(others) == sum(part.linears for part in made.report.parts)
    norms = re.compile(r"thinker\.model\.layers\.\d+\.(input|post_attention)_layernorm\.weight")
    changed = {f"{path}.weight" for path in packed} | {name for name in before if norms.fullmatch(name)}
    for name in before.keys() - changed:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    assert not {f"{path}.weight" for path in packed} & after.keys()


def test_other_parts_are_the_nearest_of_what_they_were(speaking_source: Path, made: Finished):
    before, after = tensors_in(speaking_source), tensors_in(made.folder)
    nearest = round_to_int8 if made.report.options.also_bits == 8 else fake_quantize
    for part in made.report.parts:
        squares = {}
        for path in widths(after):
            if path.startswith(PREFIXES[part.part]):
                weight = before[f"{path}.weight"].float()
                squares[path] = ((nearest(weight, 32) - weight).square().sum(), weight.square().sum())
        error, size = (sum(float(pair[i]) for pair in squares.values()) for i in range(2))
        assert part.linears == len(squares)
        assert part.weight_error == pytest.approx(error / size, rel=1e-6)


def test_linears_that_do_not_divide_stay_and_are_named(mixed: Finished):
    left = {part.part: set(part.left_alone) for part in mixed.report.parts}
    assert left["encoders"] == {"thinker.visual.blocks.*.mlp.down_proj"}  # 44 inputs
    assert "talker.model.layers.*.self_attn.q_proj" in left["talker"]  # 48 inputs
    assert left["lm_head"] == set()
    kept = tensors_in(mixed.folder)
    assert "thinker.visual.blocks.0.mlp.down_proj.weight" in kept and "talker.codec_head.weight" in kept


def test_deviations_are_told_first_and_in_the_report(source: Path, tmp_path: Path):
    events = begin(source, tmp_path / "new", replace(MIXED, bits=8))
    first = next(events)
    assert isinstance(first, Deviations) and not (tmp_path / "new").exists()
    assert [sentence.split(":")[0] for sentence in first.sentences[:-1]] == ["thinker", "talker", "encoders", "lm_head"]
    assert "compressed-tensors instead of AWQ" in first.sentences[-1]
    *_, report = events
    assert report.deviations == first.sentences


def test_the_published_recipe_deviates_from_nothing(finished: Finished):
    assert (finished.report.deviations, finished.report.parts, finished.report.head_alone) == ((), (), None)
    assert config_of(finished.folder)["quantization_config"]["quant_method"] == "awq"


@needs_judge
def test_the_config_tells_compressed_tensors_which_linears_are_how_wide(made: Finished):
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = config_of(made.folder)
    told = QuantizationConfig.model_validate(config.pop("quantization_config"))
    with torch.device("meta"):
        model = Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig.from_dict(config))
        apply_quantization_config(model, told, run_compressed=False)
    read = {
        path: module.quantization_scheme.weights.num_bits
        for path, module in model.named_modules()
        if getattr(module, "quantization_scheme", None)
    }
    stored = widths(tensors_in(made.folder))
    assert {published(path): bits for path, bits in read.items()} == stored


def published(path: str) -> str:
    """A path in any of the library's trees, as checkpoints spell it."""
    for tower in ("visual", "audio_tower"):
        path = path.replace(f"thinker.model.{tower}.", f"thinker.{tower}.")
    return path.replace("thinker.model.language_model.", "thinker.model.")


@needs_judge
def test_it_answers_as_the_library_does_with_the_weights_that_compressed_tensors_reads(made: Finished, tmp_path: Path):
    reference = load_reference(decompressed(made.folder, tmp_path / "plain"))
    speech = SpeechParams(voice="Chelsie", sampling=replace(TALKER_SAMPLING, temperature=0.0, max_tokens=20), steps=2)
    with OmniRuntime.open(made.folder, device="cpu", dtype="float32") as omni:
        *_, said = omni.generate(MESSAGES, sampling=SamplingParams(max_tokens=12), speech=speech, media=SMALL)
        with omni.preprocessor.open(MESSAGES, SMALL) as prompt:
            expected = answer(
                reference, prompt.inputs, voice="Chelsie", stop_ids=omni.stop_ids, max_tokens=12, max_codes=20
            )
        assert list(said.text_ids) == [i for i in expected.text_ids if i not in omni.stop_ids]
    assert list(said.codec_ids) == expected.codec_ids


def decompressed(folder: Path, target: Path) -> Path:
    """The checkpoint as compressed-tensors reads it, in float32."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    config, stored = config_of(folder), tensors_in(folder)
    groups = QuantizationConfig.model_validate(config.pop("quantization_config")).config_groups.values()
    plain = {name: tensor.float() for name, tensor in stored.items() if not re.search(r"\.weight_\w+$", name)}
    for path in widths(stored):
        (scheme,) = (group for group in groups if any(re.match(target[3:], path) for target in group.targets))
        leaves = {
            name.removeprefix(f"{path}."): tensor for name, tensor in stored.items() if name.startswith(f"{path}.")
        }
        leaves["weight_scale"] = leaves["weight_scale"].float()
        plain[f"{path}.weight"] = PackedQuantizationCompressor.decompress(leaves, scheme)["weight"]
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_the_embedding_table_stays_where_only_the_head_is_quantized(source: Path, mixed: Finished):
    before, after = tensors_in(source), tensors_in(mixed.folder)
    assert torch.equal(before[TABLE], after[TABLE])
    head = after[f"{HEAD}.weight_packed"], after[f"{HEAD}.weight_scale"]
    assert torch.equal(unpack_int8(*head, 32, torch.float32), round_to_int8(before[f"{HEAD}.weight"], 32))


def test_a_head_that_is_the_embedding_table_gets_weights_of_its_own(source: Path, tmp_path: Path):
    tied = Path(shutil.copytree(source, tmp_path / "tied"))
    (tied / "model.safetensors.index.json").unlink()
    for path in tied.glob("*.safetensors"):
        save_file({name: tensor for name, tensor in load_file(path).items() if not name.startswith(HEAD)}, path)
    config = config_of(tied)
    config["thinker_config"]["text_config"]["tie_word_embeddings"] = True
    (tied / "config.json").write_text(json.dumps(config))
    made = finish(tied, tmp_path / "new", replace(OPTIONS, also=("lm_head",)))
    after = tensors_in(made.folder)
    assert torch.equal(after[TABLE], tensors_in(tied)[TABLE])
    head = after[f"{HEAD}.weight_packed"], after[f"{HEAD}.weight_scale"]
    assert torch.equal(unpack_int8(*head, 32, torch.float32), round_to_int8(after[TABLE], 32))
    assert config_of(made.folder)["thinker_config"]["text_config"]["tie_word_embeddings"] is False
    with OmniRuntime.open(made.folder, device="cpu", dtype="float32") as omni:
        *_, said = omni.generate(MESSAGES, sampling=SamplingParams(max_tokens=4), speech=None, media=SMALL)
    assert said.text_ids


def test_what_the_head_alone_costs_is_told(source: Path, mixed: Finished, tmp_path: Path):
    told = mixed.report
    assert told.head_alone is not None and 0 < told.head_alone.kl_divergence < told.quantized.kl_divergence
    whole_head = finish(source, tmp_path / "new", replace(OPTIONS, also=("encoders",))).report
    assert whole_head.head_alone is None
    assert told.quantized.kl_divergence != whole_head.quantized.kl_divergence
    assert told.layers == whole_head.layers


def test_eight_bits_agree_far_better_than_four(source: Path, finished: Finished, tmp_path: Path):
    eight = finish(source, tmp_path / "new", EIGHT).report
    for fine, coarse in zip(eight.layers, finished.report.layers, strict=True):
        assert fine.quantized < 0.02 * coarse.quantized
    assert eight.quantized.kl_divergence < 0.02 * finished.report.quantized.kl_divergence


@pytest.mark.parametrize("last", ["quantize talker", "quantize lm_head", PartReport, "layer 1 of 2"], ids=str)
def test_a_run_that_was_stopped_ends_with_the_same_bytes_and_report(
    source: Path, mixed: Finished, tmp_path: Path, last: str | type
):
    events = begin(source, tmp_path / "new", MIXED)
    next(event for event in events if getattr(event, "stage", type(event)) == last)
    events.close()
    again = finish(source, tmp_path / "new", MIXED)
    assert files_in(tmp_path / "new") == mixed.files
    assert again.report == mixed.report


def test_a_part_that_was_finished_is_not_made_again(source: Path, tmp_path: Path):
    events = begin(source, tmp_path / "new", MIXED)
    next(event for event in events if isinstance(event, PartReport))
    events.close()
    stages = {event.stage for event in begin(source, tmp_path / "new", MIXED) if isinstance(event, Progress)}
    assert "quantize talker" not in stages and "quantize encoders" in stages


@pytest.mark.parametrize("changed", [{"bits": 8}, {"also": ("talker",)}, {"also_bits": 4}])
def test_an_unfinished_run_is_not_continued_in_other_widths(source: Path, tmp_path: Path, changed: dict[str, Any]):
    events = begin(source, tmp_path / "new", MIXED)
    next(event for event in events if getattr(event, "stage", "") == "copy")
    events.close()
    with pytest.raises(OptionError, match=f"unfinished run with {next(iter(changed))} "):
        list(begin(source, tmp_path / "new", replace(MIXED, **changed)))


def test_a_plan_counts_what_lies_on_the_device(made: Finished):
    checkpoint = open_checkpoint(made.folder)
    planned = footprint_of(find_headers(str(made.folder)), "bfloat16")
    with TensorReader() as reader:
        model = build_model(checkpoint, reader, device=CPU.torch, dtype=torch.bfloat16, backend=ReferenceBackend())
        for component, blocks in model.components.items():
            for block, size in zip(blocks, planned.components[component], strict=True):
                if any(isinstance(linear, PackedLinear) for linear in block.module.modules()):
                    assert size.n_bytes == block.n_bytes
        model.close()


def test_a_part_that_the_checkpoint_lacks_is_refused(source: Path, tmp_path: Path):
    silent = Path(shutil.copytree(source, tmp_path / "silent"))
    (silent / "model.safetensors.index.json").unlink()
    for path in silent.glob("*.safetensors"):
        save_file(
            {name: t for name, t in load_file(path).items() if not name.startswith(("talker", "token2wav"))}, path
        )
    with pytest.raises(OptionError, match="has no talker to quantize also"):
        next(begin(silent, tmp_path / "new", replace(OPTIONS, also=("talker",))))


def test_a_part_that_cannot_be_stored_in_such_groups_is_refused(source: Path, tmp_path: Path):
    with pytest.raises(UnsupportedQuantError, match="no linear of talker divides into words and groups of 128"):
        next(begin(source, tmp_path / "new", replace(OPTIONS, also=("talker",), group_size=128)))


def test_a_weight_that_is_not_a_number_is_named(source: Path, tmp_path: Path):
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    (copy / "model.safetensors.index.json").unlink()
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{HEAD}.weight" in tensors:
            tensors[f"{HEAD}.weight"][3, 5] = torch.nan
            save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"thinker\.lm_head\.weight in .* holds what is not a finite number"):
        finish(copy, tmp_path / "new", replace(OPTIONS, also=("lm_head",)))


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ({"bits": 6}, r"bits is 6 \(one of: 4, 8\)"),
        ({"also_bits": 3}, r"also_bits is 3 \(one of: 4, 8\)"),
        ({"also": ("token2wav",)}, r"also names 'token2wav' \(any of: talker, encoders, lm_head\)"),
        ({"also": ("talker", "talker")}, "one of them twice"),
        ({"also_bits": 4}, "also_bits is 4, but also names nothing"),
        ({"calibrate": "clips"}, "calibrate is 'clips', a word instead of several"),
        ({"samples": 4.5}, "samples is 4.5, but must be a whole number"),
    ],
)
def test_bad_choices_are_refused_in_a_sentence(chosen: dict[str, Any], complaint: str):
    with pytest.raises(OptionError, match=complaint):
        QuantizeOptions(**chosen)
