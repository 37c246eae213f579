from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from lowvram.checkpoint import Checkpoint, TensorEntry, TensorReader, open_checkpoint
from lowvram.demo import TINY, build_demo
from lowvram.errors import CheckpointError
from lowvram.model import CODEC_EMBED, DIT_PREFIX, EMBED_TOKENS, LM_HEAD, OmniModel, build_model
from lowvram.offload.footprint import read_footprint
from lowvram.quant.linear import AWQLinear
from lowvram.quant.matmul import choose_backend

CPU = torch.device("cpu")
A_NORM = "thinker.model.layers.0.input_layernorm.weight"


@pytest.fixture
def checkpoint(demo: Path) -> Checkpoint:
    return open_checkpoint(demo)


def build(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> OmniModel:
    with TensorReader() as reader:
        backend = choose_backend(CPU, dtype, "reference")
        return build_model(checkpoint, reader, device=CPU, dtype=dtype, backend=backend)


def with_tensors(checkpoint: Checkpoint, changes: Mapping[str, TensorEntry | None]) -> Checkpoint:
    """The checkpoint with some headers replaced, added, or (None) left out."""
    tensors = {**checkpoint.tensors, **changes}
    return replace(checkpoint, tensors=MappingProxyType({n: e for n, e in tensors.items() if e is not None}))


def test_building_reads_no_weight(checkpoint: Checkpoint):
    model = build(checkpoint)
    assert all(p.is_meta for blocks in model.components.values() for b in blocks for p in b.module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks_weigh_what_the_planner_says(checkpoint: Checkpoint, dtype: torch.dtype):
    checkpoint = with_tensors(checkpoint, {n: None for n in checkpoint.tensors if n.endswith("inv_freq")})
    model = build(checkpoint, dtype)
    planned = read_footprint(checkpoint.tensors, checkpoint.config, width_bytes=dtype.itemsize).components
    built = {name: {b.name: b.n_bytes for b in blocks} for name, blocks in model.components.items()}
    sizes = {name: {b.name: b.n_bytes for b in blocks} for name, blocks in planned.items()}
    if dtype is torch.float32:  # the planner counts AWQ's scales at the compute width; they stay float16
        assert all(built[c][b] <= sizes[c][b] for c in sizes for b in sizes[c])
        del built["thinker"], sizes["thinker"]
    assert built == sizes


def test_building_leaves_modules_of_other_threads_alone(checkpoint: Checkpoint):
    """An application may be building its own model meanwhile."""
    builder = threading.Thread(target=build, args=(checkpoint,))
    builder.start()
    built = []
    while builder.is_alive():
        built.append(torch.nn.Linear(2, 2).weight.device.type)
    assert set(built) <= {"cpu"}


def test_embedding_tables_are_in_no_block(checkpoint: Checkpoint):
    read = {n for blocks in build(checkpoint).components.values() for b in blocks for n in b.stored_names}
    assert not {EMBED_TOKENS, CODEC_EMBED} & read


def test_every_stored_linear_of_the_thinker_is_fitted(checkpoint: Checkpoint):
    model = build(checkpoint)
    stored = {name for name in checkpoint.tensors if name.endswith(".qweight")}
    fitted = [m for b in model.components["thinker"] for m in b.module.modules() if isinstance(m, AWQLinear)]
    assert len(fitted) == len(stored) == 7 * TINY.layers


def test_host_rows_are_the_stored_rows(checkpoint: Checkpoint):
    with TensorReader() as reader:
        table = torch.from_numpy(reader.rows(checkpoint.tensors[EMBED_TOKENS]).copy()).float()
    ids = torch.tensor([3, 0, 7])
    torch.testing.assert_close(build(checkpoint).embed_tokens(ids), table[ids])


def test_a_missing_tensor_is_named(checkpoint: Checkpoint):
    with pytest.raises(CheckpointError, match=f"tensor {A_NORM} is missing from") as caught:
        build(with_tensors(checkpoint, {A_NORM: None}))
    assert (caught.value.path, caught.value.tensor) == (str(checkpoint.folder), A_NORM)


def test_a_missing_embedding_is_named(checkpoint: Checkpoint):
    with pytest.raises(CheckpointError, match=f"tensor {EMBED_TOKENS} is missing"):
        build(with_tensors(checkpoint, {EMBED_TOKENS: None}))


def test_a_config_of_wrong_types_is_one_sentence_about_its_file(checkpoint: Checkpoint):
    config = json.loads(json.dumps(checkpoint.config))
    config["thinker_config"]["text_config"]["num_hidden_layers"] = "two"
    with pytest.raises(CheckpointError, match=r"config\.json of .* makes no sense: .*num_hidden_layers") as caught:
        build(replace(checkpoint, config=config))
    assert "\n" not in str(caught.value)
    assert caught.value.path == str(checkpoint.folder / "config.json")


def test_a_surplus_tensor_is_named(checkpoint: Checkpoint):
    surplus = replace(checkpoint.tensors[A_NORM], name="thinker.model.layers.99.mlp.weight")
    with pytest.raises(CheckpointError, match=r"layers\.99\.mlp\.weight in .* belongs to no part"):
        build(with_tensors(checkpoint, {surplus.name: surplus}))


def test_tables_that_older_checkpoints_store_are_no_surplus(checkpoint: Checkpoint):
    name = "thinker.model.rotary_emb.inv_freq"
    build(with_tensors(checkpoint, {name: replace(checkpoint.tensors[A_NORM], name=name)}))


def test_a_wrong_shape_is_named_with_both_shapes(checkpoint: Checkpoint):
    wrong = replace(checkpoint.tensors[A_NORM], shape=(9, 9))
    with pytest.raises(CheckpointError, match=r"has shape \[9, 9\], but config\.json makes it"):
        build(with_tensors(checkpoint, {A_NORM: wrong}))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(A_NORM, "I32"), ("thinker.model.layers.0.mlp.up_proj.qweight", "F16"), (A_NORM, "F8_E4M3")],
)
def test_a_wrong_dtype_is_named(checkpoint: Checkpoint, name: str, dtype: str):
    wrong = replace(checkpoint.tensors[name], dtype=dtype)
    with pytest.raises(CheckpointError, match=f"is stored as {dtype}"):
        build(with_tensors(checkpoint, {name: wrong}))


