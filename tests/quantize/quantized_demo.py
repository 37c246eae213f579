"""How the tests quantize, and what they keep of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowvram.quantize import QuantizeOptions, QuantizeReport

OPTIONS = QuantizeOptions(group_size=32, samples=4, sample_tokens=32)


@dataclass(frozen=True)
class Finished:
    """A finished run's folder and report."""

    folder: Path
    report: QuantizeReport

    @property
    def files(self) -> dict[str, bytes]:
        return files_in(self.folder)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
