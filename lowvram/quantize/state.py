"""A long run's state on disk: what it was asked, the rows that travel through the model, what is done so far.

Every file appears whole or not at all. A run that was stopped anywhere goes on from what is there, and what it then
writes depends on nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_writer import write_json
from ..errors import OptionError
from ..offload.budget import format_bytes
from .rows import RowFile

UNFINISHED = "unfinished"
"""The folder of a run's state, inside the one that it writes to."""

RECORD = "run.json"


def require_new_or_unfinished(target: Path) -> None:
    """Raise OptionError for a `target` that is neither new nor empty nor an unfinished run's."""
    if not target.exists() or (target / UNFINISHED).is_dir() or (target.is_dir() and not any(target.iterdir())):
        return
    raise OptionError(
        f"{target} exists and is neither empty nor an unfinished run of quantize", hint="name a new folder"
    )


def require_room(target: Path, needed_bytes: int, name: str) -> None:
    """Raise OptionError where the disk of `target` cannot take what quantizing `name` needs in all. What an unfinished
    run has written counts as free: it is part of that."""
    home = next(path for path in (target, *target.absolute().parents) if path.exists())
    there_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    free_bytes = shutil.disk_usage(home).free + there_bytes
    if needed_bytes > free_bytes:
        raise OptionError(
            f"quantizing {name} takes {format_bytes(needed_bytes)} of disk, but {home} has"
            f" {format_bytes(free_bytes)} free",
            hint="name a folder on a larger disk, or ask for fewer --samples",
        )


class Unfinished:
    """The state of the run that writes to `target`."""

    def __init__(self, target: Path) -> None:
        self.folder = target / UNFINISHED

    def open_run(self, record: Mapping[str, Any]) -> None:
        """Begin a run, or go on with the one that is here; `record` says what is asked. Raises OptionError when that
        one was asked for something else, naming what."""
        path = self.folder / RECORD
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
            return
        begun = json.loads(path.read_text(encoding="utf-8"))
        for key, value in record.items():
            if begun.get(key) != json.loads(json.dumps(value)):
                raise OptionError(
                    f"{self.folder.parent} holds an unfinished run with {key} {begun.get(key)!r}, not {value!r}",
                    hint="ask for the same to go on with it, or name another folder",
                )

    def read(self, name: str) -> Any:
        """What was kept as `name`; None if nothing was."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def keep(self, name: str, value: Any) -> None:
        """Keep a JSON value."""
        write_json(self.folder / f"{name}.json", value)

    def rows(self, name: str, width: int, dtype: torch.dtype) -> RowFile:
        """The rows kept as `name`, to be read."""
        return RowFile(self.folder / f"{name}.rows", "rb", width, dtype)

    @contextmanager
    def writing_rows(self, name: str, width: int, dtype: torch.dtype) -> Iterator[RowFile]:
        """Rows to be kept as `name` once all of them are written; what is written can be read back."""
        path = self.folder / f"{name}.rows"
        partial = path.with_name(f"{path.name}.partial")
        with RowFile(partial, "w+b", width, dtype) as rows:
            yield rows
            rows.sync()
        os.replace(partial, path)

    def forget_rows(self, name: str) -> None:
        """Delete the rows kept as `name`, if there are any."""
        (self.folder / f"{name}.rows").unlink(missing_ok=True)

    def discard(self) -> None:
        """The run is over."""
        shutil.rmtree(self.folder)
