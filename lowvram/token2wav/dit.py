"""Codec tokens to mel frames as they come: the reference's DiT solved as a wavefront, equal to solving all at once.

A frame's velocity reads its own block of 24 frames, one block back at the look-back layers and one ahead at the
look-ahead layer. So every layer of every evaluation keeps just that: keys and values of the block behind, and the
frames that wait for the block ahead. Evaluation k runs k blocks behind the codes; each frame passes each layer once
per evaluation, and the state (15 MB at the published size for 9 guided evaluations) does not grow.

Shapes: rows [G, F, H] with G = 2 when guided (the codes' branch and the null branch), else 1; every tensor that
travels with the frames has its time axis at -2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ode import Stage

log = logging.getLogger(__name__)

NULL_CODE = 0
"""What the DiT hears where there is no code: `drop_code` in the reference turns every code into 0."""

_UNGUIDED_BELOW = 1e-5
"""Guidance under which the reference leaves the null branch out."""


class WavefrontDiT:
    """One utterance through `Qwen2_5OmniToken2WavDiTModel`, whose weights are in place.

    `cond` [1, E] and `ref_mel` [1, T, M] are the voice, `stages` the solver. Device and dtype (float32, or float64 to
    test) are the weights'. The noise is that of `torch.manual_seed(seed); torch.randn([1, F, M])` on the CPU, however
    the codes arrive: drawn frame by frame it is the same as long as M is a multiple of 16 (80 in the checkpoints).

    A code outside the codec table (8,194 rows; the talker's vocabulary is wider, and such an id crashes the reference)
    keeps its 20 ms and is heard as `NULL_CODE`, so that nothing after it shifts; a warning is logged.
    """

    def __init__(
        self, dit: nn.Module, cond: Tensor, ref_mel: Tensor, stages: Sequence[Stage], *, guidance: float, seed: int
    ) -> None:
        assert not dit.training, "dropout would be heard: call eval() on the DiT"
        reference: Any = dit
        self._entrance = _Entrance(reference, cond, ref_mel, guided=guidance >= _UNGUIDED_BELOW)
        self._evaluations = [_Evaluation(reference, self._entrance, stage, guidance) for stage in stages]
        self._noise = _Noise(seed, reference.mel_dim)
        self._rotary = _Rotary(reference)
        self._table_rows: int = reference.text_embed.codec_embed.num_embeddings
        self._block_codes: int = reference.block_size // reference.repeats
        self._codes: list[int] = []

    def push(self, codes: Iterable[int]) -> Tensor:
        """The next codes; returns the mel frames [1, M, F] that became final: whole blocks, or none."""
        self._codes += (self._audible(code) for code in codes)
        return self._advance(len(self._codes) // self._block_codes * self._block_codes, last=False)

    def finish(self) -> Tensor:
        """No more codes will come; returns the mel frames [1, M, F] that are left."""
        return self._advance(len(self._codes), last=True)

    @torch.no_grad()
    def _advance(self, count: int, last: bool) -> Tensor:
        codes, self._codes = self._codes[:count], self._codes[count:]
        rows = self._entrance.code_rows(codes)
        turn = self._rotary.draw(rows)
        state: tuple[Tensor, ...] = (self._noise.draw(rows),)
        for evaluation in self._evaluations:
            if not rows.shape[-2] and not last:
                break
            state, rows, turn = evaluation.push(state, rows, turn, last)
        return state[0].transpose(1, 2)

    def _audible(self, code: int) -> int:
        if 0 <= code < self._table_rows:
            return code
        log.warning("codec id %d is outside the table of %d: 20 ms of a neutral code instead", code, self._table_rows)
        return NULL_CODE


class _Noise:
    """The initial state of the frames, in order."""

    def __init__(self, seed: int, mel_dim: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._mel_dim = mel_dim

    def draw(self, rows: Tensor) -> Tensor:
        """[1, F, M] for the next frames, like `rows` in number, device and dtype."""
        shape = (1, rows.shape[-2], self._mel_dim)
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu").to(rows)


class _Rotary:
    """Rotary tables of the frames, in order, by absolute frame number.

    The angle is rounded to float32 as in the reference as far as the reference goes (32,768 frames, 5 minutes);
    further on that would lose the phase (0.02 rad after an hour), so the angle is float64 there.
    """

    def __init__(self, reference: Any) -> None:
        self._frequency: Tensor = reference.rotary_embed.inv_freq.float().cpu()
        self._exact_from: int = reference.config.max_position_embeddings
        self._next_frame = 0

    def draw(self, rows: Tensor) -> Tensor:
        """[F, D], cosines then sines, for the next frames, like `rows` in number, device and dtype."""
        first, self._next_frame = self._next_frame, self._next_frame + rows.shape[-2]
        dtype = torch.float32 if self._next_frame <= self._exact_from else torch.float64
        angle = torch.arange(first, self._next_frame, dtype=dtype, device="cpu")[:, None] * self._frequency.to(dtype)
        return torch.cat((angle.cos(), angle.sin()), -1).to(rows)


class _Entrance:
    """The input projection, with all that depends on the voice alone summed up beforehand.

    The reference concatenates (x, speaker vector, code embedding, x-vector) before one projection: the projection's
    columns are taken apart here, so that the code's part is computed once for all evaluations.
    """

    @torch.no_grad()
    def __init__(self, reference: Any, cond: Tensor, ref_mel: Tensor, *, guided: bool) -> None:
        embed, config = reference.input_embed, reference.config
        columns = (config.mel_dim, config.enc_dim, config.emb_dim, config.enc_emb_dim)
        self._x_weight, spk_weight, self._code_weight, cond_weight = embed.proj.weight.split(columns, 1)
        self._table = reference.text_embed.codec_embed
        self._repeats: int = reference.repeats
        cond, ref_mel = cond.to(embed.proj.weight), ref_mel.to(embed.proj.weight)
        spk = F.linear(embed.spk_encoder(ref_mel), spk_weight, embed.proj.bias)
        self._voice_row = spk + F.linear(cond, cond_weight)
        self._null_row: Tensor | None = None
        if guided:
            spk = F.linear(embed.spk_encoder(torch.zeros_like(ref_mel)), spk_weight, embed.proj.bias)
            self._null_row = spk + F.linear(self._table.weight[NULL_CODE], self._code_weight)

    def code_rows(self, codes: Sequence[int]) -> Tensor:
        """What codes and voice add to the frames' rows: [1, F, H], constant over the evaluations."""
        ids = torch.tensor([codes], dtype=torch.long, device=self._table.weight.device)
        return (F.linear(self._table(ids), self._code_weight) + self._voice_row).repeat_interleave(self._repeats, 1)

    def rows(self, x: Tensor, code_rows: Tensor) -> Tensor:
        """Frames x [1, F, M] as the first layer's input [G, F, H]."""
        x = F.linear(x, self._x_weight)
        return x + code_rows if self._null_row is None else torch.cat((x + code_rows, x + self._null_row))


class _Evaluation:
    """One evaluation of the velocity, for frames that come and go in order: takes states, gives advanced states."""

    @torch.no_grad()
    def __init__(self, reference: Any, entrance: _Entrance, stage: Stage, guidance: float) -> None:
        self._entrance, self._stage, self._guidance = entrance, stage, guidance
        weight = reference.proj_out.weight
        time = torch.tensor([stage.time], dtype=weight.dtype, device=weight.device)
        embedding = F.silu(reference.time_embed(time))
        self._layers = [_Layer(layer, embedding, reference.block_size) for layer in reference.transformer_blocks]
        self._norm, self._project = reference.norm_out.norm, reference.proj_out
        self._scale, self._shift = reference.norm_out.linear(embedding).chunk(2, -1)
        self._waiting = _Queue()

    def push(
        self, state: tuple[Tensor, ...], code_rows: Tensor, turn: Tensor, last: bool
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """State tensors [1, F, M], code rows [1, F, H] and rotary table [F, D] in, those of final frames out."""
        self._waiting.put(code_rows, *state)
        rows = self._entrance.rows(state[0], code_rows)
        for layer in self._layers:
            rows, turn = layer.push(rows, turn, last)
        velocity = self._guided(self._project(self._norm(rows) * (1 + self._scale) + self._shift))
        code_rows, *points = self._waiting.take(velocity.shape[-2])
        return self._stage.advance(tuple(points), velocity), code_rows, turn

    def _guided(self, velocity: Tensor) -> Tensor:
        """[G, F, M] to [1, F, M]: classifier-free guidance as the reference weighs it, v + g (v - v_null)."""
        if len(velocity) == 1:
            return velocity
        spoken, null = velocity.chunk(2)
        return spoken + (spoken - null) * self._guidance


class _Layer:
    """One `DiTDecoderLayer` at one evaluation, with the frames it waits on and the keys it looks back on."""

    def __init__(self, layer: Any, time_embedding: Tensor, block: int) -> None:
        self._layer = layer
        modulation = layer.attn_norm.linear(time_embedding).chunk(6, -1)
        self._shift, self._scale, self._gate, self._ff_shift, self._ff_scale, self._ff_gate = modulation
        self._block = block
        self._back: int = block * layer.look_backward_block
        self._ahead: int = block * layer.look_ahead_block
        self._waiting = _Queue()
        self._window = _Queue()
        self._past = 0

    def push(self, rows: Tensor, turn: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """Rows [G, F, H] and their rotary table [F, D] in, those whose window is complete out."""
        query, key, value = self._project(rows, turn)
        self._waiting.put(rows, turn, query)
        key, value = self._window.put(key, value)
        ready = self._waiting.frames if last else max(0, self._waiting.frames - self._ahead)
        rows, turn, query = self._waiting.take(ready)
        attended = self._attend(query, key, value)
        behind = self._past + ready
        self._past = min(behind, self._back)
        self._window.take(behind - self._past)
        return self._output(rows, attended), turn

    def _project(self, rows: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value [G, heads, F, D]."""
        attention = self._layer.attn
        rows = self._layer.attn_norm.norm(rows) * (1 + self._scale) + self._shift
        query, key, value = (
            projection(rows).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for projection in (attention.to_q, attention.to_k, attention.to_v)
        )
        return _rotate_first_head(query, turn), _rotate_first_head(key, turn), value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each block of queries over its window of keys; `_past` keys lie before the first query."""
        blocks = []
        for start in range(0, query.shape[-2], self._block):
            own = self._past + start
            window = slice(max(0, own - self._back), own + self._block + self._ahead)
            block = query[..., start : start + self._block, :]
            blocks.append(F.scaled_dot_product_attention(block, key[..., window, :], value[..., window, :]))
        return torch.cat(blocks, -2) if blocks else query

    def _output(self, rows: Tensor, attended: Tensor) -> Tensor:
        layer = self._layer
        rows = rows + self._gate * layer.attn.to_out[0](attended.transpose(1, 2).flatten(2))
        return rows + self._ff_gate * layer.ff(layer.ff_norm(rows) * (1 + self._ff_scale) + self._ff_shift)


def _rotate_first_head(heads: Tensor, turn: Tensor) -> Tensor:
    """RoPE on head 0 of [G, heads, F, D], pairs interleaved; the model was trained without it on the other heads."""
    cos, sin = turn.chunk(2, -1)
    even, odd = heads[:, :1, :, 0::2], heads[:, :1, :, 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return torch.cat((turned, heads[:, 1:]), 1)


class _Queue:
    """Frames that wait: tensors that share their time axis, -2."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, ...] = ()

    @property
    def frames(self) -> int:
        return self._held[0].shape[-2] if self._held else 0

    def put(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Append frames; returns all that wait now."""
        joined = (torch.cat(pair, -2) for pair in zip(self._held, tensors, strict=True)) if self._held else tensors
        self._held = tuple(joined)
        return self._held

    def take(self, frames: int) -> tuple[Tensor, ...]:
        """Remove the first `frames` frames."""
        taken = tuple(tensor[..., :frames, :] for tensor in self._held)
        # A view of the rest would keep the memory of what was taken.
        self._held = tuple(tensor[..., frames:, :].clone() for tensor in self._held) if frames < self.frames else ()
        return taken
