"""A hub id -> its `Headers`, without its weights: from the shared cache, or by reading the first bytes of each file.

Of a model that is not here, config.json and the index are downloaded into the cache, and of each weights file no more
than its header is read, by HTTP range requests. The hub library does both, and honours HF_HOME, HF_HUB_OFFLINE,
HF_TOKEN and HF_ENDPOINT.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoint import INDEX_FILE, ITEM_BYTES, Headers, TensorHeader, read_config, read_index
from .errors import CheckpointError
from .hub import hub_errors, silent_bar

SINGLE_FILE = "model.safetensors"

REQUESTS_AT_ONCE = 8


def cached_folder(model_id: str, revision: str | None = None) -> Path | None:
    """The folder of the shared hub cache with what is there of a model, complete or not; None if that is nothing.

    Asks no network. Raises CheckpointError for a name that is no hub id.
    """
    from huggingface_hub import try_to_load_from_cache

    with hub_errors(model_id, revision):
        path = try_to_load_from_cache(model_id, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def is_complete(folder: Path) -> bool:
    """Whether all weights that a folder's index lists, or a single file of them, are there."""
    files = set(read_index(folder / INDEX_FILE).values()) or {SINGLE_FILE}
    return all((folder / file).exists() for file in files)


def fetch_headers(model_id: str, revision: str | None = None) -> Headers:
    """Read the headers of a model on the hub, at `revision` (None: its default branch); no weight is downloaded.

    Raises CheckpointError as `hub.download` does, and for a model without safetensors files or with damaged ones.
    """
    with hub_errors(model_id, revision):
        return _fetch(model_id, revision)


def _fetch(model_id: str, revision: str | None) -> Headers:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    small = ["config.json", INDEX_FILE]
    folder = Path(
        snapshot_download(model_id, revision=revision, allow_patterns=small, tqdm_class=silent_bar(None, None))
    )
    config = read_config(folder / "config.json", model_id)
    files = sorted(set(read_index(folder / INDEX_FILE).values())) or [SINGLE_FILE]
    commit = folder.name  # what follows is of the same state of the model
    try:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            parts = list(pool.map(partial(_fetch_header, HfApi(), model_id, commit), files))
    except RemoteEntryNotFoundError as error:
        raise CheckpointError(
            f"{model_id} is not a whole checkpoint: {constants.ENDPOINT} lacks one of its {len(files)} weights files",
            hint=f"it needs {', '.join(files)}",
        ) from error
    tensors = {name: header for part in parts for name, header in part.items()}
    origin = f"headers read from {constants.ENDPOINT}"
    return Headers(model_id, config, tensors, None, origin)


def _fetch_header(api: Any, model_id: str, commit: str, file: str) -> Mapping[str, TensorHeader]:
    """The tensors of one file by name."""
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        parsed = api.parse_safetensors_file_metadata(model_id, file, revision=commit).tensors
    except SafetensorsParsingError as error:
        raise CheckpointError(
            f"{file} of {model_id} does not begin with a safetensors header", path=file, hint=_one_line(error)
        ) from error
    for name, tensor in parsed.items():
        if tensor.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{file} of {model_id} stores tensor {name} as {tensor.dtype}, a type this build does not know",
                path=file,
                tensor=name,
            )
    return {name: TensorHeader(tensor.dtype, tuple(tensor.shape)) for name, tensor in parsed.items()}


def _one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
