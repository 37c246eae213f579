"""What a caller asks for -> what a runtime may take: of the device, of the host, and of the host to remember in."""

from __future__ import annotations

from dataclasses import replace

from .device import Device, free_ram_bytes
from .errors import OptionError
from .offload.budget import Budget, format_bytes, parse_bytes


def part(asked: Budget, remember: str | int | None) -> tuple[Budget, int]:
    """The budget without what is remembered in, and that. Raises OptionError where nothing of the RAM would be left."""
    if remember is None:
        return asked, 0
    ram_bytes = asked.ram_bytes
    kept_bytes = _some_of(ram_bytes) if remember == "auto" else parse_bytes(remember)
    if ram_bytes is None:
        return asked, kept_bytes
    return replace(asked, ram_bytes=_left_of(ram_bytes, kept_bytes)), kept_bytes


def _some_of(ram_bytes: int | None) -> int:
    free_bytes = free_ram_bytes()
    return min(ram_bytes or free_bytes, free_bytes) // 4


def _left_of(ram_bytes: int, kept_bytes: int) -> int:
    if kept_bytes >= ram_bytes:
        raise OptionError(
            f"{format_bytes(kept_bytes)} to remember in leave nothing of {format_bytes(ram_bytes)} of RAM",
            hint="remember less",
        )
    return ram_bytes - kept_bytes


def grant(asked: Budget, device: Device, kept_bytes: int) -> Budget:
    """The budget asked for, but never more than is free: a plan must hold now, not on an empty machine. Where none is
    named, some of what is free is left to others. On a CPU what is remembered lies in the same memory."""
    free_bytes = _left_of(device.free_bytes, kept_bytes) if device.torch.type == "cpu" else device.free_bytes
    wanted_bytes = asked.vram_bytes or max(1, free_bytes - device.headroom_bytes)
    return Budget(min(wanted_bytes, free_bytes), asked.ram_bytes)