def test_a_checkpoint_that_does_not_speak_has_no_talker(checkpoint: Checkpoint):
    mute = with_tensors(checkpoint, {n: None for n in checkpoint.tensors if n.startswith(("talker.", "token2wav."))})
    model = build(replace(mute, config={**checkpoint.config, "enable_audio_output": False}))
    assert model.speech is None
    assert set(model.components) == {"audio_tower", "visual", "thinker", "lm_head"}


def test_speech_switched_off_leaves_its_weights_alone(checkpoint: Checkpoint):
    model = build(replace(checkpoint, config={**checkpoint.config, "enable_audio_output": False}))
    assert model.speech is None


def test_a_tied_head_reads_the_embedding(checkpoint: Checkpoint):
    thinker = dict(checkpoint.config["thinker_config"])
    thinker["text_config"] = {**thinker["text_config"], "tie_word_embeddings": True}
    tied = replace(checkpoint, config={**checkpoint.config, "thinker_config": thinker})
    (head,) = build(with_tensors(tied, {LM_HEAD: None})).components["lm_head"]
    assert head.stored_names == {EMBED_TOKENS}


def test_sixteen_bit_checkpoints_keep_plain_linears(tmp_path: Path):
    build_demo(tmp_path, quantized=False, size=TINY)
    model = build(open_checkpoint(tmp_path))
    assert not [m for b in model.components["thinker"] for m in b.module.modules() if isinstance(m, AWQLinear)]
    assert model.kernel == "torch"


def test_the_dit_is_handed_out_in_layers_and_what_conditions_it_apart(checkpoint: Checkpoint):
    components = build(checkpoint).components
    *layers, rest = components["dit"]
    assert [block.name for block in layers] == [f"dit.{i}" for i in range(TINY.dit_layers)]
    (conditioning,) = components["dit_conditioning"]
    assert conditioning.module is rest.module
    read = [name for block in (*layers, rest, conditioning) for name in block.stored_names]
    stored = [name for name in checkpoint.tensors if name.startswith(DIT_PREFIX) and not name.endswith("inv_freq")]
    assert sorted(read) == sorted(stored)
    modulating = [name for name in stored if ".attn_norm." in name]
    assert len(modulating) == 2 * TINY.dit_layers and conditioning.stored_names.issuperset(modulating)


def test_only_the_dits_layers_change_their_precision(checkpoint: Checkpoint):
    model = build(checkpoint)
    before = {block.name: block.n_bytes for blocks in model.components.values() for block in blocks}
    model.speak_in(torch.bfloat16)
    after = {block.name: block.n_bytes for blocks in model.components.values() for block in blocks}
    planned = read_footprint(checkpoint.tensors, checkpoint.config, width_bytes=4).speaking_in("bfloat16")
    layers = {block.name: block.n_bytes for block in planned.components["dit"][:-1]}
    assert {name for name in after if after[name] != before[name]} == layers.keys()
    assert {name: after[name] for name in layers} == layers
    model.speak_in(torch.float32)
    assert {block.name: block.n_bytes for blocks in model.components.values() for block in blocks} == before


def test_a_missing_modulation_is_named(checkpoint: Checkpoint):
    name = "token2wav.code2wav_dit_model.transformer_blocks.1.attn_norm.linear.bias"
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        build(with_tensors(checkpoint, {name: None}))
