"""A blank figure to draw a PNG on, by matplotlib, which is an extra."""

from __future__ import annotations

from typing import Any

from lowvram.errors import BackendError


def blank_figure(width_in: float, height_in: float, dpi: int = 160) -> Any:
    """A matplotlib figure that belongs to no window. Raises BackendError without matplotlib."""
    try:
        from matplotlib import figure
    except ImportError as error:
        raise BackendError(
            "pictures need matplotlib, which is not installed",
            backend="matplotlib",
            reason=str(error),
            hint='pip install "lowvram[plots]"; lowvram profile --html needs nothing',
        ) from error
    return figure.Figure(figsize=(width_in, height_in), dpi=dpi, layout="constrained")
