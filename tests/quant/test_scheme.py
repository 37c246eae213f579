from __future__ import annotations

from typing import Any

import pytest

from lowvram.errors import UnsupportedQuantError
from lowvram.quant.scheme import AWQScheme, Int8Scheme, Packing, read_scheme

PUBLISHED = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": ["visual"],
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}


GPTQ = {
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "actorder": None}
W4, W8 = {"weights": WEIGHTS}, {"weights": WEIGHTS | {"num_bits": 8, "group_size": 64}}


def compressed(weights: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """What llm-compressor writes for W4A16, with some of the weights' settings and some of the rest changed."""
    group = {"targets": ["Linear"], "weights": WEIGHTS | (weights or {}), "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "transform_config": {},
        **changes,
    }


@pytest.mark.parametrize("config", [None, {}])
def test_no_quantization_config_means_not_quantized(config: dict[str, Any] | None):
    assert read_scheme(config) == ()


def test_the_published_config_is_read():
    assert read_scheme(PUBLISHED) == (AWQScheme(group_size=128, packing="awq"),)


def test_autoawq_s_own_file_is_read():
    assert read_scheme({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}) == (AWQScheme(64),)


def test_the_newer_key_for_the_version_is_read():
    assert read_scheme({"quant_method": "awq", "format": "gemm", "backend": "auto"}) == (AWQScheme(128),)


def test_absent_keys_mean_the_modelling_library_s_defaults():
    assert read_scheme({"quant_method": "awq"}) == (AWQScheme(128),)


@pytest.mark.parametrize(
    ("config", "packing"),
    [
        (GPTQ, "gptq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        (GPTQ | {"dynamic": {"-:.*visual.*": {}}, "pack_dtype": "int32"}, "gptq"),
        (compressed(), "pack-quantized"),
        (compressed({"actorder": "weight"}), "pack-quantized"),
        (compressed({"symmetric": False}), "pack-quantized, asymmetric"),
    ],
)
def test_other_packings_of_the_same_numbers_are_read(config: dict[str, Any], packing: Packing):
    assert read_scheme(config) == (AWQScheme(128, packing),)


def test_a_group_s_own_format_comes_before_the_checkpoint_s():
    config = compressed(format="mixed-precision")
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert read_scheme(config) == (AWQScheme(128, "pack-quantized"),)


def test_eight_bits_are_read_alone_and_beside_four():
    assert read_scheme(compressed(config_groups={"a": W8})) == (Int8Scheme(64),)
    both = read_scheme(compressed(config_groups={"a": W4, "b": W8}))
    assert both == (AWQScheme(128, "pack-quantized"), Int8Scheme(64))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "autoround", "bits": 4}, r"by autoround \(4 bits\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "by bitsandbytes"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "by fp8"),
        (GPTQ | {"desc_act": True}, "by GPTQ with desc_act"),
        (GPTQ | {"bits": 8}, "by GPTQ with bits 8"),
        (GPTQ | {"group_size": -1}, "by GPTQ with group_size -1"),
        (GPTQ | {"checkpoint_format": "marlin"}, "by GPTQ in format 'marlin'"),
        (GPTQ | {"pack_dtype": "int16"}, "by GPTQ with pack_dtype 'int16'"),
        (GPTQ | {"dynamic": {"+:.*down_proj.*": {"bits": 8}}}, "settings of their own for '.:"),
        (compressed(format="nvfp4-pack-quantized"), "in format 'nvfp4-pack-quantized'"),
        (compressed(config_groups={}), "in 0 groups of linears"),
        (compressed(config_groups={"a": W4, "b": W4}), "in 2 groups of linears instead of one of each width"),
        (compressed(kv_cache_scheme={"num_bits": 8}), "with kv_cache_scheme"),
        (compressed(transform_config={"config_groups": {"u": {"type": "hadamard"}}}), "with transform_config"),
        (compressed({"num_bits": 6}), "by compressed-tensors with bits 6"),
        (compressed({"num_bits": 8, "symmetric": False}), "by compressed-tensors in 8 bits with zero points"),
        (compressed(config_groups={"a": W4, "b": {"weights": {}}}), "by compressed-tensors with bits None"),
        (compressed({"type": "float"}), "with float weights by group"),
        (compressed({"strategy": "channel", "group_size": None}), "with int weights by channel"),
        (compressed({"actorder": "group"}), "with actorder 'group'"),
        (compressed({"group_size": None}), "by compressed-tensors with group_size None"),
        ({"load_in_8bit": True}, "by a method that its config does not name"),
        (PUBLISHED | {"version": "gemv"}, "version 'gemv'"),
        (PUBLISHED | {"version": "GEMV_fast"}, "version 'gemv_fast'"),
        (PUBLISHED | {"backend": "llm-awq"}, "backend 'llm-awq'"),
        (PUBLISHED | {"bits": 8}, "bits 8"),
        (PUBLISHED | {"bits": "4"}, "bits '4'"),
        (PUBLISHED | {"group_size": -1}, "group_size -1"),
        (PUBLISHED | {"group_size": None}, "group_size None"),
        (PUBLISHED | {"zero_point": False}, "zero_point False"),
        (["awq"], r"with quantization_config \['awq'\], which is not an object"),
        (GPTQ | {"dynamic": 5}, "with dynamic 5, which is not an object"),
        (compressed(config_groups=[W4]), r"with config_groups \[{"),
        (compressed(config_groups={"a": "W4A16"}), "with a 'W4A16', which is not an object"),
        (compressed(config_groups={"a": {"weights": "int4"}}), "with weights 'int4', which is not an object"),
    ],
)
def test_anything_else_is_refused_by_its_name_with_what_is_readable(config: dict[str, Any], named: str):
    with pytest.raises(UnsupportedQuantError, match=named) as caught:
        read_scheme(config)
    assert "this build reads 4 bits" in caught.value.hint
