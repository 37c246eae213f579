"""A small complete Qwen2.5-Omni, made from a seed and written in the published on-disk layout.

True in structure (both encoders, AWQ thinker, talker, DiT and BigVGAN, tokenizer, chat template, two voices, special
ids at the published distances), small in width, gibberish in meaning. Its weights keep the variance of what flows
through them, so that every layer shows in the answer. With the published widths the same recipe writes a checkpoint
of full size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from ..errors import CheckpointError, OptionError
from ..user_cache import user_cache
from .config import PREPROCESSOR_CONFIG, TINY, DemoSize, generation_config, omni_config
from .tokenizer import CHAT_TEMPLATE, ROLES, SPECIAL_TOKENS, WORDS, bpe, write_json, write_tokenizer

__all__ = ["TINY", "DemoSize", "build_demo", "demo_folder"]

RECIPE = 2
"""Raise it when the same arguments begin to give other bytes, so that cached demos are built anew."""

BUILT_IN_SEED = 1
"""Of the demo in the cache: most of its answers are a few words to a few lines long."""


def build_demo(
    folder: Path,
    *,
    seed: int = 0,
    quantized: bool = True,
    dtype: str = "float16",
    size: DemoSize = DemoSize(),  # noqa: B008 (frozen)
) -> None:
    """Write a checkpoint into `folder`, byte for byte the same for the same arguments.

    Float tensors are stored in `dtype`, apart from AWQ's scales (float16) and, in a checkpoint that is not quantized,
    token2wav (float32). Raises OptionError for an unknown dtype.
    """
    from . import weights

    if dtype not in weights.STORED_AS:
        raise OptionError(f"dtype {dtype!r} is unknown", hint=f"one of: {', '.join(weights.STORED_AS)}")
    config = omni_config(size, user_id=bpe(size.first_special_id)[0]["user"], quantized=quantized, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(size))
    write_json(folder / "preprocessor_config.json", PREPROCESSOR_CONFIG)
    write_tokenizer(folder, size.first_special_id)
    weights.write_speakers(folder / "spk_dict.pt", size, seed)
    weights.write_weights(folder, config, size, seed, dtype)


def demo_folder(cache: Path | None = None) -> Path:
    """The demo checkpoint in the user's cache (`cache`, or `user_cache`), built if absent.

    It appears there whole or not at all, also when two processes build it at once.
    """
    cache = user_cache() if cache is None else cache
    recipe = json.dumps(
        [RECIPE, BUILT_IN_SEED, asdict(DemoSize()), SPECIAL_TOKENS, ROLES, WORDS, CHAT_TEMPLATE, PREPROCESSOR_CONFIG]
    )
    folder = cache / f"demo-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if os.path.isdir(folder):  # unlike Path.is_dir, also where nobody may look
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="demo-unfinished-", dir=cache))
        try:
            build_demo(unfinished, seed=BUILT_IN_SEED)
            _move_into_place(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"the demo checkpoint (5 MB) cannot be written to {cache}: {error.strerror}",
            path=str(cache),
            hint="set XDG_CACHE_HOME to a writable folder",
        ) from error
    return folder


def _move_into_place(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        # Another process was first; its bytes are the same.
