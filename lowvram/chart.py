"""A profile -> a picture of it as SVG: memory step by step, stacked by kind, under the plan and the budget.

Small pure functions, from bytes and steps to pixels and path data. Colours are named classes; the page chooses them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from .offload.budget import GIB, MIB, format_bytes
from .offload.plan import Phase, Plan
from .offload.profile import DEVICE_ALLOCATOR, PLANNED, TRACED, TRACKED_LIVE_TENSORS, Moment
from .profile_file import ProfileFile

BANDS = (("weights", "weights_bytes"), ("KV cache", "kv_bytes"), ("activations", "activation_bytes"))
"""From the ground up: what is stacked, and the field of a moment that says how high."""

SHORT = {PLANNED: "planned", TRACED: "traced", DEVICE_ALLOCATOR: "allocator", TRACKED_LIVE_TENSORS: "tracked"}

LETTER_PX = 6.4
"""Of 11 and 12 px type, on average: wide enough for most system fonts."""

LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX, LABEL_PX = 46, 4, 58, 30, 18
"""Room for the axis, the phases' names and figures above, their steps below; height of a label inside a band."""

HEADROOM = 1.08
"""Of the scale above the highest line: room for the line's own words."""

FAR = 4
"""A budget so many times what is held would flatten the picture; it is then told, not drawn."""


@dataclass(frozen=True)
class Scale:
    """Maps 0 to `most` onto pixels from `zero_px` to `most_px`."""

    most: float
    zero_px: float
    most_px: float

    def __call__(self, value: float) -> float:
        return self.zero_px + (self.most_px - self.zero_px) * value / self.most


@dataclass(frozen=True)
class Lane:
    """A phase, its moments, and where they begin and end in the picture."""

    phase: Phase
    moments: tuple[Moment, ...]
    left_px: float
    right_px: float

    @property
    def step_px(self) -> float:
        return (self.right_px - self.left_px) / len(self.moments)


@dataclass(frozen=True)
class Step:
    """One moment, from `left_px` to `right_px`."""

    moment: Moment
    left_px: float
    right_px: float


def scale_bytes(recorded: ProfileFile) -> int:
    """The bytes that the scale must reach to show all of a profile: its budget, unless that is far above the rest."""
    plan = recorded.plan
    held = max((moment.total_bytes for moment in recorded.profile.timeline), default=0)
    highest = max(held, plan.peak_bytes)
    budget_bytes = plan.budget_bytes or 0
    return max(1, highest, budget_bytes if budget_bytes < FAR * highest else 0)


def split_by_phase(plan: Plan, timeline: Sequence[Moment]) -> list[tuple[Phase, tuple[Moment, ...]]]:
    """The moments of each phase. One that shows none is left out; without a timeline each has its plan as a moment.

    A phase that this plan does not know, of one that replaced it on the way, counts to the one before.
    """
    if not timeline:
        return [(phase, (_as_planned(phase),)) for phase in plan.phases]
    shown: dict[str, list[Moment]] = {phase.name: [] for phase in plan.phases}
    name = plan.phases[0].name
    for moment in timeline:
        name = moment.phase if moment.phase in shown else name
        shown[name].append(moment)
    return [(phase, tuple(shown[phase.name])) for phase in plan.phases if shown[phase.name]]


def share_width(steps: Sequence[int], least_px: Sequence[float], width_px: float) -> list[float]:
    """Widths in pixels by steps, none below its least; where even the least do not fit, they shrink alike."""
    if sum(least_px) >= width_px:
        return [least * width_px / sum(least_px) for least in least_px]
    narrow: set[int] = set()
    while True:
        left_px = width_px - sum(least_px[index] for index in narrow)
        left_steps = sum(n for index, n in enumerate(steps) if index not in narrow)
        widths = [least_px[index] if index in narrow else left_px * n / left_steps for index, n in enumerate(steps)]
        too_narrow = {index for index, width in enumerate(widths) if width < least_px[index]}
        if not too_narrow:
            return widths
        narrow |= too_narrow


def axis_ticks(most_bytes: int) -> list[int]:
    """Round sizes from 0 up to `most_bytes`, three to eight of them."""
    unit = GIB if most_bytes >= GIB else MIB
    least = most_bytes / unit / 6
    power = 10 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    return [round(n * step * unit) for n in range(int(most_bytes / (step * unit)) + 1)]


