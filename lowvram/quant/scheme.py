"""How a checkpoint says it is quantized: `quantization_config` -> an AWQ scheme, nothing, or a named refusal.

Reads the keys of transformers' config.json (`quant_method`, `bits`, `group_size`) and of AutoAWQ's quant_config.json
(`w_bit`, `q_group_size`). Which linears are quantized it does not say: the published list of modules left alone names
none that a current module tree has, so the stored tensors decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedQuantError

READABLE = "this build reads AWQ in version gemm with 4 bits and zero points, such as Qwen/Qwen2.5-Omni-7B-AWQ"


@dataclass(frozen=True)
class AWQScheme:
    """Weights of `bits` bits with one scale and zero point per `group_size` inputs, packed as `version` does."""

    group_size: int
    bits: int = 4
    zero_point: bool = True
    version: str = "gemm"


def read_scheme(quantization_config: Mapping[str, Any] | None) -> AWQScheme | None:
    """The scheme of a checkpoint; None when it is not quantized.

    Absent keys mean what transformers' AwqConfig takes them to mean: 4 bits, groups of 128, zero points, gemm. Raises
    UnsupportedQuantError for any other method, version, width or group, naming what it found.
    """
    if not quantization_config:
        return None
    config = quantization_config
    method = _method(config)
    bits = _either(config, "bits", "w_bit", 4)
    group_size = _either(config, "group_size", "q_group_size", 128)
    version = str(_either(config, "version", "format", "gemm")).lower()
    backend = config.get("backend")
    zero_point = config.get("zero_point", True)
    if method != "awq":
        _refuse(f"by {method}" + (f" ({bits} bits)" if {"bits", "w_bit"} & set(config) else ""))
    if version != "gemm":
        _refuse(f"by AWQ in version {version!r}, which packs weights in another order")
    if backend == "llm-awq":
        _refuse("by AWQ for backend 'llm-awq', which packs weights in another order")
    if type(bits) is not int or bits != 4:
        _refuse(f"by AWQ with bits {bits!r}")
    if type(group_size) is not int or group_size < 1:
        _refuse(f"by AWQ with group_size {group_size!r}, which is not a positive number of inputs")
    if zero_point is not True:
        _refuse(f"by AWQ with zero_point {zero_point!r}")
    return AWQScheme(group_size=group_size)


def _method(config: Mapping[str, Any]) -> str:
    """The method's name; AutoAWQ's own file does not give one, but only it spells the width `w_bit`."""
    implied = "awq" if "w_bit" in config else "a method that its config does not name"
    return str(config.get("quant_method") or implied).lower()


def _either(config: Mapping[str, Any], key: str, old_key: str, default: object) -> Any:
    return config.get(key, config.get(old_key, default))


def _refuse(how: str) -> None:
    raise UnsupportedQuantError(f"the checkpoint is quantized {how}", hint=READABLE)
