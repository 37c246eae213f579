"""A component's shape -> the bytes that its stage computes with: KV cache, activations, and what stays between steps.

Derived from the code that will run, tensor by tensor at its widest point; each formula stands in the docstring of the
method that computes it. Shapes below: h hidden, i intermediate, d head size, w bytes per element of the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..options import KVPrecision, SpeechDtype, SpeechMode

TOKEN2WAV_WIDTH_BYTES = 4
"""token2wav computes in float32, as the reference does."""

DIT_LAYER_WIDTH_BYTES: dict[SpeechDtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""But for the DiT's layers, if so asked."""

KV_SCALE_BYTES = 4
"""Of the float32 scale that an int8 cache keeps for each token's key and value, by KV head."""

KV_SLICE_TOKENS = 2048
"""Positions of an int8 cache that are read back at once."""

UNPACKED_WEIGHTS = 2**22
"""Of a packed linear, dequantized at once by the reference backend, which serves on every device; no other one's slice
takes more."""

_VOICE_BYTES = 4096
"""Room for what conditioning leaves of a voice beside the modulations: two branches of 128 + 192 numbers."""

_NOISE_AND_TURN = 80 + 64
"""Elements that a waiting mel frame has beside its code row: noise for 80 mel bins, a rotary table for heads of 64."""


