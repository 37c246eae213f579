"""A turn that does not fit to an error that helps: what binds, what would do, and what giving something up saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..errors import InfeasibleBudgetError
from .budget import MIB, format_bytes
from .placement import Phase
from .prices import Turn

PATCH_PIXELS = 14 * 14
MERGED_PATCHES = 4
"""Patches of the vision tower that make one token."""

MOST_SUGGESTIONS = 4


def refuse_vram(
    turn: Turn, binding: Phase, reserve_bytes: int, budget_bytes: int, savings: list[str]
) -> InfeasibleBudgetError:
    """The refusal of a turn whose leanest plan has its peak in `binding`; `savings` as `suggestions` words them."""
    smallest_bytes = binding.peak_bytes + reserve_bytes
    rows = {
        "weights": binding.weights_bytes,
        "KV cache": binding.kv_bytes,
        "activations": binding.activation_bytes,
        "reserve": reserve_bytes,
    }
    written = ", ".join(f"{kind} {mib(n_bytes)}" for kind, n_bytes in rows.items())
    return InfeasibleBudgetError(
        f'phase "{binding.name}" needs {mib(smallest_bytes)} at the least ({written}) for {turn.prompt_tokens} prompt'
        f" tokens, but the budget is {format_bytes(budget_bytes)}",
        phase=binding.name,
        needed_bytes=smallest_bytes,
        available_bytes=budget_bytes,
        hint="; ".join([f"the smallest budget for this turn is {mib(smallest_bytes)}", *savings]),
    )


def refuse_ram(
    turn: Turn, needed_bytes: int, budget_bytes: int, savings: Sequence[str] = ("a shorter prompt needs less",)
) -> InfeasibleBudgetError:
    """The refusal of a turn that the host has no room for: whatever the device holds, or, on a CPU, with what it has in
    its place; `savings` then as `suggestions` words them."""
    return InfeasibleBudgetError(
        f"the host needs {mib(needed_bytes)} at the least for {turn.prompt_tokens} prompt tokens, but the RAM budget is"
        f" {format_bytes(budget_bytes)}",
        phase="host",
        needed_bytes=needed_bytes,
        available_bytes=budget_bytes,
        hint="; ".join([f"the smallest RAM budget for this turn is {mib(needed_bytes)}", *savings]),
    )


def suggestions(turn: Turn, smallest_bytes: int, needed_bytes: Callable[[Turn], int]) -> list[str]:
    """What to give up and how much less is needed then, the most first: that is also what comes closest to enough.

    `smallest_bytes` is the least budget for this turn; `needed_bytes` says the same of another one.
    """
    needs = sorted((needed_bytes(lesser), what) for what, lesser in _lesser_turns(turn))
    lines = [f"{what} saves {mib(smallest_bytes - n_bytes)}" for n_bytes, what in needs if n_bytes < smallest_bytes]
    return lines[:MOST_SUGGESTIONS]


def mib(n_bytes: int) -> str:
    """Whole MiB, rounded up, so that the figure can be given as a budget and works."""
    return f"{math.ceil(n_bytes / MIB)} MiB"


def _lesser_turns(turn: Turn) -> Iterator[tuple[str, Turn]]:
    """The turn with one thing given up, each by the flag that does it."""
    if turn.codes:
        yield "--no-speech", replace(turn, codes=0)
    if turn.grids:
        pixels = max(h * w for _, h, w in turn.grids) * PATCH_PIXELS // 2
        yield f"--max-pixels {pixels}", _with_grids(turn, [(t, h, -(-w // 2)) for t, h, w in turn.grids])
    if any(times > 1 for times, _, _ in turn.grids):
        yield "half the --fps", _with_grids(turn, [(-(-t // 2), h, w) for t, h, w in turn.grids])
    if turn.kv == "16bit":
        yield "--kv int8", replace(turn, kv="int8")
    if turn.codes and turn.speech_dtype == "float32":
        yield "--speech-dtype float16", replace(turn, speech_dtype="float16")
    if turn.text_tokens > 1:
        yield f"--max-tokens {turn.text_tokens // 2}", replace(turn, text_tokens=turn.text_tokens // 2)
    if turn.codes > 1:
        yield f"--max-codes {turn.codes // 2}", replace(turn, codes=turn.codes // 2)


def _with_grids(turn: Turn, grids: list[tuple[int, int, int]]) -> Turn:
    """The same turn seeing less, its prompt shorter by the tokens that fall away."""
    before, after = (sum(t * h * w for t, h, w in some) // MERGED_PATCHES for some in (turn.grids, grids))
    return replace(
        turn,
        grids=tuple(grids),
        prompt_tokens=max(1, turn.prompt_tokens - before + after),
    )
