"""A turn on a checkpoint, priced: for each stage every way to run it, with its bytes on the device and across the bus.

A way is a chunk (how much is computed at once) and a holding (how much of the weights stays). Ways are priced one
stage at a time; what shares the device, and which way is taken, is `search`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..options import KVPrecision, Limits, SpeechDtype, SpeechMode
from .activations import Decoding
from .footprint import BlockSize, Footprint
from .placement import STREAM_SLOTS, evenly_spaced

COMPONENTS = {
    "conditioning": ("dit_conditioning",),
    "audio_tower": ("audio_tower",),
    "visual": ("visual",),
    "thinker": ("thinker", "lm_head"),
    "talker": ("talker",),
    "token2wav": ("dit", "bigvgan"),
}
"""The components that each stage computes with, stages in the order of a turn."""

STREAMABLE = ("audio_tower", "visual", "thinker", "talker", "dit")
"""Components of many blocks, each the first of its stage; the others are one block, and to stream them would save
nothing."""

ONCE = "conditioning"
"""The stage whose results serve all turns after it: its weights never stay, and it has a phase of its own, so that
nothing else is short of room for them."""

PREFILL_STAGES = ("thinker", "talker")
"""Stages that read the prompt, in chunks of the same size."""

SMALLEST_PREFILL_TOKENS = 128
"""128 tokens of a 7B are 18 MiB: little is left to gain beneath."""

SMALLEST_VISION_PATCHES = 512
"""512 patches of a 7B are 23 MiB."""

TALKER_FRAME_TOKENS = 2
"""The talker reads two rows between the prompt and the first code: the voice's beginning and the first reply row."""

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Turn:
    """The work of one turn, as far as memory cares.

    `grids` are (times, height, width) of each image and video, in patches of 14 x 14 pixels before merging; a video's
    times are its temporal patches, pairs of frames. `text_tokens` and `codes` are the most that may be written; 0 codes
    is a turn without speech. `kv` is how the caches of thinker and talker store a number.

    How speech is decoded (unless said otherwise: exactly, in chunks of 0.96 s, on ten Euler points): the codes of a
    chunk and those that a chunk is solved with and that will be solved again, the codes that sound waits for, and the
    dtype of the DiT's layers. `voice_frames` (10 ms each) are the most that a voice's sample has; of one that
    `is_conditioned` all that the DiT needs is there from an earlier turn.
    """

    prompt_tokens: int
    text_tokens: int
    codes: int = 0
    grids: tuple[Grid, ...] = ()
    audio_windows: int = 0
    speech_chunk_codes: int = 48
    ode_evaluations: int = 9
    speech_mode: SpeechMode = "exact"
    speech_ahead_codes: int = 0
    first_sound_codes: int = 144
    speech_dtype: SpeechDtype = "float32"
    voice_frames: int = 1000
    is_conditioned: bool = False
    kv: KVPrecision = "16bit"

    def __post_init__(self) -> None:
        assert self.prompt_tokens >= 1 and self.text_tokens >= 1 and self.codes >= 0, self
        assert all(min(grid) >= 1 for grid in self.grids) and self.audio_windows >= 0, self

    @property
    def decoding(self) -> Decoding:
        """How its speech is decoded."""
        return Decoding(
            self.speech_mode, self.ode_evaluations, self.speech_chunk_codes, self.speech_ahead_codes, self.speech_dtype
        )

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages this turn needs, in order."""
        needed = {
            "conditioning": self.codes > 0 and not self.is_conditioned,
            "audio_tower": self.audio_windows > 0,
            "visual": len(self.grids) > 0,
            "thinker": True,
            "talker": self.codes > 0,
            "token2wav": self.codes > 0,
        }
        return tuple(stage for stage in COMPONENTS if needed[stage])

    def patches_at_once(self, chunk_patches: int) -> int:
        """The most patches in one run of the vision tower: whole temporal patches of one visual, at least one."""
        return max(min(_times_per_run(chunk_patches, grid), grid[0]) * grid[1] * grid[2] for grid in self.grids)

    def vision_runs(self, chunk_patches: int) -> int:
        """How often the vision tower is walked."""
        return sum(-(-grid[0] // _times_per_run(chunk_patches, grid)) for grid in self.grids)


def _times_per_run(chunk_patches: int, grid: Grid) -> int:
    return max(1, chunk_patches // (grid[1] * grid[2]))


@dataclass(frozen=True)
class Holding:
    """How much of a component stays for its phase: all of it, or `kept_layers` layers and the rest, beside slots.

    `held_bytes` are on the device at once; `streamed_bytes` cross the bus at every pass.
    """

    kept_layers: int
    streamed_layers: int
    held_bytes: int
    streamed_bytes: int

    @property
    def is_whole(self) -> bool:
        return self.streamed_layers == 0


@dataclass(frozen=True)
class Way:
    """One way to run a stage. `base_bytes` are weights and KV cache; beside them a phase needs room for its widest
    activation. `repeated_bytes` is what crosses the bus beyond once."""

    stage: str
    chunk: int
    passes: int
    holdings: tuple[Holding, ...]
    held_bytes: int
    kv_bytes: int
    activation_bytes: int

    @property
    def base_bytes(self) -> int:
        return self.held_bytes + self.kv_bytes

    @property
    def repeated_bytes(self) -> int:
        return (self.passes - 1) * sum(holding.streamed_bytes for holding in self.holdings)

    @property
    def is_whole(self) -> bool:
        return all(holding.is_whole for holding in self.holdings)


@dataclass(frozen=True)
class Prices:
    """What a turn's stages cost on a checkpoint.

    Those that have `begun` keep what they remember on the device while any of them is at it; their KV caches wait on
    the host for a phase of theirs, which on a CPU is where they are.
    """

    footprint: Footprint
    limits: Limits
    turn: Turn
    begun: frozenset[str] = frozenset()
    host_is_device: bool = False

    def ways(self, stage: str, prefill_tokens: int) -> list[Way]:
        """All ways to run a stage, least repeated first, then the largest chunk, then the most held."""
        components = COMPONENTS[stage]
        chunks = (prefill_tokens,) if stage in PREFILL_STAGES else self.chunks(stage)
        kv_bytes = self.kv_bytes(stage)
        found = [
            Way(
                stage,
                chunk,
                passes,
                (holding, *(whole_holding(self.footprint.components[c]) for c in components[1:])),
                holding.held_bytes + sum(self.footprint.device_bytes(c) for c in components[1:]),
                kv_bytes,
                activation_bytes,
            )
            for chunk in chunks
            for passes, activation_bytes in [(self.passes(stage, chunk), self.activation_bytes(stage, chunk))]
            for holding in self._holdings(components[0], passes)
        ]
        return sorted(found, key=lambda way: (way.repeated_bytes, not way.is_whole, -way.chunk))

    def chunks(self, stage: str) -> tuple[int, ...]:
        """Chunk sizes worth trying, the one asked for first; those beneath it compute less at once each."""
        turn, limits = self.turn, self.limits
        match stage:
            case "audio_tower":
                return _halvings(limits.audio_chunk_windows, 1, turn.audio_windows)
            case "visual":
                at_most = turn.patches_at_once(limits.vision_chunk_patches)
                return _halvings(limits.vision_chunk_patches, SMALLEST_VISION_PATCHES, at_most)
            case "thinker" | "talker":
                return _halvings(limits.prefill_chunk_tokens, SMALLEST_PREFILL_TOKENS, turn.prompt_tokens)
            case "token2wav":
                return (turn.speech_chunk_codes,)
            case _:
                return (1,)

    def passes(self, stage: str, chunk: int) -> int:
        """How often a turn walks the stage's layers, at most; all its sound counts as one recording."""
        turn = self.turn
        match stage:
            case "audio_tower":
                return -(-turn.audio_windows // chunk)
            case "visual":
                return turn.vision_runs(chunk)
            case "thinker":
                return -(-turn.prompt_tokens // chunk) + turn.text_tokens
            case "talker":
                return -(-turn.prompt_tokens // chunk) + turn.codes
            case "token2wav":
                return turn.decoding.walks(turn.codes)
            case _:
                return 1

    def kv_bytes(self, stage: str) -> int:
        """The caches are allocated whole."""
        shape = {"thinker": self.footprint.thinker, "talker": self.footprint.talker}.get(stage)
        if shape is None:
            return 0
        return self.cache_tokens(stage) * shape.kv_bytes_per_token(self.footprint.width_bytes, self.turn.kv)

    def cache_tokens(self, stage: str) -> int:
        """Positions of the thinker's or the talker's cache: the prompt and the longest answer allowed."""
        turn = self.turn
        return turn.prompt_tokens + (turn.text_tokens if stage == "thinker" else TALKER_FRAME_TOKENS + turn.codes)

    def activation_bytes(self, stage: str, chunk: int) -> int:
        """What a stage computes with at its widest point; stages of a phase take turns."""
        turn, footprint = self.turn, self.footprint
        width_bytes, prefill_tokens = footprint.width_bytes, min(chunk, turn.prompt_tokens)
        match stage:
            case "audio_tower":
                return footprint.audio.activation_bytes(min(chunk, turn.audio_windows), width_bytes)
            case "visual":
                return footprint.visual.activation_bytes(turn.patches_at_once(chunk), chunk, width_bytes)
            case "thinker" | "talker":
                shape = footprint.thinker if stage == "thinker" else footprint.talker
                assert shape
                positions = turn.prompt_tokens, self.cache_tokens(stage)
                return shape.activation_bytes(prefill_tokens, width_bytes, turn.kv, *positions)
            case "conditioning":
                assert footprint.sound
                return footprint.sound.conditioning_bytes(turn.voice_frames, turn.ode_evaluations)
            case _:
                assert footprint.sound
                return footprint.sound.activation_bytes(turn.decoding)

    def waiting_kv_bytes(self, stages: Iterable[str]) -> int:
        """KV caches that wait while these stages share the device."""
        return sum(map(self.kv_bytes, self._waiting(stages)))

    def kept_kv_bytes(self, stages: Iterable[str]) -> int:
        """Of those that wait, what is on the device all the same."""
        return self.waiting_kv_bytes(stages) if self.host_is_device else 0

    def state_bytes(self, stages: Iterable[str]) -> int:
        """What is kept between steps while these stages share the device, whichever of them is computing: by them, and
        by those that wait."""
        footprint, storing = self.footprint, (self.footprint.width_bytes, self.turn.kv)
        kept = {"thinker": footprint.thinker.state_bytes(*storing)}
        if footprint.talker and footprint.sound:
            kept["talker"] = footprint.talker.state_bytes(*storing)
            kept["token2wav"] = footprint.sound.state_bytes(self.turn.decoding)
        return sum(kept.get(stage, 0) for stage in self._waiting(stages).union(stages))

    def _waiting(self, stages: Iterable[str]) -> frozenset[str]:
        """Those that have begun and are not at it while these share the device. When it is the turn of stages of which
        none has begun, all that had are over."""
        return frozenset() if self.begun.isdisjoint(stages) else self.begun.difference(stages)

    def _holdings(self, component: str, passes: int) -> Sequence[Holding]:
        if component not in STREAMABLE:
            return (whole_holding(self.footprint.components[component]),)
        holdings = holdings_of(self.footprint.components[component])
        # Of what is read once nothing crosses the bus again: between all and least there is nothing to choose.
        return holdings if passes > 1 or len(holdings) == 1 else (holdings[0], holdings[-1])


def whole_holding(blocks: Sequence[BlockSize]) -> Holding:
    return Holding(len(blocks) - 1, 0, sum(block.device_bytes for block in blocks), 0)


@lru_cache(maxsize=32)
def holdings_of(blocks: tuple[BlockSize, ...]) -> tuple[Holding, ...]:
    """The ways to hold a component (its layers and, last, the rest) that are worth considering: all of it first, and
    each further one streams more because it holds less."""
    layers = len(blocks) - 1
    partial = (_holding(blocks, evenly_spaced(layers, kept)) for kept in range(layers))
    worthwhile = [whole_holding(blocks)]
    for holding in sorted(partial, key=lambda holding: (holding.streamed_bytes, holding.held_bytes)):
        if holding.held_bytes < worthwhile[-1].held_bytes:
            worthwhile.append(holding)
    return tuple(worthwhile)


def _holding(blocks: Sequence[BlockSize], kept: frozenset[int]) -> Holding:
    *layers, rest = blocks
    streamed = [layer for i, layer in enumerate(layers) if i not in kept]
    slots_bytes = STREAM_SLOTS * max(layer.device_bytes for layer in streamed)
    kept_bytes = sum(layer.device_bytes for i, layer in enumerate(layers) if i in kept)
    held_bytes = kept_bytes + rest.device_bytes + slots_bytes
    return Holding(len(kept), len(streamed), held_bytes, sum(layer.n_bytes for layer in streamed))


def _halvings(asked: int, smallest: int, at_most: int) -> tuple[int, ...]:
    """`asked`, and its halvings down to `smallest`, but for those that `at_most`, all there is to do, makes alike."""
    sizes = [asked]
    while (half := sizes[-1] // 2) >= smallest:
        sizes.append(half)
    return (asked, *(size for size in sizes[1:] if size < at_most))
