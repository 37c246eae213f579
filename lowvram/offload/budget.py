"""Sizes as people write them, to bytes and back, and the budget that a caller names.

"8GiB" is 8 x 2^30 bytes and "8GB" is 8 x 10^9, as their standards have it; a bare "8G" is read as GiB, because that
is what a graphics card of "8G" holds. A bare number is bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ..errors import OptionError

KIB, MIB, GIB = 2**10, 2**20, 2**30

_UNIT_BYTES = {
    "": 1,
    "b": 1,
    **{unit: KIB for unit in ("k", "kib")},
    **{unit: MIB for unit in ("m", "mib")},
    **{unit: GIB for unit in ("g", "gib")},
    **{"kb": 10**3, "mb": 10**6, "gb": 10**9},
}
_SIZE = re.compile(r"\s*(?P<number>\d{1,30}(?:\.\d{1,30})?)\s*(?P<unit>[a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(size: str | int) -> int:
    """Bytes of "8GiB", "8G", "8GB", "8192MiB", "8589934592" or 8589934592; fractions of a byte are dropped.

    Raises OptionError for anything else, zero included, and for a number below 1 MiB written without a unit.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        n_bytes = size
    else:
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        unit_bytes = _UNIT_BYTES.get(match["unit"].lower()) if match else None
        if match is None or unit_bytes is None:
            raise OptionError(f"{size!r} is not a size", hint="write 8GiB, 8GB, 8192MiB or a number of bytes")
        n_bytes = int(Fraction(match["number"]) * unit_bytes)
        if not match["unit"] and 0 < n_bytes < MIB:
            unit = "GiB" if n_bytes < KIB else "MiB"
            raise OptionError(f"{size!r} without a unit is {n_bytes} bytes", hint=f"did you mean {n_bytes}{unit}?")
    if n_bytes < 1:
        raise OptionError(f"{size!r} is {n_bytes} bytes, but a budget is at least 1 byte", hint="for example 8GiB")
    return n_bytes


def format_bytes(n_bytes: int) -> str:
    """A size for people, in binary units: "7.25 GiB", "132.5 MiB", "17 B"."""
    for unit, unit_bytes, digits in (("GiB", GIB, 2), ("MiB", MIB, 1), ("KiB", KIB, 1)):
        if n_bytes >= unit_bytes:
            return f"{n_bytes / unit_bytes:.{digits}f} {unit}"
    return f"{n_bytes} B"


@dataclass(frozen=True)
class Budget:
    """How much memory a run may hold: `vram_bytes` on the device; None is no limit.

    `ram_bytes` bounds what the process holds on the host: itself, the prompt's rows, voices it knows, and copies of
    weights that travel often. Without it weights wait in their files.
    """

    vram_bytes: int | None = None
    ram_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, n_bytes in (("vram", self.vram_bytes), ("ram", self.ram_bytes)):
            if n_bytes is not None and n_bytes < 1:
                raise OptionError(f"the {name} budget is {n_bytes} bytes, but must be at least 1 byte")

    @classmethod
    def of(cls, vram: str | int | None = None, ram: str | int | None = None) -> Budget:
        """A budget from sizes as people write them (see `parse_bytes`); "auto", like None, names no limit."""
        return cls(*(None if size in (None, "auto") else parse_bytes(size) for size in (vram, ram)))
