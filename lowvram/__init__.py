"""Qwen2.5-Omni on an ordinary gaming PC: text and speech from video inside a VRAM budget you name.

Names load what they need on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import LowVRAMError
    from .events import AudioChunk, Finished, Progress, TextDelta
    from .offload.budget import Budget
    from .offload.plan import Plan, plan_memory
    from .options import Limits, MediaParams, SamplingParams, SpeechParams
    from .runtime import OmniRuntime

__version__ = "0.1.0"

_HOME = {
    "AudioChunk": "events",
    "Budget": "offload.budget",
    "Finished": "events",
    "Limits": "options",
    "LowVRAMError": "errors",
    "MediaParams": "options",
    "OmniRuntime": "runtime",
    "Plan": "offload.plan",
    "Progress": "events",
    "SamplingParams": "options",
    "SpeechParams": "options",
    "TextDelta": "events",
    "plan_memory": "offload.plan",
}
"""The module that each public name lives in."""

__all__ = [
    "AudioChunk",
    "Budget",
    "Finished",
    "Limits",
    "LowVRAMError",
    "MediaParams",
    "OmniRuntime",
    "Plan",
    "Progress",
    "SamplingParams",
    "SpeechParams",
    "TextDelta",
    "__version__",
    "plan_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