def area_path(steps: Sequence[Step], lows: Sequence[float], highs: Sequence[float]) -> str:
    """The outline of a band of stairs, from `lows` to `highs` (pixels of y, one of each a step)."""
    up = "".join(f"V{high:.1f}H{step.right_px:.1f}" for step, high in zip(steps, highs, strict=True))
    down = "".join(f"V{low:.1f}H{step.left_px:.1f}" for step, low in zip(reversed(steps), reversed(lows), strict=True))
    return f"M{steps[0].left_px:.1f} {lows[0]:.1f}{up}{down}Z"


def chart(recorded: ProfileFile, most_bytes: int, *, key: str, width_px: int, height_px: int = 420) -> str:
    """The picture as an `svg` element of its own; `key` is part of its ids, which must differ on one page."""
    y = Scale(most_bytes * HEADROOM, height_px - BOTTOM_PX, TOP_PX)
    lanes = _lanes(recorded, width_px)
    steps = [step for lane in lanes for step in _steps(lane)]
    parts = [
        *_axis(y, most_bytes, width_px),
        *_bands(steps, y),
        *_limits(recorded.plan, y, width_px, key),
        *(part for index, lane in enumerate(lanes) for part in _lane(recorded, lane, y, is_first=index == 0)),
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {width_px} {height_px}" role="img"'
        f' aria-labelledby="title-{key} desc-{key}">'
        f'<title id="title-{key}">Memory by step, stacked by kind</title>'
        f'<desc id="desc-{key}">{escape(describe(recorded))}</desc>{"".join(parts)}</svg>'
    )


def describe(recorded: ProfileFile) -> str:
    """The picture in a sentence, for those who cannot see it."""
    plan, kind = recorded.plan, recorded.counted
    peaks = recorded.profile.columns[kind]
    told = "; ".join(
        f"{phase.name}: {kind} {format_bytes(peaks[phase.name])}, planned {format_bytes(phase.peak_bytes)}"
        for phase in plan.phases
        if phase.name in peaks
    )
    return f"Peaks by phase: {told}. {limit_words(plan)}."


def limit_words(plan: Plan) -> str:
    """The budget and how much of it is set aside."""
    budget = "no budget" if plan.budget_bytes is None else f"budget {format_bytes(plan.budget_bytes)}"
    return f"{budget}, reserve {format_bytes(plan.reserve_bytes)}" if plan.reserve_bytes else budget


def _as_planned(phase: Phase) -> Moment:
    weights_bytes = phase.weights_bytes + phase.prefetch_bytes
    return Moment("plan", phase.name, weights_bytes, phase.kv_bytes, phase.activation_bytes)


def _lanes(recorded: ProfileFile, width_px: int) -> list[Lane]:
    phases = split_by_phase(recorded.plan, recorded.profile.timeline)
    counts = [len(moments) for _, moments in phases]
    least = [LETTER_PX * max(map(len, heading(recorded, phase))) + 10 for phase, _ in phases]
    lanes, left_px = [], float(LEFT_PX)
    for (phase, moments), lane_px in zip(
        phases, share_width(counts, least, width_px - LEFT_PX - RIGHT_PX), strict=True
    ):
        lanes.append(Lane(phase, moments, left_px, left_px + lane_px))
        left_px += lane_px
    return lanes


def _steps(lane: Lane) -> Iterator[Step]:
    for index, moment in enumerate(lane.moments):
        left_px = lane.left_px + index * lane.step_px
        yield Step(moment, left_px, left_px + lane.step_px)


def heading(recorded: ProfileFile, phase: Phase) -> list[str]:
    """A phase's name, what it held at most, and what was planned for it."""
    kinds = [recorded.counted, PLANNED] if recorded.counted != PLANNED else [PLANNED]
    columns = recorded.profile.columns
    figures = [
        f"{SHORT[kind]} {format_bytes(columns[kind][phase.name])}" for kind in kinds if phase.name in columns[kind]
    ]
    return [phase.name, *figures]


def _axis(y: Scale, most_bytes: int, width_px: int) -> Iterator[str]:
    unit, unit_bytes = ("GiB", GIB) if most_bytes >= GIB else ("MiB", MIB)
    for n_bytes in axis_ticks(most_bytes):
        at = y(n_bytes)
        yield f'<path class="grid" d="M{LEFT_PX} {at:.1f}H{width_px - RIGHT_PX}"/>'
        words = f"{n_bytes / unit_bytes:g} {unit}" if n_bytes else "0"
        yield f'<text class="tick" x="{LEFT_PX - 6}" y="{at + 4:.1f}" text-anchor="end">{words}</text>'


