"""A hub id or a folder -> a Qwen2.5-Omni checkpoint: its config, and where each published tensor lies.

Headers are read here rather than by safetensors because placement needs offsets and errors need names. No weight is
read until a `TensorReader` is asked for it, and none is ever mapped whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from . import hub
from .config_rules import check_config, check_ids
from .errors import CheckpointError, OptionError

if TYPE_CHECKING:
    import numpy as np

DEFAULT_MODEL = "Qwen/Qwen2.5-Omni-7B-AWQ"
DEMO = "demo"
"""The name of the built-in checkpoint."""

MODEL_TYPE = "qwen2_5_omni"
INDEX_FILE = "model.safetensors.index.json"
SPEAKERS_FILE = "spk_dict.pt"

MAX_HEADER_BYTES = 100_000_000
"""The bound safetensors itself sets, so that a foreign file's first 8 bytes cannot ask for all memory."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of safetensors' dtypes."""

NUMPY_DTYPE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""How numpy views a float table; it has no bfloat16, so those rows come as their 16 bits."""


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as a header describes it, wherever it lies: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """As stored."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `n_bytes` from `offset` (counted from the start of the file) of `path`, row-major.
    `file_bytes` is how long the file was when its header was read, and `written_ns` when it had last been written to,
    where that is known."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    file_bytes: int | None = None
    written_ns: int | None = None


def find_tensor(tensors: Mapping[str, TensorEntry], name: str) -> TensorEntry:
    """The entry called `name`. Raises CheckpointError with the folder where it is missing."""
    if name not in tensors:
        folder = next((str(entry.path.parent) for entry in tensors.values()), "")
        raise CheckpointError(
            f"tensor {name} is missing from {folder or 'the checkpoint'}",
            path=folder,
            tensor=name,
            hint="download it again or check its index",
        )
    return tensors[name]


@dataclass(frozen=True)
class Headers:
    """What a plan needs of a checkpoint, whether or not it is on this disk: its config.json and its tensors by name.

    `folder` is where all of it lies, None if it is not here; `origin` says in a few words how it is known.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader | TensorEntry]
    folder: Path | None
    origin: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `name` is what the user called it; `config` and `generation` are its JSON, untouched."""

    name: str
    folder: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    tensors: Mapping[str, TensorEntry]

    @property
    def quantization(self) -> dict[str, Any] | None:
        """See `quantization_of`."""
        return quantization_of(self.config)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.n_bytes for entry in self.tensors.values())

    @property
    def speakers_path(self) -> Path:
        """The voices, see `voices.load_speakers`. A checkpoint that does not speak has no such file."""
        return self.folder / SPEAKERS_FILE


def open_checkpoint(
    model: str | Path, *, revision: str | None = None, on_progress: hub.OnProgress | None = None
) -> Checkpoint:
    """Find `model` (a folder, or a hub id that is downloaded as far as needed) and read its config and headers.

    `revision` and `on_progress` concern hub ids. Raises CheckpointError for a model that cannot be found or fetched,
    is not a Qwen2.5-Omni, or whose files are missing, damaged or contradict one another.
    """
    folder = find_folder(model, revision, on_progress)
    config = read_config(folder / "config.json", model)
    return Checkpoint(
        name=str(model),
        folder=folder,
        config=config,
        generation=_read_generation(folder / "generation_config.json"),
        tensors=read_tensors(folder),
    )


def find_folder(
    model: str | Path, revision: str | None, on_progress: hub.OnProgress | None, *, weights: bool = True
) -> Path:
    """The folder of `model`: itself, or the shared cache's, with its weights downloaded or only what tells of them."""
    folder = local_folder(model)
    if folder is not None and revision is not None:
        raise OptionError(f"revision {revision} has no effect on the folder {model}", hint="leave it out")
    return folder or hub.download(str(model), revision, on_progress, weights=weights)


def read_config(path: Path, model: str | Path) -> dict[str, Any]:
    """The config.json of `model`. Raises CheckpointError when it cannot be read, is of another kind of model, or holds
    a value that cannot be."""
    config = _read_json(path)
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{model} is a model of type {config.get('model_type')!r}, not {MODEL_TYPE!r}",
            path=str(path),
            hint=f"this runtime answers with Qwen2.5-Omni, for instance {DEFAULT_MODEL}",
        )
    check_config(config, path)
    return config


