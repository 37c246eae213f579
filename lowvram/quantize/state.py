"""A long run's state on disk: what it was asked, the rows that travel through the model, what is done so far.

Every file appears whole or not at all. A run that was stopped anywhere goes on from what is there, and what it then
writes depends on nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..checkpoint_writer import write_json
from ..errors import OptionError
from ..offload.budget import format_bytes
from .rows import RowFile

log = logging.getLogger(__name__)

UNFINISHED = "unfinished"
"""The folder of a run's state, inside the one that it writes to."""

OVER = "finished"
"""What that folder is called while it is deleted."""

RECORD = "run.json"
LOCK = "lock"


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

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While entered, no other process is. Raises OptionError where one is: two would write into the same files. A
        process that dies leaves nothing behind that keeps others out; a disk that knows no locks keeps nobody out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK, blocking=False, thread_local=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise OptionError(
                f"{self.folder.parent} is being written by another process", hint="wait for it, or name another folder"
            ) from error
        except (OSError, NotImplementedError) as error:  # as on some network shares
            log.warning("%s cannot be locked (%s): no other process may write there", self.folder.parent, error)
        try:
            yield
        finally:
            lock.release()

    def open_run(self, record: Mapping[str, Any], *, begun: bool) -> None:
        """Begin a run, or go on with the one that is here; `record` says what is asked. Until a run has `begun` on what
        depends on that, it may as well be another one. Raises OptionError when the one that is here was asked for
        something else, naming what, or is of another recipe: only its own version knows how far it has come."""
        path = self.folder / RECORD
        asked = json.loads(path.read_text(encoding="utf-8")) if path.exists() else record
        if asked.get("recipe") != record.get("recipe"):
            raise OptionError(
                f"{self.folder.parent} holds an unfinished run of another version of lowvram, with recipe"
                f" {asked.get('recipe')} instead of {record.get('recipe')}",
                hint="name another folder, or delete this one",
            )
        if not (begun and path.exists()):
            write_json(path, record)
            return
        for key, value in record.items():
            if asked.get(key) != json.loads(json.dumps(value)):
                raise OptionError(
                    f"{self.folder.parent} holds an unfinished run with {key} {asked.get(key)!r}, not {value!r}",
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
        """The run is over. Its folder is renamed first: half deleted, it would look like one to go on with."""
        over = self.folder.with_name(OVER)
        os.replace(self.folder, over)
        shutil.rmtree(over, ignore_errors=True)
