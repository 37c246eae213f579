"""A plan and a card to what to expect of them: seconds to the first word and sound, and rates after that.

A roofline and nothing more: bytes read from the card's memory, bytes moved over the bus, and arithmetic, each at a
stated share of what the card's specification promises; whichever takes longest counts. Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .activations import DIT_LAYER_WIDTH_BYTES, DecoderShape
from .cards import Card
from .footprint import BlockSize, Footprint
from .placement import HostTier, Phase, Placement, Plan, evenly_spaced
from .prices import COMPONENTS, Turn

CODES_PER_SECOND = 50

MEMORY_SHARE = 0.6
"""Of the memory's nominal rate: kernels for one token at a time publish 50 to 80 %."""

COMPUTE_SHARE = 0.4
"""Of the peak in arithmetic: matrices of a chunk's height, with unpacking, reach about so much."""

PCIE_SHARE = {HostTier.PINNED: 0.8, HostTier.PAGEABLE: 0.4}
"""Of the bus's nominal rate: page-locked memory is copied directly, other memory through the driver's buffer."""

FILE_BYTES_PER_S = 5e9
"""A good NVMe drive, or the page cache through one thread."""

LAYER_LAUNCH_S = 0.25e-3
"""What Python and kernel launches take per layer and step, whatever the card: 7B models without captured graphs stop
at about 8 ms per token for 32 layers, on a fast processor."""


