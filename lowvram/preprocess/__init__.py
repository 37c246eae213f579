"""Messages and their media -> model inputs, as the reference's processor makes them.

Names load what they need on first use, so that a prompt can be counted without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .counts import MediumShape
    from .prompt import Preprocessor, Prompt, PromptShape

__all__ = ["MediumShape", "Preprocessor", "Prompt", "PromptShape"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".prompt", __name__), name)
