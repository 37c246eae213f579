"""A model id -> the folder of the shared hub cache that holds what this runtime reads of it.

Only weights, tokenizer, templates and configs are fetched, never code or pickled weights. The hub library keeps the
cache and honours HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT; its failures leave here as `CheckpointError`.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from .errors import CheckpointError

OnProgress = Callable[[int, int | None], None]
"""Called with (bytes so far, bytes in all or None), from the threads that download."""

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "spk_dict.pt",
    "model.safetensors.index.json",
)
WEIGHTS = "*.safetensors"
UNWANTED_FILES = ("*/*",)
"""Subfolders: the hub's patterns let `*` cross a slash."""


def download(model_id: str, revision: str | None, on_progress: OnProgress | None, *, weights: bool = True) -> Path:
    """Fetch what is missing of `model_id` at `revision` (None: its default branch) and return its folder.

    Without `weights`, only of the small files that tell what it is.

    Without network the cached copy is used if it is complete. Raises CheckpointError when there is no such model or
    revision, when it is gated, when the hub cannot be reached and the cache does not help, and when the disk is full.
    """
    from huggingface_hub import snapshot_download

    wanted = [*SMALL_FILES, WEIGHTS] if weights else [*SMALL_FILES]
    with hub_errors(model_id, revision):
        missing_bytes = _require_room(model_id, revision, wanted)
        folder = snapshot_download(
            model_id,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=list(UNWANTED_FILES),
            tqdm_class=silent_bar(on_progress, missing_bytes),
        )
    return Path(folder)


def _require_room(model_id: str, revision: str | None, wanted: list[str]) -> int | None:
    """Bytes still to download, after checking that the disk takes them; None when the hub cannot be asked."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        files = snapshot_download(
            model_id,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=list(UNWANTED_FILES),
            tqdm_class=silent_bar(None, None),
            dry_run=True,
        )
    except DryRunError:
        return None  # the cache may still answer, and if it does not, the download itself says why
    missing_bytes = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    free_bytes = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if missing_bytes > free_bytes:
        raise CheckpointError(
            f"{model_id} needs {missing_bytes / 1e9:.1f} GB more, but {cache} has {free_bytes / 1e9:.1f} GB free",
            path=str(cache),
            hint="free some space, or set HF_HOME to a folder on a larger disk",
        )
    return missing_bytes


def silent_bar(on_progress: OnProgress | None, total_bytes: int | None) -> Any:
    """A progress bar class that draws nothing and reports bytes to `on_progress`.

    The hub counts received and written bytes in two bars and files in a third; the furthest of the first two is told.
    """
    from tqdm import tqdm

    class SilentBar(tqdm):
        monitor_interval = 0  # no watcher thread
        most_bytes = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if on_progress is not None and self.unit == "B" and self.n > SilentBar.most_bytes:
                SilentBar.most_bytes = int(self.n)
                on_progress(SilentBar.most_bytes, total_bytes)
            return shown

    return SilentBar


@contextmanager
def hub_errors(model_id: str, revision: str | None) -> Iterator[None]:
    """Turn the hub library's errors into one sentence each."""
    from huggingface_hub import constants, errors

    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except CheckpointError:
        raise
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{model_id!r} is neither a folder nor a hub id such as Qwen/Qwen2.5-Omni-7B-AWQ", hint=_one_line(error)
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model_id} is gated", hint=f"accept its terms at {constants.ENDPOINT}/{model_id} and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{constants.ENDPOINT} has no model {model_id}",
            hint="check the spelling; if it is private, set HF_TOKEN; if it is a folder, check where you are",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model_id} has no revision {revision}", hint="leave it out for the newest") from error
    except errors.LocalEntryNotFoundError as error:
        reason = f": {_one_line(error.__cause__)}" if error.__cause__ else ""
        unreachable = f"{constants.ENDPOINT} cannot be reached{reason}"
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable
        raise CheckpointError(
            f"{model_id}{at} is not complete in {constants.HF_HUB_CACHE}, and {offline}",
            path=str(constants.HF_HUB_CACHE),
            hint="connect once to download it, or name a folder that holds it",
        ) from error
    except JSONDecodeError as error:
        raise CheckpointError(
            f"{constants.ENDPOINT} does not answer as a hub does about {model_id}{at}",
            hint="a network that wants a login, or another HF_ENDPOINT than a hub's, would answer so",
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise CheckpointError(
            f"downloading {model_id}{at} failed: {_one_line(error)}", hint="try again: what has arrived is kept"
        ) from error


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
