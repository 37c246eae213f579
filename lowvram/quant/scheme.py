"""How a checkpoint says it is quantized: `quantization_config` -> the kinds of its linears, or a named refusal.

Reads the configs of AWQ (transformers' keys and AutoAWQ's own), GPTQ and compressed-tensors. Which linears are
quantized they do not say: the published list of modules left alone names none that a current module tree has, so the
stored tensors decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UnsupportedQuantError

READABLE = (
    "this build reads 4 bits with one scale per group of inputs: AWQ (gemm), such as Qwen/Qwen2.5-Omni-7B-AWQ, GPTQ"
    " without desc_act, and compressed-tensors (pack-quantized), which may have 8 symmetric bits, too"
)

Packing = Literal["awq", "gptq", "gptq_v2", "pack-quantized", "pack-quantized, asymmetric"]
"""How a file packs a linear's numbers; see `formats`."""

ORDERS_THAT_LEAVE_GROUPS = (None, False, "weight", "static")
"""compressed-tensors' activation orders that matter while quantizing only: inputs lie in groups as they come."""


@dataclass(frozen=True)
class AWQScheme:
    """Weights of 4 bits with one scale and zero point per `group_size` inputs: what AWQ's tensors hold, in whichever
    `packing` they are stored."""

    group_size: int
    packing: Packing = "awq"


@dataclass(frozen=True)
class Int8Scheme:
    """Weights of 8 bits with one scale per `group_size` inputs, as compressed-tensors stores them."""

    group_size: int


Scheme = tuple[AWQScheme | Int8Scheme, ...]
"""The kinds of quantized linears that a checkpoint may store, at most one of each width."""


def read_scheme(quantization_config: Mapping[str, Any] | None) -> Scheme:
    """The scheme of a checkpoint; empty when it is not quantized.

    Absent keys mean what transformers takes them to mean: 4 bits, groups of 128, zero points, gemm, no desc_act.
    Raises UnsupportedQuantError for any other method, version, width or group, naming what it found.
    """
    if not quantization_config:
        return ()
    config = _object("quantization_config", quantization_config)
    match _method(config):
        case "awq":
            return (_read_awq(config),)
        case "gptq":
            return (_read_gptq(config),)
        case "compressed-tensors":
            return _read_compressed(config)
        case method:
            raise _refusal(f"by {method}" + (f" ({config['bits']} bits)" if "bits" in config else ""))


def _read_awq(config: Mapping[str, Any]) -> AWQScheme:
    version = str(_either(config, "version", "format", "gemm")).lower()
    zero_point = config.get("zero_point", True)
    if version != "gemm":
        raise _refusal(f"by AWQ in version {version!r}, which packs weights in another order")
    if config.get("backend") == "llm-awq":
        raise _refusal("by AWQ for backend 'llm-awq', which packs weights in another order")
    if zero_point is not True:
        raise _refusal(f"by AWQ with zero_point {zero_point!r}")
    bits, group_size = _either(config, "bits", "w_bit", 4), _either(config, "group_size", "q_group_size", 128)
    return AWQScheme(_group_size("AWQ", bits, group_size))


def _read_gptq(config: Mapping[str, Any]) -> AWQScheme:
    version = str(_either(config, "checkpoint_format", "format", "gptq")).lower()
    word = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
    if config.get("desc_act"):
        raise _refusal("by GPTQ with desc_act, which gives inputs to groups out of order")
    if word != "int32":
        raise _refusal(f"by GPTQ with pack_dtype {word!r}")
    for pattern in _object("dynamic", config.get("dynamic")):
        if not str(pattern).startswith("-:"):  # those are left in 16 bit, which the stored tensors say, too
            raise _refusal(f"by GPTQ with settings of their own for {pattern!r}")
    group_size = _group_size("GPTQ", config.get("bits", 4), config.get("group_size", 128))
    match version:
        case "gptq" | "gptq_v2":
            return AWQScheme(group_size, version)
        case _:
            raise _refusal(f"by GPTQ in format {version!r}, which packs weights in another order")


def _read_compressed(config: Mapping[str, Any]) -> Scheme:
    """One group of linears, or one of each width: which linear is of which, its stored tensors tell."""
    groups = _object("config_groups", config.get("config_groups"))
    scheme = tuple(_read_group(config, _object(name, group)) for name, group in groups.items())
    if len({type(kind) for kind in scheme}) < max(1, len(scheme)):
        raise _refusal(f"by compressed-tensors in {len(scheme)} groups of linears instead of one of each width")
    return scheme


def _read_group(config: Mapping[str, Any], group: Mapping[str, Any]) -> AWQScheme | Int8Scheme:
    weights = _object("weights", group.get("weights"))
    packing = group.get("format") or config.get("format")
    beside = {**config, **group}
    if packing != "pack-quantized":
        raise _refusal(f"by compressed-tensors in format {packing!r}")
    for key in ("input_activations", "output_activations", "kv_cache_scheme", "transform_config"):
        if beside.get(key):
            raise _refusal(f"by compressed-tensors with {key}")
    kind, strategy = weights.get("type") or "int", weights.get("strategy") or "group"
    if (kind, strategy) != ("int", "group"):
        raise _refusal(f"by compressed-tensors with {kind} weights by {strategy}")
    if weights.get("actorder") not in ORDERS_THAT_LEAVE_GROUPS:
        raise _refusal(f"by compressed-tensors with actorder {weights['actorder']!r}, which reorders inputs")
    return _read_weights(weights)


def _read_weights(weights: Mapping[str, Any]) -> AWQScheme | Int8Scheme:
    symmetric, bits = weights.get("symmetric", True), weights.get("num_bits")
    if bits == 8 and not symmetric:
        raise _refusal("by compressed-tensors in 8 bits with zero points")
    group_size = _group_size("compressed-tensors", bits, weights.get("group_size"), widths=(4, 8))
    if bits == 8:
        return Int8Scheme(group_size)
    return AWQScheme(group_size, "pack-quantized" if symmetric else "pack-quantized, asymmetric")


def _method(config: Mapping[str, Any]) -> str:
    """The method's name; AutoAWQ's own file does not give one, but only it spells the width `w_bit`."""
    implied = "awq" if "w_bit" in config else "a method that its config does not name"
    return str(config.get("quant_method") or implied).lower()


def _group_size(method: str, bits: object, group_size: object, widths: tuple[int, ...] = (4,)) -> int:
    """`group_size`, once the numbers of a scheme are known to be readable."""
    if type(bits) is not int or bits not in widths:
        raise _refusal(f"by {method} with bits {bits!r}")
    if type(group_size) is not int or group_size < 1:
        raise _refusal(f"by {method} with group_size {group_size!r}, which is not a positive number of inputs")
    return group_size


def _object(key: str, value: object) -> Mapping[str, Any]:
    """The JSON object that stands under `key`; one that is absent is empty."""
    found = value or {}
    if not isinstance(found, Mapping):
        raise _refusal(f"with {key} {value!r}, which is not an object")
    return found


def _either(config: Mapping[str, Any], key: str, old_key: str, default: object) -> Any:
    return config.get(key, config.get(old_key, default))


def _refusal(how: str) -> UnsupportedQuantError:
    return UnsupportedQuantError(f"the checkpoint is quantized {how}", hint=READABLE)