def _read_generation(path: Path) -> dict[str, Any]:
    """generation_config.json, which a checkpoint need not have."""
    generation = _read_json(path) if path.exists() else {}
    check_ids(generation, path)
    return generation


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`quantization_config`, which tools write at the top or into the thinker's config; None for 16 bit."""
    thinker = config.get("thinker_config") or {}
    return config.get("quantization_config") or thinker.get("quantization_config")


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype a checkpoint was published in ("float16"), in either spelling of its key."""
    for place in (config, config.get("thinker_config", {})):
        name = place.get("dtype") or place.get("torch_dtype")
        if name:
            return str(name)
    return None


def local_folder(model: str | Path) -> Path | None:
    """The folder that `model` names, or None if it reads as a hub id (`name` or `owner/name`).

    Raises CheckpointError for a path to anything else, OptionError for what is no name at all.
    """
    if not isinstance(model, str | os.PathLike) or not str(model).strip():
        raise OptionError(f"model {model!r} is no name", hint=f"a folder, demo, or a hub id such as {DEFAULT_MODEL}")
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise CheckpointError(f"{model} is a file, not a model", path=str(path), hint="name the folder it lies in")
    looks_like_id = isinstance(model, str) and re.fullmatch(r"[^./~\\:][^/\\:]*(/[^/\\:]+)?", model)
    if not looks_like_id:
        raise CheckpointError(
            f"there is no folder {model}",
            path=str(path),
            hint=f"check the path, or name a hub id such as {DEFAULT_MODEL}",
        )
    return None


def read_tensors(folder: Path) -> Mapping[str, TensorEntry]:
    """All tensors of a folder's safetensors files by published name, in file order.

    With an index, the files that it lists are read and must hold what it says; without one, every safetensors file is.
    Raises CheckpointError for a missing file or tensor, a tensor stored twice, and anything `read_header` refuses.
    """
    listed = read_index(folder / INDEX_FILE)
    files = dict.fromkeys(listed.values()) if listed else [path.name for path in sorted(folder.glob("*.safetensors"))]
    if not files:
        raise CheckpointError(
            f"{folder} holds no *.safetensors file", path=str(folder), hint="weights in other formats are not read"
        )
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_header(folder / file):
            if entry.name in tensors:
                first = tensors[entry.name].path.name
                raise damaged(entry.path, f"holds tensor {entry.name}, which {first} holds too", entry.name)
            tensors[entry.name] = entry
    for name, file in listed.items():
        if name not in tensors or tensors[name].path.name != file:
            where = f"it lies in {tensors[name].path.name}" if name in tensors else "no file holds it"
            raise damaged(folder / file, f"lacks tensor {name}, which {INDEX_FILE} puts there: {where}", name)
    return MappingProxyType(tensors)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name; empty when there is no index. Raises CheckpointError for one that makes no sense."""
    if not path.exists():
        return {}
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise damaged(path, f"puts tensor {name} into {file!r}, which is not a file of this folder", name)
    return weight_map


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, in the order in which they lie there.

    The format: 8 bytes of header length (little-endian), that much JSON, then the tensors without gaps
    (https://github.com/huggingface/safetensors#format). Raises CheckpointError for a file that is missing, truncated,
    or anything else than that.
    """
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            file_bytes = stat.st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > MAX_HEADER_BYTES:
                raise damaged(path, f"does not begin with a safetensors header ({file_bytes:,} bytes in all)")
            text = file.read(header_bytes)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from error
    if len(text) < header_bytes:
        raise damaged(path, f"is truncated inside its header: {file_bytes:,} of {8 + header_bytes:,} bytes or more")
    header = _parse_json(text, path, pairs_hook=lambda pairs: _without_repeats(pairs, path))
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    entries = sorted((_entry(name, fields, path, data_start) for name, fields in header.items()), key=_position)
    _check_layout(entries, path, data_start, file_bytes)
    return [replace(entry, file_bytes=file_bytes, written_ns=stat.st_mtime_ns) for entry in entries]


def _position(entry: TensorEntry) -> tuple[int, int]:
    """Sorts an empty tensor before the one that begins where it lies."""
    return entry.offset, entry.n_bytes


def _without_repeats(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """A JSON object, refusing repeated keys, of which the parser would keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise damaged(path, f"names {twice} twice in its header", twice)
    return fields


def _entry(name: str, fields: Any, path: Path, data_start: int) -> TensorEntry:
    """One tensor's entry, its size checked against its shape."""
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            isinstance(side, int) and side >= 0 for side in shape
        ):
            pass
        case _:
            raise damaged(path, f"describes tensor {name} without dtype, shape and data_offsets", name)
    if dtype not in ITEM_BYTES:
        raise damaged(path, f"stores tensor {name} as {dtype}, a type this build does not know", name)
    n_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if begin < 0 or end - begin != n_bytes:
        raise damaged(
            path, f"gives tensor {name} bytes {begin:,} to {end:,}, but {dtype} {shape} takes {n_bytes:,} bytes", name
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_start + begin, n_bytes)


