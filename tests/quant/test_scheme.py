from __future__ import annotations

from typing import Any

import pytest

from lowvram.errors import UnsupportedQuantError
from lowvram.quant.scheme import AWQScheme, read_scheme

PUBLISHED = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": ["visual"],
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}


@pytest.mark.parametrize("config", [None, {}])
def test_no_quantization_config_means_not_quantized(config: dict[str, Any] | None):
    assert read_scheme(config) is None


def test_the_published_config_is_read():
    assert read_scheme(PUBLISHED) == AWQScheme(group_size=128, bits=4, zero_point=True, version="gemm")


def test_autoawq_s_own_file_is_read():
    assert read_scheme({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}) == AWQScheme(64)


def test_the_newer_key_for_the_version_is_read():
    assert read_scheme({"quant_method": "awq", "format": "gemm", "backend": "auto"}) == AWQScheme(128)


def test_absent_keys_mean_the_modelling_library_s_defaults():
    assert read_scheme({"quant_method": "awq"}) == AWQScheme(128)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4, "desc_act": False}, r"by gptq \(4 bits\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "by bitsandbytes"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "by fp8"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "by compressed-tensors"),
        ({"load_in_8bit": True}, "by a method that its config does not name"),
        (PUBLISHED | {"version": "gemv"}, "version 'gemv'"),
        (PUBLISHED | {"version": "GEMV_fast"}, "version 'gemv_fast'"),
        (PUBLISHED | {"backend": "llm-awq"}, "backend 'llm-awq'"),
        (PUBLISHED | {"bits": 8}, "bits 8"),
        (PUBLISHED | {"bits": "4"}, "bits '4'"),
        (PUBLISHED | {"group_size": -1}, "group_size -1"),
        (PUBLISHED | {"group_size": None}, "group_size None"),
        (PUBLISHED | {"zero_point": False}, "zero_point False"),
    ],
)
def test_anything_else_is_refused_by_its_name_with_what_is_readable(config: dict[str, Any], named: str):
    with pytest.raises(UnsupportedQuantError, match=named) as caught:
        read_scheme(config)
    assert "this build reads AWQ" in caught.value.hint
