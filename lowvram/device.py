"""Where to compute and in which precision: names from the command line to a device that is really there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import torch

from .errors import BackendError, OptionError
from .offload.budget import MIB, format_bytes
from .offload.plan import CONTEXT_BYTES, WORKSPACE_BYTES

HEADROOM_BYTES = 256 * MIB
CPU_HEADROOM_BYTES = 1024 * MIB

BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability of Ampere. On cards before it torch has no memory-bounded attention in bfloat16."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """An opened device, what it is called, and the memory on it that is free for this process now (bytes).

    On a GPU that includes the context which opening has just made: plans count it as ours. Where the application has
    set a memory fraction, what that leaves is free, and no more.
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
    except (RuntimeError, TypeError):
        raise OptionError(f"device {name!r} is unknown", hint="auto, cpu, cuda or cuda:0") from None
    if device.type == "cpu":
        return _cpu()
    if device.type != "cuda":
        raise OptionError(f"device {name!r} is not supported", hint="auto, cpu, cuda or cuda:0")
    return _cuda(device)


def free_bytes(device: torch.device) -> int | None:
    """What a plan may count on beside what this process has in tensors by now: what is free, as `Device` has it. None
    where memory is not the device's own. Who asks gives back first what torch's allocator keeps for later."""
    return _free_and_total_bytes(device)[0] if device.type == "cuda" else None


class MemoryCap:
    """Makes tensors beyond a budget an out-of-memory error on CUDA, although the card may have room left.

    On Windows the driver does not raise when a card is full, it moves memory to the host and everything crawls; the cap
    makes that an error that a plan can act upon. `held_bytes` is what this runtime has in tensors when the cap is made;
    other tensors of the host application come on top of the budget. Elsewhere nothing happens.
    """

    def __init__(self, device: torch.device, held_bytes: int) -> None:
        self._device = device
        self._others_bytes = _others_bytes(device, held_bytes) if device.type == "cuda" else 0

    @contextmanager
    def at(self, budget_bytes: int) -> Iterator[None]:
        """The cap holds inside; a stricter one that the application has set stays."""
        if self._device.type != "cuda":
            yield
            return
        share = _Share(self._others_bytes, max(0, budget_bytes - CONTEXT_BYTES))
        fraction = _fraction_of(self._device)
        fraction.lend(share)
        try:
            yield
        finally:
            fraction.take_back(share)


@dataclass(frozen=True)
class _Share:
    """What one cap allows its runtime, beside what others hold."""

    others_bytes: int
    own_bytes: int


class _Fraction:
    """A card's memory fraction, of which torch keeps one for the whole process: runtimes that compute at once share it,
    and after the last of them it is what the application had set before the first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._total_bytes = torch.cuda.get_device_properties(device).total_memory
        self._lock = Lock()
        self._shares: list[_Share] = []
        self._before = 1.0

    @property
    def allowed_bytes(self) -> int:
        """What the application lets the whole process take, whatever is lent of it at the moment."""
        with self._lock:
            return int(self._total_bytes * (self._before if self._shares else self._now()))

    def lend(self, share: _Share) -> None:
        with self._lock:
            if not self._shares:
                self._before = self._now()
            self._shares.append(share)
            self._set()

    def take_back(self, share: _Share) -> None:
        with self._lock:
            self._shares.remove(share)
            self._set()

    def _now(self) -> float:
        return torch.cuda.get_per_process_memory_fraction(self._device)

    def _set(self) -> None:
        fraction = self._before
        if self._shares:
            # What one of them counts as others' may be another one's own: the largest count covers all.
            others_bytes = max(share.others_bytes for share in self._shares)
            own_bytes = sum(share.own_bytes for share in self._shares)
            fraction = min(fraction, (others_bytes + own_bytes) / self._total_bytes)
        torch.cuda.set_per_process_memory_fraction(fraction, self._device)


def _fraction_of(device: torch.device) -> _Fraction:
    with _finding:  # two threads that both were the first would each get a fraction of their own
        return _only_fraction_of(device)


@cache
def _only_fraction_of(device: torch.device) -> _Fraction:
    return _Fraction(device)


_finding = Lock()


def _others_bytes(device: torch.device, held_bytes: int) -> int:
    """What others in this process have of a card, where we have `held_bytes`: their tensors, and the gaps between
    tensors, which torch could not give back. The rest of what is reserved is free for whoever asks next.

    What plans reserve for libraries to work in is ours. Where there is no more than that, the gaps are ours, too.
    """
    stats = torch.cuda.memory_stats(device)
    tensors_bytes = stats.get("active_bytes.all.current", 0) - held_bytes - WORKSPACE_BYTES
    return tensors_bytes + stats.get("inactive_split_bytes.all.current", 0) if tensors_bytes > 0 else 0


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Inside, convolutions and matrix products of float32 are computed in float32 on CUDA, too; nor does an
    application's autocast choose the precision of anything.

    By torch's default cuDNN rounds the factors of convolutions to TF32 (11 bits) on Ampere cards and later, which costs
    a vocoder as much as half precision would: 46 to 56 dB are left. Many an application lets cuBLAS do so, which would
    blur even the positions behind rotary angles, beyond 2048. The switches are the process's, and are as they were when
    all of those that are inside at once have left; meanwhile torch refuses to read the older form, `allow_tf32`, of one
    that was switched.
    """
    with _without_autocast(device):
        if device.type != "cuda":
            yield
            return
        with _convolutions.exact(), _matrix_products.exact():
            yield


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Inside, torch's default dtype is float32: the modelling library counts on that where it names none, in resampling
    filters and in lengths of masks.

    Where an application has chosen another one, that is in force again afterwards. It is the whole process's: only one
    thread at a time is inside, and should be so briefly.
    """
    with _defaulting:
        chosen = torch.get_default_dtype()
        if chosen is torch.float32:
            yield
            return
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(chosen)


_defaulting = Lock()


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()


ROUNDED, EXACT = "tf32", "ieee"
"""Torch's names for float32 with factors of 11 bits, and for float32 as it is written."""


