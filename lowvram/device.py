"""Where to compute and in which precision: names from the command line to a device that is really there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .errors import BackendError, OptionError
from .offload.budget import MIB, format_bytes

CONTEXT_BYTES = 350 * MIB
"""A CUDA context with its loaded kernels, on an Ampere card: already taken when free memory is asked for, and part of
a plan's reserve."""

HEADROOM_BYTES = 256 * MIB
CPU_HEADROOM_BYTES = 1024 * MIB

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """An opened device, what it is called, and the memory on it that is free for this process now (bytes).

    On a GPU that includes the context which opening has just made: plans count it as ours.
    """

    torch: torch.device
    title: str
    free_bytes: int

    @property
    def headroom_bytes(self) -> int:
        """What to leave to others of what is free, unless a budget is named: a desktop takes more while one works. On
        a CPU, where the device is the host, also what Python and its libraries hold."""
        return CPU_HEADROOM_BYTES if self.torch.type == "cpu" else HEADROOM_BYTES


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


class MemoryCap:
    """Makes tensors beyond a budget an out-of-memory error on CUDA, although the card may have room left.

    On Windows the driver does not raise when a card is full, it moves memory to the host and everything crawls; the cap
    makes that an error that a plan can act upon. `held_bytes` is what this runtime has in tensors when the cap is made;
    other tensors of the host application come on top of the budget. Elsewhere nothing happens.
    """

    def __init__(self, device: torch.device, held_bytes: int) -> None:
        self._device = device
        if device.type == "cuda":
            self._others_bytes = max(0, torch.cuda.memory_reserved(device) - held_bytes)
            self._total_bytes = torch.cuda.get_device_properties(device).total_memory

    @contextmanager
    def at(self, budget_bytes: int) -> Iterator[None]:
        """The cap holds inside; a stricter one that the application has set stays."""
        if self._device.type != "cuda":
            yield
            return
        before = torch.cuda.get_per_process_memory_fraction(self._device)
        ours = (self._others_bytes + max(0, budget_bytes - CONTEXT_BYTES)) / self._total_bytes
        torch.cuda.set_per_process_memory_fraction(min(before, ours), self._device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self._device)


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

    threads = torch.get_num_threads()
    title = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return Device(torch.device("cpu"), title, psutil.virtual_memory().available)


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
