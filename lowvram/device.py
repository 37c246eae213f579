"""Where to compute and in which precision: names from the command line to a device that is really there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import BackendError, OptionError
from .offload.budget import format_bytes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """An opened device, what it is called, and the memory on it that is free now (bytes)."""

    torch: torch.device
    title: str
    free_bytes: int


def open_device(name: str = "auto") -> Device:
    """Open `auto` (a CUDA device if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises BackendError when that device is not there and OptionError for a name that is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"device {name!r} is unknown", hint="auto, cpu, cuda or cuda:0") from None
    if device.type == "cpu":
        return _cpu()
    if device.type != "cuda":
        raise OptionError(f"device {name!r} is not supported", hint="auto, cpu, cuda or cuda:0")
    return _cuda(device)


def choose_dtype(name: str, device: torch.device, stored: str | None) -> torch.dtype:
    """The compute dtype: by name, or for `auto` the checkpoint's own where the device is good at it.

    float16 on a CPU is emulated and slow, so bfloat16 stands in there; bfloat16 needs an Ampere card (compute
    capability 8.0) and becomes float16 on older ones.
    """
    if name != "auto":
        if name not in DTYPES:
            raise OptionError(f"dtype {name!r} is unknown", hint=f"auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    dtype = DTYPES.get(stored or "", torch.bfloat16)
    if device.type == "cpu" and dtype is torch.float16:
        return torch.bfloat16
    if device.type == "cuda" and dtype is torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return dtype


def _cpu() -> Device:
    import psutil

    return Device(torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads", psutil.virtual_memory().available)


def _cuda(device: torch.device) -> Device:
    if not torch.cuda.is_available():
        reason = (
            "this build of torch has no CUDA" if torch.version.cuda is None else "no NVIDIA driver or card was found"
        )
        raise BackendError(
            f"device {device} is not available: {reason}", backend="cuda", reason=reason, hint="--device cpu"
        )
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise BackendError(
            f"device cuda:{index} is not available: this machine has {count}", backend="cuda", hint="--device cuda:0"
        )
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    title = f"{torch.cuda.get_device_name(index)}, {format_bytes(total_bytes)}"
    return Device(torch.device("cuda", index), title, free_bytes)
