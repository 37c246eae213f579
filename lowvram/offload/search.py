"""Prices and a budget to the best way to run a turn: where its pipe is cut, what is streamed, what stays.

All ways are weighed by what a listener notices, in this order: weights that cross the bus again and again; tokens and
codes written before the first sound because the pipe is cut; passes over the prompt; weights moved once per turn. A
larger budget only adds ways, so in this order it never makes a plan worse.

Stages that share the device leave each other less room, so nothing repeats less than with every stage alone. What each
stage streams is therefore settled first, alone; then the pipe is cut where the settled ways do not fit together; and
what room is left after that keeps whole components from one phase, and one turn, to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, groupby, pairwise, product

from .prices import COMPONENTS, ONCE, Prices, Way

Run = tuple[str, ...]
"""Neighbouring stages."""


@dataclass(frozen=True)
class Choice:
    """What was found: the stages of each phase, a way to run each stage, and the components that never leave."""

    phases: tuple[Run, ...]
    ways: Mapping[str, Way]
    residents: frozenset[str]


@dataclass(frozen=True)
class _Settled:
    """Ways that repeat least at one prefill chunk: for each stage those to choose among."""

    prefill_tokens: int
    repeated_bytes: int
    offers: tuple[tuple[Way, ...], ...]


def best_choice(prices: Prices, stages: Run, room_bytes: int) -> Choice | None:
    """The best way to run `stages` in `room_bytes`, the reserve not counted; None if there is none."""
    turn, shelf = prices.turn, _Shelf.of(prices, stages)

    def burden(way: tuple[tuple[Run, ...], _Settled]) -> tuple[int, int]:
        phases, settled = way
        ends = {run[-1] for run in phases[:-1]}
        drained = turn.text_tokens * ("thinker" in ends) + turn.codes * ("talker" in ends)
        return drained, -(-turn.prompt_tokens // settled.prefill_tokens)

    ways = product(_cuts(stages), _least_repeating(prices, stages, room_bytes))
    for _, equals in groupby(sorted(ways, key=burden), key=burden):
        choices = [c for phases, settled in equals for c in _choices(prices, phases, settled, room_bytes, shelf)]
        if choices:
            return min(choices, key=lambda choice: _lesser_burden(prices, choice))
    return None


def leanest_choice(prices: Prices, stages: Run) -> Choice:
    """The way that needs least: one stage at a time, the least of its weights held, the smallest chunks."""
    smallest_tokens = prices.chunks("thinker")[-1]
    ways = {
        stage: min(prices.ways(stage, smallest_tokens), key=lambda way: (way.base_bytes, way.activation_bytes))
        for stage in stages
    }
    return Choice(tuple((stage,) for stage in stages), ways, frozenset())


def shared_bytes(prices: Prices, ways: Sequence[Way]) -> int:
    """What a phase needs whose stages run in these ways, residents of other phases not counted. Stages compute in
    turn, so of their activations the largest counts."""
    stages = [way.stage for way in ways]
    kept_bytes = prices.state_bytes(stages) + prices.kept_kv_bytes(stages)
    return sum(way.base_bytes for way in ways) + max(way.activation_bytes for way in ways) + kept_bytes


def _cuts(stages: Run) -> Iterator[tuple[Run, ...]]:
    """All ways to cut a row of stages into phases, from few phases to many; what is needed only once is one of its
    own."""
    for cuts in _subsets(range(1, len(stages))):
        bounds = (0, *cuts, len(stages))
        phases = tuple(stages[start:stop] for start, stop in pairwise(bounds))
        if all(run == (ONCE,) for run in phases if ONCE in run):
            yield phases


def _least_repeating(prices: Prices, stages: Run, room_bytes: int) -> list[_Settled]:
    """What each stage settles on, at those prefill chunks at which all together repeat least."""
    found = []
    for prefill_tokens in prices.chunks("thinker"):
        offers = tuple(_settle(prices, stage, prefill_tokens, room_bytes) for stage in stages)
        if all(offers):
            found.append(_Settled(prefill_tokens, sum(ways[0].repeated_bytes for ways in offers), offers))
    least_bytes = min((settled.repeated_bytes for settled in found), default=0)
    return [settled for settled in found if settled.repeated_bytes == least_bytes]


def _settle(prices: Prices, stage: str, prefill_tokens: int, room_bytes: int) -> tuple[Way, ...]:
    """Of the ways to run a stage that fit alone, those that repeat least; empty if none fits."""
    fitting = [way for way in prices.ways(stage, prefill_tokens) if shared_bytes(prices, [way]) <= room_bytes]
    return tuple(way for way in fitting if way.repeated_bytes == fitting[0].repeated_bytes)


def _choices(
    prices: Prices, phases: tuple[Run, ...], settled: _Settled, room_bytes: int, shelf: _Shelf
) -> Iterator[Choice]:
    """Every pick of settled ways that fits these phases, with the most that can stay on the device between them."""
    for picks in product(*settled.offers):
        ways = {way.stage: way for way in picks}
        rooms = [(run, room_bytes - shared_bytes(prices, [ways[stage] for stage in run])) for run in phases]
        if all(left_bytes >= 0 for _, left_bytes in rooms):
            yield Choice(phases, ways, shelf.most(ways, rooms))


def _lesser_burden(prices: Prices, choice: Choice) -> tuple[int, ...]:
    """What tells choices of equal burden apart: weights moved once, then phases, streamed stages, passes, how much each
    computes at once, and the peak."""
    ways = choice.ways.values()
    stays = sum(prices.footprint.device_bytes(component) for component in choice.residents)
    peaks = (shared_bytes(prices, [choice.ways[stage] for stage in run]) for run in choice.phases)
    streamed = sum(not way.is_whole for way in ways)
    chunks = (-way.chunk for way in ways)
    return -stays, len(choice.phases), streamed, sum(way.passes for way in ways), *chunks, max(peaks)


@dataclass(frozen=True)
class _Shelf:
    """What may stay on the device for good. Components are bits of a mask, sets of them masks."""

    components: tuple[str, ...]
    mask_of: Mapping[str, int]
    """Of each stage's components."""
    bytes_of: tuple[int, ...]
    masks: tuple[int, ...]
    """All sets, the largest in bytes first."""

    @classmethod
    def of(cls, prices: Prices, stages: Run) -> _Shelf:
        own = {stage: COMPONENTS[stage] if stage != ONCE else () for stage in stages}
        components = tuple(chain.from_iterable(own.values()))
        sizes = [prices.footprint.device_bytes(c) for c in components]
        sets = range(2 ** len(sizes))
        bytes_of = tuple(sum(n_bytes for i, n_bytes in enumerate(sizes) if mask >> i & 1) for mask in sets)
        mask_of = {stage: sum(1 << components.index(c) for c in own[stage]) for stage in stages}
        return cls(components, mask_of, bytes_of, tuple(sorted(sets, key=lambda mask: -bytes_of[mask])))

    def most(self, ways: Mapping[str, Way], rooms: Sequence[tuple[Run, int]]) -> frozenset[str]:
        """The most bytes of whole components that fit everywhere: one that stays costs its bytes in every phase but
        its own, where it would be anyway."""
        streaming = (COMPONENTS[stage][0] for stage, way in ways.items() if not way.is_whole)
        streamed = sum(1 << self.components.index(component) for component in streaming)
        phases = [(~sum(self.mask_of[stage] for stage in run), left_bytes) for run, left_bytes in rooms]
        stays = next(
            mask
            for mask in self.masks
            if not mask & streamed and all(self.bytes_of[mask & others] <= left for others, left in phases)
        )
        return frozenset(component for i, component in enumerate(self.components) if stays >> i & 1)


def _subsets(items: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """All subsets, small ones first, always in the same order."""
    pool = tuple(items)
    return chain.from_iterable(combinations(pool, n) for n in range(len(pool) + 1))