@dataclass(frozen=True)
class Expectations:
    """Expected, not measured. Without speech its figures are None. `first_sound_s` counts the longest answer allowed
    wherever the plan makes speech wait for all of it. `real_time_factor` is seconds of work per second of sound, once
    the text is written. `load_s` is what a turn spends on moving weights in once."""

    card: str
    ttft_s: float
    first_sound_s: float | None
    text_tokens_per_s: float
    codec_tokens_per_s: float | None
    real_time_factor: float | None
    load_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`, under names that say what kind of figures they are."""
        return {"kind": "expected", **asdict(self)}

    def __str__(self) -> str:
        lines = [
            f"expected on {self.card}, computed from its specification and not measured:",
            f"first word after {self.ttft_s:.1f} s, then {self.text_tokens_per_s:.1f} tokens/s;"
            f" {self.load_s:.1f} s of a turn load weights",
        ]
        if self.first_sound_s is not None:
            lines.append(
                f"first sound after {self.first_sound_s:.1f} s at the latest, {self.codec_tokens_per_s:.1f} codes/s,"
                f" {self.real_time_factor:.2f} s of work per second of speech"
            )
        return "\n".join(lines)


def expect(plan: Plan, footprint: Footprint, turn: Turn, card: Card) -> Expectations:
    """What a whole plan for `turn`, made from `footprint`, should do on `card`, resident weights already in place."""
    work = _Work(plan, footprint.speaking_in(turn.speech_dtype), turn, card)
    loads_s = [work.load_s(phase) for phase in plan.phases]
    thinking = work.phase_index("thinker")
    ttft_s = sum(loads_s[: thinking + 1]) + work.encoding_s() + work.prefill_s("thinker") + work.step_s("thinker")
    codec_step_s = work.step_s("talker") if turn.codes else None
    return Expectations(
        card=card.name,
        ttft_s=ttft_s,
        first_sound_s=ttft_s + work.silence_s(loads_s) if turn.codes else None,
        text_tokens_per_s=1 / work.step_s("thinker"),
        codec_tokens_per_s=1 / codec_step_s if codec_step_s else None,
        real_time_factor=work.real_time_factor() if turn.codes else None,
        load_s=sum(loads_s),
    )


@dataclass(frozen=True)
class _Work:
    """The parts of a turn in seconds."""

    plan: Plan
    footprint: Footprint
    turn: Turn
    card: Card

    def phase_index(self, stage: str) -> int:
        return next(i for i, phase in enumerate(self.plan.phases) if stage in phase.stages)

    def load_s(self, phase: Phase) -> float:
        """Moving in what stays for a phase and was not there."""
        own = [c for stage in phase.stages for c in COMPONENTS[stage] if phase.placements[c] is not Placement.RESIDENT]
        return sum(self._move_s(block) for c in own for block, streamed in self._blocks(phase, c) if not streamed)

    def encoding_s(self) -> float:
        """Hearing and seeing: two operations per weight for each position."""
        turn, footprint = self.turn, self.footprint
        positions = {
            "audio_tower": turn.audio_windows * footprint.audio.window_frames // 2,
            "visual": sum(times * height * width for times, height, width in turn.grids),
        }
        weights = {stage: footprint.component_bytes(stage) / footprint.width_bytes for stage in positions}
        return sum(
            self._passes_s(stage, self._passes(stage), 2 * weights[stage] * positions[stage])
            for stage in positions
            if stage in turn.stages
        )

    def prefill_s(self, stage: str) -> float:
        """Reading the prompt."""
        flops = _prefill_flops(self._shape(stage), self.turn.prompt_tokens)
        return self._passes_s(stage, -(-self.turn.prompt_tokens // self.plan.prefill_chunk_tokens), flops)

    def step_s(self, stage: str) -> float:
        """One token or code, halfway through the longest answer: all weights and what the cache then holds are read."""
        turn, shape = self.turn, self._shape(stage)
        tokens = turn.prompt_tokens + (turn.text_tokens if stage == "thinker" else turn.codes) // 2
        kv_bytes = tokens * shape.kv_bytes_per_token(self.footprint.width_bytes, turn.kv)
        weights_bytes = sum(self.footprint.component_bytes(component) for component in COMPONENTS[stage])
        return max(self._read_s(weights_bytes + kv_bytes), shape.layers * LAYER_LAUNCH_S, self._stream_s(stage))

    def sound_s(self, codes: int) -> float:
        """So many codes through the DiT, guided, at every evaluation, and through the vocoder."""
        sound, evaluations = self.footprint.sound, self.turn.ode_evaluations
        assert sound
        frames = codes * sound.repeats
        layer_flops = 2 * (4 * sound.hidden**2 + 2 * sound.hidden * sound.ff)
        dit_flops = evaluations * 2 * frames * sound.layers * layer_flops * self._work_per_code()
        chunks = max(1.0, codes / self.turn.speech_chunk_codes)
        moves = chunks * (1 if self.turn.speech_mode == "offload" else evaluations)
        dit_s = max(
            self._speech_s(dit_flops),
            self._read_s(chunks * evaluations * self.footprint.component_bytes("dit")),
            chunks * evaluations * sound.layers * LAYER_LAUNCH_S,
            moves * self._stream_s("token2wav"),
        )
        return dit_s + self._float32_s(frames * sound.vocoder_flops_per_frame)

    def _work_per_code(self) -> float:
        """How often a frame is solved: what a chunk sees ahead of itself is solved again with the next one."""
        chunk, ahead = self.turn.speech_chunk_codes, self.turn.speech_ahead_codes
        return (chunk + ahead) / chunk

    def silence_s(self, loads_s: list[float]) -> float:
        """From the first word to the first sound. Across a cut all text, or all codes, come before what follows."""
        turn, thinking = self.turn, self.phase_index("thinker")
        codes = min(turn.first_sound_codes, turn.codes)
        text = min(codes, turn.text_tokens) if self._share("thinker", "talker") else turn.text_tokens
        drained_codes = codes if self._share("talker", "token2wav") else turn.codes
        speaking_s = text * self.step_s("thinker") + drained_codes * self.step_s("talker")
        return sum(loads_s[thinking + 1 :]) + self.prefill_s("talker") + speaking_s + self.sound_s(codes)

    def real_time_factor(self) -> float:
        chunk = self.turn.speech_chunk_codes
        return CODES_PER_SECOND * (self.step_s("talker") + self.sound_s(chunk) / chunk)

    def _share(self, stage: str, other: str) -> bool:
        return self.phase_index(stage) == self.phase_index(other)

    def _shape(self, stage: str) -> DecoderShape:
        shape = self.footprint.thinker if stage == "thinker" else self.footprint.talker
        assert shape
        return shape

    def _passes(self, stage: str) -> int:
        """How often an encoder's layers are walked."""
        plan = self.plan
        chunk = plan.audio_chunk_windows if stage == "audio_tower" else plan.vision_chunk_patches
        return -(-self.turn.audio_windows // chunk) if stage == "audio_tower" else self.turn.vision_runs(chunk)

    def _passes_s(self, stage: str, passes: int, flops: float) -> float:
        """Passes over a stage's layers: arithmetic, reading its weights, or streaming them, whichever is slowest."""
        read_s = self._read_s(self.footprint.component_bytes(stage))
        return max(self._compute_s(flops), passes * read_s, passes * self._stream_s(stage))

    def _stream_s(self, stage: str) -> float:
        """Moving a stage's streamed layers once."""
        phase = self.plan.phases[self.phase_index(stage)]
        return sum(self._move_s(block) for block, streamed in self._blocks(phase, COMPONENTS[stage][0]) if streamed)

    def _blocks(self, phase: Phase, component: str) -> Iterator[tuple[BlockSize, bool]]:
        """A component's blocks, and whether each is streamed."""
        blocks = self.footprint.components[component]
        streams = phase.placements[component] is Placement.STREAMED
        kept = evenly_spaced(len(blocks) - 1, phase.kept_layers.get(component, 0))
        for index, block in enumerate(blocks):
            yield block, streams and index < len(blocks) - 1 and index not in kept

    def _move_s(self, block: BlockSize) -> float:
        tier, bus_bytes_per_s = self.plan.host_tiers.get(block.name, HostTier.FILE), self.card.pcie_gb_per_s * 1e9
        if tier is HostTier.FILE:
            return block.n_bytes / min(FILE_BYTES_PER_S, bus_bytes_per_s * PCIE_SHARE[HostTier.PINNED])
        return block.n_bytes / (bus_bytes_per_s * PCIE_SHARE[tier])

    def _read_s(self, n_bytes: float) -> float:
        return n_bytes / (self.card.memory_gb_per_s * 1e9 * MEMORY_SHARE)

    def _compute_s(self, flops: float) -> float:
        """In the compute dtype."""
        tflops = self.card.float16_tflops if self.footprint.width_bytes == 2 else self.card.float32_tflops
        return flops / (tflops * 1e12 * COMPUTE_SHARE)

    def _speech_s(self, flops: float) -> float:
        """In the dtype of the DiT's layers."""
        is_half = DIT_LAYER_WIDTH_BYTES[self.turn.speech_dtype] == 2
        return flops / ((self.card.float16_tflops if is_half else self.card.float32_tflops) * 1e12 * COMPUTE_SHARE)

    def _float32_s(self, flops: float) -> float:
        return flops / (self.card.float32_tflops * 1e12 * COMPUTE_SHARE)


def _prefill_flops(shape: DecoderShape, tokens: int) -> int:
    """Two operations per weight and token: queries and output (2h x heads x d), keys and values (2h x KV heads x d),
    MLP (3hi); and scores and sums over half of the square of the prompt (4 x heads x d)."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = shape.hidden * (2 * queries + 2 * keys + 3 * shape.intermediate)
    return shape.layers * (2 * tokens * weights + 4 * queries * tokens**2 // 2)
