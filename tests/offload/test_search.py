"""The search against every way there is, on small checkpoints of any shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.errors import InfeasibleBudgetError
from lowvram.offload.activations import AudioShape, DecoderShape, SoundShape, VisionShape
from lowvram.offload.budget import Budget
from lowvram.offload.footprint import BlockSize, Footprint
from lowvram.offload.plan import (
    COMPONENTS,
    STREAM_SLOTS,
    Placement,
    Plan,
    Turn,
    evenly_spaced,
    plan_memory,
    smallest_budget_bytes,
)
from lowvram.options import Limits

LIMITS = Limits(prefill_chunk_tokens=256, vision_chunk_patches=1024, audio_chunk_windows=2)
TENTH = 100_000
"""A tenth of a megabyte, in which the sizes below are counted."""

LAYERED = ("audio_tower", "visual", "thinker", "talker", "dit")
ONCE = "conditioning"
"""The stage that shares the device with no other, and whose weights never stay."""


def blocks(component: str, sizes: Sequence[int]) -> tuple[BlockSize, ...]:
    names = [*range(len(sizes) - 1), "rest"] if component in LAYERED else [component]
    return tuple(BlockSize(f"{component}.{name}", size) for name, size in zip(names, sizes, strict=True))


@st.composite
def footprints(draw: st.DrawFn) -> Footprint:
    """Checkpoints of up to five layers a stack, none of which need be alike; even of one layer, or of none. The
    DiT has three or none, or every way there is would take too long."""
    size = st.integers(1, 50).map(lambda n: n * TENTH)
    one, few = size.map(lambda n: [n]), st.lists(size, min_size=4, max_size=4)
    few_or_many = st.one_of(st.lists(size, min_size=1, max_size=5), st.lists(size, min_size=5, max_size=5))
    stacks = dict.fromkeys(LAYERED, few_or_many) | {"dit": st.one_of(one, few)}
    components = {
        component: blocks(component, draw(stacks.get(component, one)))
        for stage in COMPONENTS.values()
        for component in stage
    }
    return small_checkpoint(components)


def small_checkpoint(components: dict[str, tuple[BlockSize, ...]]) -> Footprint:
    decoder = DecoderShape(2, 64, 256, heads=4, kv_heads=2, head_dim=16, input_size=64, vocab=100)
    return Footprint(
        components=components,
        host_bytes=0,
        width_bytes=2,
        thinker=decoder,
        visual=VisionShape(hidden=32, intermediate=64, head_dim=8, patch_elements=1176),
        audio=AudioShape(hidden=32, ffn=64, mel_bins=128, window_frames=200),
        talker=decoder,
        sound=SoundShape(
            hidden=32,
            ff=64,
            layers=2,
            heads=2,
            block_frames=24,
            back_layers=1,
            ahead_layers=1,
            repeats=2,
            speaker_elements_per_frame=20,
            vocoder_elements_per_frame=64,
        ),
    )


turns = st.builds(
    lambda prompt, text, codes, times, windows, kv, is_conditioned: Turn(
        prompt,
        text,
        codes,
        ((times, 16, 16),) if times else (),
        windows,
        ode_evaluations=1,
        kv=kv,
        is_conditioned=is_conditioned,
    ),
    st.integers(1, 600),
    st.integers(1, 20),
    st.one_of(st.sampled_from([0, 1, 40]), st.integers(1, 20)),
    st.sampled_from([0, 1, 5]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from(["16bit", "int8"]),
    st.booleans(),
)
properties = settings(max_examples=60, deadline=None)


Pick = tuple[int, bool, int, int]
"""A way to run a stage: repeated bytes, whether all its weights stay, bytes held with the KV cache, activations."""


@dataclass(frozen=True)
class Progress:
    """How far a turn is: the stages that are over, and those that have begun and are not."""

    over: tuple[str, ...] = ()
    begun: tuple[str, ...] = ()


AT_THE_START = Progress()


@st.composite
def progresses(draw: st.DrawFn, turn: Turn) -> Progress:
    """Stages are over and begin in their order, but for a talker that may fall silent before the text ends."""
    over, begun = sorted(draw(st.tuples(*[st.integers(0, len(turn.stages) - 1)] * 2)))
    silent = ("talker",) if "talker" in turn.stages[over:begun] and draw(st.booleans()) else ()
    going_on = tuple(stage for stage in turn.stages[over:begun] if stage not in silent)
    return Progress(turn.stages[:over] + silent, going_on)


class Everything:
    """Every way to run a turn, or what is left of it, priced from what a plan means: slow, and easy to believe."""

    def __init__(self, footprint: Footprint, turn: Turn, so_far: Progress = AT_THE_START, device: str = "cpu") -> None:
        self.footprint, self.turn, self.begun = footprint, turn, so_far.begun
        self.stages = tuple(stage for stage in turn.stages if stage not in so_far.over)
        self.caches_wait_here = device == "cpu"

    def least_burden(self, budget_bytes: int) -> tuple[int, int, int, int] | None:
        """What a listener notices, at its best: repeated bytes, tokens and codes that wait, passes over the prompt,
        bytes moved once. None if nothing fits."""
        best = None
        for prefill in (256, 128):
            offers = [[p for p in self.picks(stage, prefill) if p[2] + p[3] <= budget_bytes] for stage in self.stages]
            for picks in product(*offers):
                for cut in self.cuts():
                    ends = [run[-1] for run in cut[:-1]]
                    waiting = self.turn.text_tokens * ("thinker" in ends) + self.turn.codes * ("talker" in ends)
                    noticed = sum(pick[0] for pick in picks), waiting, -(-self.turn.prompt_tokens // prefill)
                    if best is None or noticed <= best[:3]:
                        once = self.moved_once(cut, dict(zip(self.stages, picks, strict=True)), budget_bytes)
                        best = best if once is None else min(best or (*noticed, once), (*noticed, once))
        return best

    def cuts(self) -> Iterator[tuple[tuple[str, ...], ...]]:
        for n in range(len(self.stages)):
            for chosen in combinations(range(1, len(self.stages)), n):
                bounds = (0, *chosen, len(self.stages))
                cut = tuple(self.stages[a:b] for a, b in pairwise(bounds))
                if ONCE not in self.stages or cut[0] == (ONCE,):
                    yield cut

    def picks(self, stage: str, prefill: int) -> list[Pick]:
        chunks = {"audio_tower": (2, 1), "visual": (1024, 512)}.get(stage, (prefill,))
        layers = len(self.footprint.components[COMPONENTS[stage][0]]) - 1
        return [self.pick(stage, chunk, kept) for chunk in chunks for kept in range(layers + 1)]

    def pick(self, stage: str, chunk: int, kept: int) -> Pick:
        sizes = [[block.n_bytes for block in self.footprint.components[c]] for c in COMPONENTS[stage]]
        layers, stays = sizes[0][:-1], evenly_spaced(len(sizes[0]) - 1, kept)
        streamed = [n_bytes for i, n_bytes in enumerate(layers) if i not in stays]
        slots_bytes = min(STREAM_SLOTS, len(streamed)) * max(streamed, default=0)
        held_bytes = sum(map(sum, sizes)) - sum(streamed) + slots_bytes
        passes, activation_bytes, kv_bytes = self.work(stage, chunk)
        return (passes - 1) * sum(streamed), not streamed, held_bytes + kv_bytes, activation_bytes

    def work(self, stage: str, chunk: int) -> tuple[int, int, int]:
        """Passes, activations and KV cache of a stage."""
        turn, checkpoint = self.turn, self.footprint
        assert checkpoint.sound
        rows, read = -(-turn.prompt_tokens // chunk), min(chunk, turn.prompt_tokens)
        per_token = checkpoint.thinker.kv_bytes_per_token(2, turn.kv)
        match stage:
            case "conditioning":
                return 1, checkpoint.sound.conditioning_bytes(turn.voice_frames, turn.ode_evaluations), 0
            case "audio_tower":
                heard = checkpoint.audio.activation_bytes(min(chunk, turn.audio_windows), 2)
                return -(-turn.audio_windows // chunk), heard, 0
            case "visual":
                ((times, *_),) = turn.grids
                seen = checkpoint.visual.activation_bytes(min(chunk, 256 * times), chunk, 2)
                return -(-times // (chunk // 256)), seen, 0
            case "token2wav":
                return turn.codes // 48 + 2, checkpoint.sound.activation_bytes(turn.decoding), 0
        steps, framing = (turn.text_tokens, 0) if stage == "thinker" else (turn.codes, 2)
        positions = turn.prompt_tokens + framing + steps
        prefilling = checkpoint.thinker.activation_bytes(read, 2, turn.kv, turn.prompt_tokens, positions)
        return rows + steps, prefilling, positions * per_token

    def moved_once(self, cut: tuple[tuple[str, ...], ...], picks: dict[str, Pick], budget_bytes: int) -> int | None:
        """With the best choice of components that stay for good; None if not even none of them fits."""
        assert self.footprint.sound
        size = {c: self.footprint.component_bytes(c) for stage in self.stages for c in COMPONENTS[stage]}
        streamed = [COMPONENTS[stage][0] for stage, pick in picks.items() if not pick[1]]
        stayable = [c for c in size if c not in (*streamed, "dit_conditioning")]
        rooms = []
        sound_bytes = self.footprint.sound.state_bytes(self.turn.decoding)
        decoder_bytes = 5 * 100 + 64 * 2 + (4 * 16**2 if self.turn.kv == "int8" else 0)
        for run in cut:
            kept = {"thinker": decoder_bytes, "talker": decoder_bytes, "token2wav": sound_bytes}
            waiting = set(self.begun).difference(run) if set(self.begun).intersection(run) else set()
            state_bytes = sum(kept.get(stage, 0) for stage in waiting.union(run))
            if self.caches_wait_here:
                state_bytes += sum(self.work(stage, 1024)[2] for stage in waiting)
            need = sum(picks[s][2] for s in run) + max(picks[s][3] for s in run) + state_bytes
            rooms.append(({c for stage in run for c in COMPONENTS[stage]}, budget_bytes - need))
        if any(room < 0 for _, room in rooms):
            return None
        staying = [
            sum(size[c] for c in chosen)
            for n in range(len(stayable) + 1)
            for chosen in combinations(stayable, n)
            if all(sum(size[c] for c in chosen if c not in own) <= room for own, room in rooms)
        ]
        return sum(size.values()) - max(staying)


def burden(plan: Plan, footprint: Footprint) -> tuple[int, int, int, int]:
    """The same, read from a plan."""
    own = [(phase, c) for phase in plan.phases for stage in phase.stages for c in COMPONENTS[stage]]
    once = sum(footprint.component_bytes(c) for phase, c in own if phase.placements[c] is not Placement.RESIDENT)
    ends = [phase.stages[-1] for phase in plan.phases[:-1]]
    waiting = plan.text_tokens * ("thinker" in ends) + plan.codes * ("talker" in ends)
    return plan.traffic_bytes - once, waiting, -(-plan.prompt_tokens // plan.prefill_chunk_tokens), once


@properties
@given(footprint=footprints(), turn=turns, share=st.floats(0, 0.6))
def test_no_way_to_run_a_turn_is_better_than_the_plan(footprint: Footprint, turn: Turn, share: float):
    smallest, all_bytes = least_bytes(footprint, turn), planned(footprint, turn, None).peak_bytes
    budget_bytes = smallest + int(share * (all_bytes - smallest))
    plan = planned(footprint, turn, budget_bytes)
    assert burden(plan, footprint) == Everything(footprint, turn).least_burden(budget_bytes)
    assert plan.peak_bytes <= budget_bytes


@properties
@given(footprint=footprints(), turn=turns)
def test_what_no_way_fits_is_refused_and_nothing_else(footprint: Footprint, turn: Turn):
    smallest = least_bytes(footprint, turn)
    assert planned(footprint, turn, smallest).peak_bytes <= smallest
    assert Everything(footprint, turn).least_burden(smallest - 1) is None
    with pytest.raises(InfeasibleBudgetError):
        planned(footprint, turn, smallest - 1)


@properties
@given(footprint=footprints(), turn=turns, more=st.lists(st.integers(0, 3_000_000), min_size=4, max_size=8))
def test_more_budget_is_never_worse(footprint: Footprint, turn: Turn, more: list[int]):
    smallest = least_bytes(footprint, turn)
    burdens = [burden(planned(footprint, turn, smallest + n), footprint) for n in sorted(more)]
    assert burdens == sorted(burdens, reverse=True)


@properties
@given(
    footprint=footprints(), turn=turns, share=st.floats(0, 0.6), device=st.sampled_from(["cpu", "cuda"]), data=st.data()
)
def test_no_way_to_run_what_is_left_of_a_turn_is_better_than_its_plan(
    footprint: Footprint, turn: Turn, share: float, device: str, data: st.DataObject
):
    so_far = data.draw(progresses(turn))
    smallest = least_bytes_for_the_rest(footprint, turn, so_far, device)
    all_bytes = planned(footprint, turn, None, so_far, device).peak_bytes
    budget_bytes = smallest + int(share * (all_bytes - smallest))
    plan, every = planned(footprint, turn, budget_bytes, so_far, device), Everything(footprint, turn, so_far, device)
    assert burden(plan, footprint) == every.least_burden(budget_bytes - plan.reserve_bytes)
    assert plan.peak_bytes <= budget_bytes
    assert every.least_burden(smallest - 1 - plan.reserve_bytes) is None


@properties
@given(footprint=footprints(), turn=turns, more=st.lists(st.integers(0, 3_000_000), min_size=4), data=st.data())
def test_more_budget_is_never_worse_for_what_is_left_of_a_turn(
    footprint: Footprint, turn: Turn, more: list[int], data: st.DataObject
):
    so_far = data.draw(progresses(turn))
    smallest = least_bytes_for_the_rest(footprint, turn, so_far, "cuda")
    plans = [planned(footprint, turn, smallest + n, so_far, "cuda") for n in sorted(more)]
    burdens = [burden(plan, footprint) for plan in plans]
    assert burdens == sorted(burdens, reverse=True)


def least_bytes(footprint: Footprint, turn: Turn) -> int:
    return smallest_budget_bytes(footprint, LIMITS, turn, device="cpu")


def least_bytes_for_the_rest(footprint: Footprint, turn: Turn, so_far: Progress, device: str) -> int:
    with pytest.raises(InfeasibleBudgetError) as refused:
        planned(footprint, turn, 1, so_far, device)
    return refused.value.needed_bytes


def planned(
    footprint: Footprint,
    turn: Turn,
    budget_bytes: int | None,
    so_far: Progress = AT_THE_START,
    device: str = "cpu",
) -> Plan:
    budget = Budget(budget_bytes)
    return plan_memory(footprint, budget, LIMITS, turn, device=device, over=frozenset(so_far.over), begun=so_far.begun)
