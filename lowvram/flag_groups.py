"""Groups of flags -> a command that takes every flag by itself, which is what the command line's library reads.

A group is a dataclass whose fields are flags. A command names the groups it takes, and `spread` spreads them out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, cast

import typer

ASK, SAY, SEE, RUN, OUT = "Question and answer", "Speech", "Media", "Model and memory", "Output"
"""The panels that help shows flags in."""


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the flags of its groups in their place, by name."""
    groups: dict[str, type] = {}
    flags: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = cast(type, parameter.annotation)
            flags += inspect.signature(groups[name], eval_str=True).parameters.values()
        else:
            flags.append(parameter)

    def spread_out(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    keyword_only = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in flags]
    spread_out.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    spread_out.__name__, spread_out.__doc__ = command.__name__, command.__doc__
    return spread_out


def flag(*names: str, panel: str, help: str, **more: Any) -> Any:
    """A flag by its names, in one of the panels; `more` is what typer knows besides."""
    return typer.Option(*names, rich_help_panel=panel, help=help, **more)
