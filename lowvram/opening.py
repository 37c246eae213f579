"""Groups of flags -> what a command works with: the messages that are asked, a runtime, or what counts a prompt.

Heavy modules are imported where something is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .contradictions import refuse_for_media
from .conversation import read_arguments
from .events import Progress
from .flags import Machine, Memory, Model, Question
from .listeners import Listener
from .options import Limits

if TYPE_CHECKING:
    from .offload.meter import Meter
    from .preprocess import Preprocessor
    from .runtime import OmniRuntime

SHORT_QUESTION = "?"
"""What is planned for when nothing is asked, as `OmniRuntime.plan` does."""


def messages_asked(
    typed: Mapping[str, Any],
    question: Question,
    media: list[str] | None,
    limits: Limits,
    stack: ExitStack,
    *,
    at_least_short: bool,
) -> list[dict[str, Any]]:
    """What is asked; where nothing is and something `at_least_short` must be, a short question.

    Media stay open until `stack` is left. Raises OptionError for an option among those `typed` that is about none of
    them, and MediaError for one that cannot be read.
    """
    prompt = question.prompt or (SHORT_QUESTION if at_least_short and not media else "")
    messages = read_arguments(media or [], prompt, question.system, limits, stack)
    refuse_for_media(typed, (part["type"] for part in messages[-1]["content"]))
    return messages


def open_runtime(
    model: Model,
    memory: Memory,
    machine: Machine,
    limits: Limits,
    progress: Listener,
    verbose: bool,
    meter: Meter | None = None,
    remember: str | None = None,
) -> OmniRuntime:
    """The runtime that the flags name, its download shown; to whoever wants more, what will compute is told."""
    from .runtime import OmniRuntime

    if not verbose:
        quieten_transformers()
    runtime = OmniRuntime.open(
        model.model,
        revision=model.revision,
        vram=memory.vram,
        ram=memory.ram,
        device=machine.device,
        dtype=memory.dtype,
        kernel=machine.kernel,
        limits=limits,
        meter=meter,
        on_download=download_shown(progress),
        remember=remember,
    )
    if verbose:
        progress.say(f"kernel {runtime.kernel} on {runtime.device.title}")
    return runtime


def open_preprocessor(model: Model, progress: Listener, verbose: bool) -> Preprocessor:
    """What counts a prompt; of a model on the hub no weights are downloaded for it."""
    from .planning import find_description
    from .preprocess import Preprocessor

    if not verbose:
        quieten_transformers()
    return Preprocessor(*find_description(model.model, model.revision, download_shown(progress)))


def download_shown(progress: Listener) -> Callable[[int, int | None], None]:
    """Bytes of a download as events."""
    return lambda done, total: progress.show(Progress("download", done, total, "bytes"))


def quieten_transformers() -> None:
    """Silence the modelling library's warnings, which are for people who write models; only a door may do so."""
    from transformers.utils import logging

    logging.set_verbosity_error()
