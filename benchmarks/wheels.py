"""What this Python lacks of all that a run on a card needs, by the names of the wheels that bring it.

    python benchmarks/wheels.py

The exit code is 1 if something needed is not here. Only the standard library is imported: whoever carries wheels to a
machine that reaches no index must hear of all that are missing, not of the first.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = {
    "av": "av",
    "filelock": "filelock",
    "huggingface_hub": "huggingface_hub",
    "jinja2": "jinja2",
    "numpy": "numpy",
    "PIL": "pillow",
    "psutil": "psutil",
    "pytest": "pytest",
    "rich": "rich",
    "safetensors": "safetensors",
    "soundfile": "soundfile",
    "soxr": "soxr",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "transformers": "transformers",
    "typer": "typer",
}
"""By module: what the package depends on, and what runs its tests."""

OPTIONAL = {"cuda.core": "cuda-core", "cuda.bindings": "cuda-bindings"}


def missing() -> dict[str, list[str]]:
    """Wheels that are not here, `needed` and `optional`."""
    kinds = {"needed": NEEDED, "optional": OPTIONAL}
    return {kind: [wheels[module] for module in wheels if not _is_here(module)] for kind, wheels in kinds.items()}


def _is_here(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def main() -> int:
    """Name what is missing; 1 if any of it is needed."""
    lacking = missing()
    for kind, wheels in lacking.items():
        if wheels:
            print(f"{kind}, and not here: {', '.join(wheels)}", file=sys.stderr)
    return int(bool(lacking["needed"]))


if __name__ == "__main__":
    sys.exit(main())