def _check_layout(entries: list[TensorEntry], path: Path, data_start: int, file_bytes: int) -> None:
    """Tensors must fill the file from the header to its end, each beginning where the one before it ends."""
    end = data_start
    for entry in entries:
        if entry.offset != end:
            fault = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise damaged(path, f"is inconsistent: tensor {entry.name} {fault}", entry.name)
        end = entry.offset + entry.n_bytes
        if end > file_bytes:
            needed = max(entry.offset + entry.n_bytes for entry in entries)
            raise damaged(path, f"is truncated: {file_bytes:,} of {needed:,} bytes, within {entry.name}", entry.name)
    if end != file_bytes:
        raise damaged(path, f"has {file_bytes - end:,} bytes after its last tensor")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _parse_json(path.read_bytes(), path)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from error


def _parse_json(text: bytes, path: Path, pairs_hook: Any = None) -> dict[str, Any]:
    try:
        parsed = json.loads(text, object_pairs_hook=pairs_hook)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"does not hold valid JSON where it should: {error}") from error
    if not isinstance(parsed, dict):
        raise damaged(path, "does not hold a JSON object where it should")
    return parsed


def _missing(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path.name} is missing from {path.parent}",
        path=str(path),
        hint="download the model again, or name its folder",
    )


def damaged(path: Path, fault: str, tensor: str = "") -> CheckpointError:
    # In the hub's cache a file is a link: the hub would link a deleted one to the same damaged bytes again.
    stored = path.resolve()
    return CheckpointError(
        f"{path.name} {fault}", path=str(path), tensor=tensor, hint=f"delete {stored} and download it again"
    )


def _require_as_it_was(entry: TensorEntry, stat: os.stat_result) -> None:
    """Weights of two models in one answer would be nobody's."""
    if entry.file_bytes not in (None, stat.st_size):
        fault = f"was replaced: it has {stat.st_size:,} bytes, and had {entry.file_bytes:,} when its header was read"
        raise damaged(entry.path, fault, entry.name)
    if entry.written_ns not in (None, stat.st_mtime_ns):
        raise CheckpointError(
            f"{entry.path.name} was written to after its header had been read",
            path=str(entry.path),
            tensor=entry.name,
            hint="open the model again once its files stay as they are",
        )


class TensorReader:
    """Reads stored tensors by position, from any number of threads; files stay open until `close`.

    Plain reads, not mappings: pages of a mapping would count as this process's memory for as long as it lives.
    """

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; reading again opens them again."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def read_into(self, entry: TensorEntry, buffer: memoryview, start: int = 0) -> None:
        """Fill writable `buffer` with the tensor's bytes from byte `start` on.

        Raises CheckpointError when the file has become shorter than its header says, is not as it was then, or cannot
        be read.
        """
        view = buffer.cast("B")
        assert 0 <= start <= start + len(view) <= entry.n_bytes, (start, len(view), entry)
        try:
            file = self._file(entry.path)
            missing_bytes = self._fill(file, view, entry.offset + start)
            stat = os.fstat(file.fileno())
        except OSError as error:
            raise damaged(entry.path, f"cannot be read at {entry.name}: {error.strerror}", entry.name) from error
        if missing_bytes:
            raise damaged(entry.path, f"is truncated: {missing_bytes:,} bytes of {entry.name} are missing", entry.name)
        _require_as_it_was(entry, stat)

    def rows(self, entry: TensorEntry) -> np.memmap:
        """A table [N, H] of floats as a copy-on-write view of its file: only rows that are looked up are read.

        bfloat16 rows come as their 16 bits (uint16). The view outlives this reader.
        """
        import numpy as np

        assert len(entry.shape) == 2, entry
        dtype = NUMPY_DTYPE.get(entry.dtype)
        if dtype is None:
            raise damaged(entry.path, f"stores table {entry.name} as {entry.dtype}, not as floats", entry.name)
        return np.memmap(entry.path, dtype=dtype, mode="c", offset=entry.offset, shape=entry.shape)

    def _file(self, path: Path) -> BinaryIO:
        with self._lock:
            if path not in self._files:
                self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
            return self._files[path]

    def _fill(self, file: BinaryIO, view: memoryview, offset: int) -> int:
        """Read into `view` from `offset` on; returns how many bytes the file lacks."""
        while view:
            n_bytes = self._read_some(file, view, offset)
            if not n_bytes:
                break
            view, offset = view[n_bytes:], offset + n_bytes
        return len(view)

    def _read_some(self, file: BinaryIO, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], offset)
        with self._lock:  # Windows has no positional read
            file.seek(offset)
            return file.readinto(view)  # type: ignore[attr-defined]
