"""The error tree: every error a caller can meet, each with the exit code its command line ends with.

    LowVRAMError                    1   base; `.hint` is what the reader can change
    ├── OptionError                 2   bad or contradictory option (also a ValueError)
    ├── CheckpointError             3   unreadable, incomplete or foreign checkpoint: `.path`, `.tensor`
    │   └── UnsupportedQuantError   3   a quantization this build does not read
    ├── BudgetError                 4   memory: `.phase`, `.needed_bytes`, `.available_bytes`
    │   ├── InfeasibleBudgetError   4   before any weight has moved
    │   └── BudgetExceededError     4   the device ran out all the same; `.profile`
    ├── MediaError                  5   a file, URL or array that is not usable: `.path`, `.limit`
    └── BackendError                6   a missing or broken backend: `.backend`, `.reason`

A message has a subject, a number with its unit, and a way out.
"""

from __future__ import annotations

from typing import Any


class LowVRAMError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message


class OptionError(LowVRAMError, ValueError):
    """An option is out of its range, unknown, or contradicts another."""

    exit_code = 2


class CheckpointError(LowVRAMError):
    """A checkpoint cannot be read as a Qwen2.5-Omni: names the file and, where there is one, the tensor."""

    exit_code = 3

    def __init__(self, message: str, *, path: str = "", tensor: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.path = path
        self.tensor = tensor


class UnsupportedQuantError(CheckpointError):
    """The checkpoint is quantized in a way this build does not read."""


class BudgetError(LowVRAMError):
    """A memory budget cannot be, or was not, kept."""

    exit_code = 4

    def __init__(
        self, message: str, *, phase: str = "", needed_bytes: int = 0, available_bytes: int = 0, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.phase = phase
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class InfeasibleBudgetError(BudgetError):
    """No plan fits the budget; raised before any weight has moved."""


class BudgetExceededError(BudgetError):
    """The device ran out although the plan fits; `profile` holds the peaks measured by phase."""

    def __init__(self, message: str, *, profile: Any = None, **where: Any) -> None:
        super().__init__(message, **where)
        self.profile = profile


class MediaError(LowVRAMError):
    """A medium is missing, unreadable, empty or beyond a limit."""

    exit_code = 5

    def __init__(self, message: str, *, path: str = "", limit: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.path = path
        self.limit = limit


class BackendError(LowVRAMError):
    """A device or kernel backend is missing or does not work here."""

    exit_code = 6

    def __init__(self, message: str, *, backend: str = "", reason: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.backend = backend
        self.reason = reason
