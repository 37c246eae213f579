from __future__ import annotations

import pytest

from lowvram.checkpoint import TensorHeader
from lowvram.errors import UnsupportedQuantError
from lowvram.quant.storage import AWQStorage
from lowvram.quantize.layout import layer_prefix, plan_layout

UP, NORM = "mlp.up_proj.weight", "input_layernorm.weight"


def tensors(layers: int, outputs: int = 16) -> dict[str, TensorHeader]:
    of_layers = {
        layer_prefix(i) + path: header
        for i in range(layers)
        for path, header in ((UP, TensorHeader("BF16", (outputs, 64))), (NORM, TensorHeader("BF16", (64,))))
    }
    return {"first": TensorHeader("F32", (3,)), **of_layers, "last": TensorHeader("F16", (5, 2))}


def names(layers: int) -> list[set[str]]:
    return [{layer_prefix(i) + path for path in (UP, NORM)} for i in range(layers)]


def test_what_stays_comes_first_and_every_layer_is_a_file():
    layout = plan_layout(tensors(2), names(2), AWQStorage(32))
    assert [list(shard) for shard in layout.copied.values()] == [["first", "last"]]
    assert list(layout.shards) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(name.startswith("thinker.model.layers.1.") for name in layout.layers["model-00003-of-00003.safetensors"])


def test_a_linear_becomes_three_tensors_and_a_norm_stays():
    (layer,) = plan_layout(tensors(1), names(1), AWQStorage(32)).layers.values()
    prefix = layer_prefix(0)
    assert dict(layer) == {
        prefix + NORM: TensorHeader("BF16", (64,)),
        f"{prefix}mlp.up_proj.qweight": TensorHeader("I32", (64, 2)),
        f"{prefix}mlp.up_proj.qzeros": TensorHeader("I32", (2, 2)),
        f"{prefix}mlp.up_proj.scales": TensorHeader("F16", (2, 16)),
    }


def test_bytes_are_those_of_files_with_their_headers():
    layout = plan_layout(tensors(1), names(1), AWQStorage(32))
    assert layout.copied_bytes == 3 * 4 + 10 * 2
    assert layout.file_bytes > layout.copied_bytes + 64 * 2 + (64 + 2) * 2 * 4 + 2 * 16 * 2


def test_a_linear_that_cannot_be_stored_is_refused():
    with pytest.raises(UnsupportedQuantError, match="64 inputs and 12 outputs"):
        plan_layout(tensors(1, outputs=12), names(1), AWQStorage(32))
