"""A model that need not be here -> the plan of a turn: headers from wherever they are, and arithmetic. No torch.

In order: a folder, the shared hub cache, the shapes shipped with this package, and the hub itself, of whose weights
only the headers are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import (
    DEMO,
    Headers,
    find_folder,
    local_folder,
    open_checkpoint,
    quantization_of,
    read_config,
    stored_dtype,
)
from .errors import OptionError
from .hub import OnProgress
from .offload.budget import Budget
from .offload.footprint import Footprint, read_footprint
from .offload.plan import Plan, Turn, plan_memory
from .options import Limits
from .quant.scheme import read_scheme
from .remote_headers import cached_folder, fetch_headers, is_complete
from .shapes import shipped_headers

WIDTH_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def plan_without_loading(
    model: str | Path | Headers,
    turn: Turn,
    budget: Budget,
    limits: Limits,
    *,
    device: str = "cuda",
    dtype: str = "auto",
    revision: str | None = None,
) -> Plan:
    """The plan that opening `model` on such a device would give for `turn`, without opening it.

    `dtype` is the compute dtype by name, `auto` what the checkpoint is stored in. Raises CheckpointError where no
    headers can be had, UnsupportedQuantError, InfeasibleBudgetError where nothing fits, and OptionError for an unknown
    dtype or for speech from a checkpoint that has none.
    """
    headers = model if isinstance(model, Headers) else find_headers(model, revision)
    read_scheme(quantization_of(headers.config))  # refuses what opening would refuse
    return plan_memory(footprint_of(headers, dtype), budget, limits, turn, device=device)


def footprint_of(headers: Headers, dtype: str = "auto") -> Footprint:
    """The sizes of a checkpoint in a compute dtype by name. Raises OptionError for an unknown one."""
    return read_footprint(headers.tensors, headers.config, width_bytes=_width_bytes(dtype, headers))


def find_headers(model: str | Path, revision: str | None = None) -> Headers:
    """The headers of `model` (a folder, a hub id, or `demo`), from the nearest place that has them.

    A revision that is asked for is not taken from the shipped shapes. Raises CheckpointError.
    """
    folder = _demo() if model == DEMO else local_folder(model)
    if folder is not None:
        return _of_folder(str(model), folder, f"the headers in {folder}")
    model_id = str(model)
    cached = cached_folder(model_id, revision)
    if cached is not None and is_complete(cached):
        return _of_folder(model_id, cached, "the headers in the hub's cache")
    shipped = shipped_headers(model_id) if revision is None else None
    return shipped or fetch_headers(model_id, revision)


def find_description(
    model: str, revision: str | None = None, on_progress: OnProgress | None = None
) -> tuple[Path, dict[str, Any]]:
    """The folder of `model` with everything in it but, perhaps, its weights, and its config. Raises CheckpointError."""
    folder = _demo() if model == DEMO else find_folder(model, revision, on_progress, weights=False)
    return folder, read_config(folder / "config.json", model)


def _of_folder(name: str, folder: Path, origin: str) -> Headers:
    opened = open_checkpoint(folder)
    return Headers(name, opened.config, opened.tensors, folder, origin)


def _demo() -> Path:
    from .demo import demo_folder

    return demo_folder()


def _width_bytes(dtype: str, headers: Headers) -> int:
    if dtype == "auto":
        return WIDTH_BYTES.get(stored_dtype(headers.config) or "", 2)
    if dtype not in WIDTH_BYTES:
        raise OptionError(f"dtype {dtype!r} is unknown", hint=f"auto, {', '.join(WIDTH_BYTES)}")
    return WIDTH_BYTES[dtype]
