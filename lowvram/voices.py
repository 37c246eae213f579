"""A checkpoint's spk_dict.pt -> its voices, of which each part is checked, and no code of the file's is run.

How long they are, without torch, is `voice_sizes`' to say.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import damaged
from .errors import CheckpointError


def load_speakers(path: Path) -> dict[str, dict[str, Any]]:
    """The voices of `spk_dict.pt`: name -> `bos_token` (int), `cond` [1, E] and `ref_mel` [1, F, M], finite floats.

    Raises CheckpointError when the file is missing, is not what torch saves, asks for code to run, or when a voice is
    not of that shape.
    """
    try:
        voices = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing, so this checkpoint has no voices",
            path=str(path),
            hint="download it, or ask for text only",
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise damaged(path, "does not hold voices that can be loaded safely") from error
    if not isinstance(voices, dict) or not voices:
        raise damaged(path, "holds no voices")
    for name, voice in voices.items():
        fault = next(_voice_faults(voice), None)
        if fault:
            raise damaged(path, f"holds voice {name} {fault}")
    return voices


def _voice_faults(voice: Any) -> Iterator[str]:
    """What is wrong with one voice."""
    if not isinstance(voice, dict) or not {"bos_token", "cond", "ref_mel"} <= voice.keys():
        yield "without bos_token, cond and ref_mel"
        return
    if not isinstance(voice["bos_token"], int):
        yield "whose bos_token is not a token id"
    for part, n_dims in (("cond", 2), ("ref_mel", 3)):
        if not _is_batch_of_one(voice[part], n_dims):
            yield f"whose {part} is not one finite float tensor of {n_dims} dimensions"


def _is_batch_of_one(value: Tensor, n_dims: int) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dim() == n_dims
        and value.shape[0] == 1
        and value.numel() > 0
        and bool(value.isfinite().all())
    )