class _Float32:
    """How CUDA computes one kind of products in float32, of which torch keeps one setting for the whole process."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._lock = Lock()
        self._inside = 0
        self._is_switched = False

    @contextmanager
    def exact(self) -> Iterator[None]:
        """As it is written, until the last of those inside has left."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            if not self._inside and self._kind.fp32_precision == ROUNDED:
                self._kind.fp32_precision, self._is_switched = EXACT, True
            self._inside += 1

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._is_switched:
                self._is_switched = False
                if self._kind.fp32_precision == EXACT:  # else another thread has set it meanwhile
                    self._kind.fp32_precision = ROUNDED


_backends: Any = torch.backends  # whose types do not say all that it has
_convolutions, _matrix_products = _Float32(_backends.cudnn.conv), _Float32(_backends.cuda.matmul)


def choose_dtype(name: str, device: torch.device, stored: str | None) -> torch.dtype:
    """The compute dtype: by name, or for `auto` the checkpoint's own where the device is good at it.

    float16 on a CPU is emulated and slow, so bfloat16 stands in there; bfloat16 needs an Ampere card (compute
    capability 8.0), becomes float16 on older ones and is refused by name: raises OptionError, as for unknown names.
    """
    if name != "auto":
        if name not in DTYPES:
            raise OptionError(f"dtype {name!r} is unknown", hint=f"auto, {', '.join(DTYPES)}")
        _require_bfloat16(device, DTYPES[name])
        return DTYPES[name]
    dtype = DTYPES.get(stored or "", torch.bfloat16)
    if device.type == "cpu" and dtype is torch.float16:
        return torch.bfloat16
    if dtype is torch.bfloat16 and _is_before_ampere(device):
        return torch.float16
    return dtype


def _require_bfloat16(device: torch.device, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and _is_before_ampere(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise OptionError(
            f"{device} has compute capability {major}.{minor}, but bfloat16 needs 8.0", hint="--dtype float16"
        )


def _is_before_ampere(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < BFLOAT16_CAPABILITY


def _cpu() -> Device:
    threads = torch.get_num_threads()
    title = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return Device(torch.device("cpu"), title, free_ram_bytes())


def free_ram_bytes() -> int:
    """What the system could give a process without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def _cuda(device: torch.device) -> Device:
    if not torch.cuda.is_available():
        reason = (
            "this build of torch has no CUDA" if torch.version.cuda is None else "no NVIDIA driver or card was found"
        )
        raise BackendError(
            f"device {device} is not available: {reason}", backend="cuda", reason=reason, hint="--device cpu"
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise BackendError(
            f"device {device} is not available: this machine has {count}", backend="cuda", hint="--device cuda:0"
        )
    try:
        opened = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        _compute(opened)
        free_now_bytes, total_bytes = _free_and_total_bytes(opened)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"device {device} is there but does not compute: {reason}",
            backend="cuda",
            reason=reason,
            hint="close what fills the card, install the build of torch for this card and driver, or --device cpu",
        ) from error
    title = f"{torch.cuda.get_device_name(opened)}, {format_bytes(total_bytes)}"
    return Device(opened, title, free_now_bytes)


def _free_and_total_bytes(device: torch.device) -> tuple[int, int]:
    """Of a CUDA card, its context among what is free."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    left_bytes = max(0, _fraction_of(device).allowed_bytes - torch.cuda.memory_reserved(device))
    return min(min(free_bytes, left_bytes) + CONTEXT_BYTES, total_bytes), total_bytes


def _compute(device: torch.device) -> None:
    """A product, read back: a card too old or too new for this build of torch is listed, but cannot. CUDA loads kernels
    when they are first used, and what cuBLAS takes with its first one should not look free."""
    ones = torch.ones(16, 16, dtype=torch.float16, device=device)
    (ones @ ones).sum().item()