def unpacking_bytes(weights: int, in_features: int, rows: int, width_bytes: int) -> int:
    """What a slice of a packed linear takes at its widest: each of its `weights` as a byte, in float32 and, where w is
    narrower, in w, beside a zero point for every 32 of them or more; or then its product with `rows`, as it came and in
    the order of the outputs."""
    weight_bytes = 1 + 4 + (width_bytes if width_bytes < 4 else 0)
    products_bytes = 2 * rows * (weights // in_features) * width_bytes
    return max(weights * weight_bytes + weights // 32, products_bytes)


@dataclass(frozen=True)
class DecoderShape:
    """A decoder stack (thinker or talker). `input_size` is the width of the rows it is given, `vocab` of its logits;
    `unpacked_weights` of a linear are dequantized at once (0: none is packed)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    input_size: int
    vocab: int
    unpacked_weights: int = 0

    def kv_bytes_per_token(self, width_bytes: int, kv: KVPrecision = "16bit") -> int:
        """Keys and values of every layer: 2 x layers x KV heads x (d x w), in int8 (d + 4). 7B thinker: 56 KiB in 16
        bits, 28.9 KiB in int8."""
        head_bytes = self.head_dim * width_bytes if kv == "16bit" else self.head_dim + KV_SCALE_BYTES
        return 2 * self.layers * self.kv_heads * head_bytes

    def activation_bytes(
        self,
        chunk_tokens: int,
        width_bytes: int,
        kv: KVPrecision = "16bit",
        prompt_tokens: int = KV_SLICE_TOKENS,
        cache_tokens: int = KV_SLICE_TOKENS,
    ) -> int:
        """The widest of three: prefill of a chunk, a decode step (a chunk of one), and drawing from its logits.

        Per token, all the time: the layer's input (h), cosine and sine (2d), three int64 positions. Beside them the
        widest of some points. The rows as they came, where they are projected (`input_size`). MLP: the sum with the
        attention and its norm (2h), the gate's activation, the up projection and their product (3i). Attention: the
        norm (h), queries, their copy as rows and two partial results (4 x heads x d), keys and values (2 x KV heads x
        d), and the float32 copies that merge the results (3 x heads x d at 4 bytes). 7B thinker, 16 bit: 132.5 KiB, of
        which the three products are 111.

        From an int8 cache attention reads slices of 2048 positions, or of all that are there where that is fewer
        (beside a full chunk its own or those before it, at a decode step `cache_tokens`): one layer's keys and values
        (w each) and the float32 of whichever is being scaled; beside them the norm, queries as they came and turned
        (2 x heads x d), keys and values, and the sum of the slices so far (heads x d at 4 bytes). 7B: 8 MiB a slice.

        A packed linear is dequantized slice by slice (`unpacking_bytes`): at the widest beside the MLP's sum and norm
        (2h), the gate's activation and the up projection (2i), or beside the norm, queries, keys and values. 7B: 28 MiB
        a slice, more than the third product of a chunk of 778 tokens or less.

        The logits are drawn from in float32: penalized, sorted with their indices, summed up; about 48 bytes each.
        """
        beside_chunk = max(chunk_tokens, prompt_tokens - chunk_tokens)
        return max(
            self._chunk_bytes(chunk_tokens, width_bytes, kv, beside_chunk),
            self._chunk_bytes(1, width_bytes, kv, cache_tokens),
            self._rows_bytes(1, width_bytes) + 48 * self.vocab,
        )

    def state_bytes(self, width_bytes: int, kv: KVPrecision = "16bit") -> int:
        """What stays between steps: for each id there is, whether it was drawn (a byte) and the noise that the next one
        is drawn with (4); the last position's row; and the matrix that keys are turned by in int8 (d x d at 4)."""
        turn_bytes = 4 * self.head_dim**2 if kv == "int8" else 0
        return (1 + 4) * self.vocab + self.hidden * width_bytes + turn_bytes

    def _rows_bytes(self, tokens: int, width_bytes: int) -> int:
        """What a chunk has all the time."""
        return tokens * ((self.hidden + 2 * self.head_dim) * width_bytes + 3 * 8)

    def _chunk_bytes(self, tokens: int, width_bytes: int, kv: KVPrecision, positions: int) -> int:
        """A chunk in a layer, at its widest point."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        points = [
            tokens * self.input_size * width_bytes,
            tokens * (2 * self.hidden + 3 * self.intermediate) * width_bytes,
            tokens * ((self.hidden + 4 * queries + 2 * keys) * width_bytes + 3 * queries * 4),
        ]
        if kv == "int8":
            reading = (self.hidden + 2 * queries + 2 * keys) * width_bytes + queries * 4
            points.append(tokens * reading + min(KV_SLICE_TOKENS, positions) * keys * (2 * width_bytes + 4))
        if self.unpacked_weights:
            beside = max(2 * self.hidden + 2 * self.intermediate, self.hidden + queries + 2 * keys)
            slice_bytes = unpacking_bytes(self.unpacked_weights, self.hidden, tokens, width_bytes)
            points.append(tokens * beside * width_bytes + slice_bytes)
        return self._rows_bytes(tokens, width_bytes) + max(points)


@dataclass(frozen=True)
class VisionShape:
    """The vision tower. `patch_elements` is one patch's pixels: channels x temporal patch x patch x patch;
    `unpacked_weights` of a linear are dequantized at once (0: none is packed)."""

    hidden: int
    intermediate: int
    head_dim: int
    patch_elements: int
    unpacked_weights: int = 0

    def activation_bytes(self, patches: int, slice_patches: int, width_bytes: int) -> int:
        """A run of patches in a layer, of which `slice_patches` are computed at once.

        All the time: the run's rows (h), rotary table and indices, and, where a picture is more than a slice, its
        queries, keys and values (3h). Beside them a slice, whichever is wider of two points. Rotating the keys, in
        float32: its norm, q, k, v (4h at w) and the float32 copies of q and k, the rotated q, and three products on the
        way to the rotated k (6h at 4 bytes). In the MLP: the sum with the attention, the norm (2h) and the three
        products of gate and up (3i). Before the layers, the slice's pixels. To any of these a slice of a packed linear
        is added, whichever linear it is.
        """
        rows = self.hidden * width_bytes * (4 if patches > slice_patches else 1)
        standing_bytes = patches * (rows + 2 * self.head_dim * 4 + 3 * 8)
        rotating = 4 * self.hidden * width_bytes + 6 * self.hidden * 4
        mlp = (2 * self.hidden + 3 * self.intermediate) * width_bytes
        computing = max(rotating, mlp, self.patch_elements * width_bytes)
        at_once = min(patches, slice_patches)
        slice_bytes = unpacking_bytes(self.unpacked_weights, self.hidden, at_once, width_bytes)
        return standing_bytes + at_once * computing + slice_bytes


@dataclass(frozen=True)
class AudioShape:
    """The audio tower. One window is `window_frames` mel frames and half as many positions; `unpacked_weights` of a
    linear are dequantized at once (0: none is packed)."""

    hidden: int
    ffn: int
    mel_bins: int
    window_frames: int
    unpacked_weights: int = 0

    def activation_bytes(self, windows: int, width_bytes: int) -> int:
        """A run of windows through a layer's feed-forward part, its widest point.

        Per position: the convolved window, the layer's input and its sum with the attention (3h), the feed-forward
        product before and after its activation (2f); per mel frame its bins. The convolutions run one window at a
        time: a frame's first convolution and its activation (2h), and those of half as many positions. A slice of a
        packed linear is added, whichever linear it is.
        """
        positions = self.window_frames // 2
        layer = windows * (positions * (3 * self.hidden + 2 * self.ffn) + self.window_frames * self.mel_bins)
        convolving = windows * positions * self.hidden + 3 * self.window_frames * self.hidden
        slice_bytes = unpacking_bytes(self.unpacked_weights, self.hidden, windows * positions, width_bytes)
        return max(layer, convolving) * width_bytes + slice_bytes


@dataclass(frozen=True)
class Decoding:
    """How codes become sound: `chunk_codes` at a time, in `cached` modes solved together with `ahead_codes` after them
    that are solved again; the DiT's layers in `dtype`."""

    mode: SpeechMode = "exact"
    evaluations: int = 9
    chunk_codes: int = 48
    ahead_codes: int = 0
    dtype: SpeechDtype = "float32"

    @property
    def layer_bytes(self) -> int:
        """Per element of the DiT's layers."""
        return DIT_LAYER_WIDTH_BYTES[self.dtype]

    def walks(self, codes: int) -> int:
        """How often a speech of so many codes walks the DiT's layers, at most.

        Each chunk does, then what is left over, then the end: once for every evaluation, but in "offload" once for all
        of them, whose last frames need a walk each.
        """
        chunks = codes // self.chunk_codes
        return chunks + 1 + self.evaluations if self.mode == "offload" else self.evaluations * (chunks + 2)


@dataclass(frozen=True)
class SoundShape:
    """token2wav. The DiT: hidden size, feed-forward size, layers, heads, frames per block, how many of its layers look
    a block back and ahead. The speaker encoder: what it holds per mel frame of a voice. BigVGAN: its widest layer in
    elements, and its operations, per mel frame. `repeats` mel frames are one code."""

    hidden: int
    ff: int
    layers: int
    heads: int
    block_frames: int
    back_layers: int
    ahead_layers: int
    repeats: int
    speaker_elements_per_frame: int
    vocoder_elements_per_frame: int
    vocoder_flops_per_frame: int = 0

    def constants_bytes(self, evaluations: int) -> int:
        """What conditioning leaves: a voice's vectors, and for each ODE evaluation each layer's six modulations and two
        for the output."""
        return _VOICE_BYTES + evaluations * (6 * self.layers + 2) * self.hidden * TOKEN2WAV_WIDTH_BYTES

    def conditioning_bytes(self, voice_frames: int, evaluations: int) -> int:
        """What conditioning computes with: a voice in the speaker encoder beside the constants, and these once more."""
        encoding = voice_frames * self.speaker_elements_per_frame * TOKEN2WAV_WIDTH_BYTES
        return encoding + 2 * self.constants_bytes(evaluations)

    def state_bytes(self, decoding: Decoding) -> int:
        """What is kept between chunks, however long the speech. 7B: 24.2 MB, in "balanced" 16.8 MB.

        The constants; per evaluation the border of the DiT's layers, and, but for cached modes, frames that wait: a
        block, and in "offload" the chunk that the evaluation before gave. The vocoder has its tails.
        """
        return self.constants_bytes(decoding.evaluations) + self._border_bytes(decoding) + self._tails_bytes

    def activation_bytes(self, decoding: Decoding) -> int:
        """A chunk in the DiT or in the vocoder, whichever is larger; they take turns.

        At the end of an exact speech the blocks that waited in each evaluation come together in one more queue, the
        last of them with the newest one. The vocoder's receptive field holds back 34 frames more; a frame takes 10
        layers, as traced, in an anti-aliased activation of its widest layer: the residual and the running sum of three
        branches, the chunk as it came and joined to its tail, and what is computed at twice the rate. What was kept
        before a step, tails and all that waited, stays until that is done, in case it is to be undone.
        """
        chunk_frames = decoding.chunk_codes * self.repeats
        at_once_bytes = self._frames_at_once(decoding) * self._frame_bytes + self._standing_bytes(decoding)
        end_bytes = 0
        if not decoding.ahead_codes:
            ending_frames = self.block_frames * (decoding.evaluations + 1)
            end_bytes = ending_frames * (self._frame_bytes + self._queued_frame_bytes)
        widest_bytes = (chunk_frames + 34) * 10 * self.vocoder_elements_per_frame * TOKEN2WAV_WIDTH_BYTES
        return max(at_once_bytes, end_bytes, widest_bytes + self._tails_bytes)

    @property
    def _tails_bytes(self) -> int:
        """What the vocoder's layers keep: together as much as 178 frames of the widest (4.1 MB, as traced)."""
        return 178 * self.vocoder_elements_per_frame * TOKEN2WAV_WIDTH_BYTES

    def _frames_at_once(self, decoding: Decoding) -> int:
        """The frames that go through a layer of the DiT together."""
        return (decoding.chunk_codes + decoding.ahead_codes) * self.repeats

    def _standing_bytes(self, decoding: Decoding) -> int:
        """Rows of two branches that stand before or behind a layer while another evaluation's go through it."""
        if decoding.mode != "offload":
            return 0
        frames = (decoding.evaluations - 1) * decoding.chunk_codes * self.repeats
        return frames * 2 * self.hidden * TOKEN2WAV_WIDTH_BYTES

    @property
    def _frame_bytes(self) -> int:
        """A frame in the DiT, for two branches of guidance, where a layer attends to two blocks: rows and those that
        waited (3h), q, k, v as they came and joined to what waited (6h), each block of q with two blocks of k and v
        (5h), and, where torch spells attention out, scaled q and k (3h) and scores. 7B: 164 KB; half precision saves
        next to nothing, for that is spelled out in float32. Beside it a wide feed-forward is narrow.
        """
        scores = 4 * self.heads * 2 * self.block_frames
        return 2 * max(17 * self.hidden + scores, 6 * self.hidden + 2 * self.ff) * TOKEN2WAV_WIDTH_BYTES

    @property
    def _queued_frame_bytes(self) -> int:
        return (self.hidden + _NOISE_AND_TURN) * TOKEN2WAV_WIDTH_BYTES

    def _border_bytes(self, decoding: Decoding) -> int:
        """What each evaluation remembers. For two branches, at the layers that look back a block's keys and values; in
        exact modes at those that look ahead a block's rows, q, k and v; and frames that wait, with their code rows.
        Cached modes have one such queue for all evaluations: the chunk and its look-ahead.
        """
        per_row_bytes = 2 * self.back_layers * decoding.layer_bytes
        if decoding.ahead_codes:
            waiting_bytes = self._frames_at_once(decoding) * self._queued_frame_bytes
            return decoding.evaluations * 2 * self.block_frames * self.hidden * per_row_bytes + waiting_bytes
        per_row_bytes += self.ahead_layers * (3 * decoding.layer_bytes + TOKEN2WAV_WIDTH_BYTES)
        waiting = self.block_frames
        if decoding.mode == "offload":
            waiting += decoding.chunk_codes * self.repeats
        border_bytes = 2 * self.block_frames * self.hidden * per_row_bytes
        return decoding.evaluations * (border_bytes + waiting * self._queued_frame_bytes)
