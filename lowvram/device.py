"""Where to compute and in which precision: names from the command line to a device that is really there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import BackendError, OptionError
from .offload.budget import MIB, format_bytes

CONTEXT_BYTES = 350 * MIB
"""A CUDA context with its loaded kernels, on an Ampere card: already taken when free memory is asked for, and part of
a plan's reserve."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """An opened device, what it is called, and the memory on it that is free for this process now (bytes).

    On a GPU that includes the context which opening has just made: plans count it as ours.
    """

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
    opened = torch.device("cuda", index)
    try:
        torch.zeros(1, device=opened).add_(1).item()  # a card too old or too new for this torch is listed, but cannot
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"device cuda:{index} is there but does not compute: {reason}",
            backend="cuda",
            reason=reason,
            hint="install the build of torch for this card and driver, or --device cpu",
        ) from error
    title = f"{torch.cuda.get_device_name(index)}, {format_bytes(total_bytes)}"
    return Device(opened, title, min(free_bytes + CONTEXT_BYTES, total_bytes))
