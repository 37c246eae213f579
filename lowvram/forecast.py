"""A turn's work, a budget and perhaps a card -> what would come of it, before anything is loaded: no torch.

It joins the plan, what was counted for it, and what a card should do with it; figures keep their kinds, planned and
expected.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from .checkpoint import Headers
from .errors import InfeasibleBudgetError
from .offload.budget import Budget
from .offload.cards import Card
from .offload.expect import Expectations, expect
from .offload.plan import Plan
from .offload.refusal import mib
from .options import Limits
from .planning import footprint_of, plan_without_loading
from .workload import Workload


@dataclass(frozen=True)
class Forecast:
    """A plan, whose headers and whose turn it is for, and what `Expectations` a card gives, None without one."""

    headers: Headers
    workload: Workload
    plan: Plan
    expectations: Expectations | None

    def to_json(self) -> dict[str, Any]:
        """The plan's own fields, and beside them what they come from and what to expect."""
        return {
            "model": self.headers.name,
            "origin": self.headers.origin,
            "fits": True,
            **self.plan.to_json(),
            "prompt_is_estimate": self.workload.is_estimate,
            "media": [asdict(medium) for medium in self.workload.media],
            "expectations": self.expectations.to_json() if self.expectations else None,
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.headers.name}, by {self.headers.origin}"
        yield str(self.workload)
        yield str(self.plan)
        if self.plan.smallest_budget_bytes is not None:
            yield f"smallest budget for this turn: {mib(self.plan.smallest_budget_bytes)}"
        if self.expectations:
            yield str(self.expectations)


def forecast(
    headers: Headers,
    workload: Workload,
    budget: Budget,
    limits: Limits,
    *,
    card: Card | None = None,
    device: str = "cuda",
    dtype: str = "auto",
) -> Forecast:
    """What would come of `workload` within `budget`; one that names no VRAM is what `card` has beside a desktop.

    Raises what `plan_without_loading` does.
    """
    if card and budget.vram_bytes is None:
        budget = replace(budget, vram_bytes=card.usable_bytes)
    plan = plan_without_loading(headers, workload.turn, budget, limits, device=device, dtype=dtype)
    if card is None:
        return Forecast(headers, workload, plan, None)
    return Forecast(headers, workload, plan, expect(plan, footprint_of(headers, dtype), workload.turn, card))


def refusal_record(error: InfeasibleBudgetError) -> dict[str, Any]:
    """A turn that does not fit, as JSON has it: what is short (`vram`, or `ram` on the host), the least of it, and the
    refusal in words, with what giving something up would save."""
    reason, short = str(error.args[0]), "ram" if error.phase == "host" else "vram"
    return {
        "fits": False,
        "short_of": short,
        "budget_bytes": error.available_bytes,
        "smallest_budget_bytes": error.needed_bytes,
        "phase": error.phase,
        "reason": reason,
        "hints": error.hint.split("; "),
    }