def _bands(steps: Sequence[Step], y: Scale) -> Iterator[str]:
    ground = [0] * len(steps)
    for name, field in BANDS:
        tops = [low + getattr(step.moment, field) for low, step in zip(ground, steps, strict=True)]
        lows, highs = [y(low) for low in ground], [y(top) for top in tops]
        css = name.split()[0].lower()
        yield f'<path class="band {css}" d="{area_path(steps, lows, highs)}"/>'
        place = _roomiest(steps, lows, highs, LETTER_PX * len(name))
        if place:
            yield f'<text class="on-{css}" x="{place[0]:.1f}" y="{place[1] + 4:.1f}" text-anchor="middle">{name}</text>'
        ground = tops


def _roomiest(
    steps: Sequence[Step], lows: Sequence[float], highs: Sequence[float], words_px: float
) -> tuple[float, float] | None:
    """Where words of a width fit best inside a band: the middle (x, y) of the place, None if it is too thin for any."""
    places: dict[float, list[tuple[float, float]]] = {}
    for index, first in enumerate(steps):
        right_px = first.left_px + words_px + 8
        covered = [i for i in range(index, len(steps)) if steps[i].left_px < right_px]
        low, high = min(lows[i] for i in covered), max(highs[i] for i in covered)
        if steps[covered[-1]].right_px >= right_px and low - high > LABEL_PX:
            places.setdefault(round(low - high, 1), []).append(
                ((first.left_px + steps[covered[-1]].right_px) / 2, (low + high) / 2)
            )
    if not places:
        return None
    roomiest = places[max(places)]
    return roomiest[len(roomiest) // 2]


def _limits(plan: Plan, y: Scale, width_px: int, key: str) -> Iterator[str]:
    """The budget as a line with its value, and under it, hatched, what is set aside."""
    right_px, limit_bytes = width_px - RIGHT_PX, plan.budget_bytes
    if limit_bytes is None or y(limit_bytes) < TOP_PX:
        far = "" if limit_bytes is None else ", above this picture"
        yield f'<text class="limit" x="{right_px}" y="{TOP_PX + 12}" text-anchor="end">{limit_words(plan)}{far}</text>'
        return
    at, floor = y(limit_bytes), y(limit_bytes - plan.reserve_bytes)
    if plan.reserve_bytes:
        yield (
            f'<defs><pattern id="hatch-{key}" width="6" height="6" patternUnits="userSpaceOnUse"'
            ' patternTransform="rotate(45)"><path class="hatch" d="M0 0V6"/></pattern></defs>'
            f'<path fill="url(#hatch-{key})" d="M{LEFT_PX} {at:.1f}H{right_px}V{floor:.1f}H{LEFT_PX}Z"/>'
        )
    yield f'<path class="budget" d="M{LEFT_PX} {at:.1f}H{right_px}"/>'
    yield f'<text class="limit" x="{right_px}" y="{at - 6:.1f}" text-anchor="end">{limit_words(plan)}</text>'


def _lane(recorded: ProfileFile, lane: Lane, y: Scale, *, is_first: bool) -> Iterator[str]:
    """A phase's bounds, words, planned peak and number of steps."""
    left, right, ground = lane.left_px, lane.right_px, y(0)
    if not is_first:
        yield f'<path class="bound" d="M{left:.1f} 4V{ground + BOTTOM_PX - 6:.1f}"/>'
    for row, words in enumerate(heading(recorded, lane.phase)):
        css = "phase" if row == 0 else "figure"
        yield f'<text class="{css}" x="{left + 5:.1f}" y="{16 + 16 * row}">{escape(words)}</text>'
    top = y(lane.phase.peak_bytes)
    yield f'<path class="planned" d="M{left:.1f} {ground:.1f}V{top:.1f}H{right:.1f}V{ground:.1f}"/>'
    if recorded.profile.timeline:
        n = len(lane.moments)
        yield f'<text class="tick" x="{left + 5:.1f}" y="{ground + 18:.1f}">{n} step{"s" * (n > 1)}</text>'
