"""Codec tokens to the mel frames that a solver starts from: noise, what codes and voice add to it, rotary tables.

Frames are numbered from the utterance's first, and their noise is drawn in order: both are the same however the codes
arrive.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .carry import Carry, Cell
from .conditioning import Conditioning
from .layers import multiply

log = logging.getLogger(__name__)

NULL_CODE = 0
"""What the DiT hears where there is no code: `drop_code` in the reference turns every code into 0."""


@dataclass(frozen=True)
class Frames:
    """F mel frames on their way through the solver: rotary table [F, D], what code and voice add to their rows
    [1, F, H], and the solver's state, tensors [1, F, M] of which the first is the point to evaluate."""

    turn: Tensor
    code_rows: Tensor
    state: tuple[Tensor, ...]

    def __len__(self) -> int:
        return self.turn.shape[-2]

    def first(self, count: int) -> Frames:
        """The first `count` of them."""
        return Frames.of([tensor[..., :count, :] for tensor in self.tensors])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, for a queue; `Frames.of` takes them apart again."""
        return self.turn, self.code_rows, *self.state

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Frames:
        turn, code_rows, *state = tensors
        return cls(turn, code_rows, tuple(state))


class Source:
    """The frames of one utterance, in order and in whole blocks until its end.

    A code outside the codec table (8,194 rows; the talker's vocabulary is wider, and such an id crashes the reference)
    keeps its 20 ms and is heard as `NULL_CODE`, so that nothing after it shifts; a warning is logged.
    """

    def __init__(self, dit: Any, entrance: Entrance, seed: int, carry: Carry) -> None:
        self._entrance = entrance
        self._noise = Noise(seed, dit.mel_dim, carry)
        self._rotary = Rotary(dit, carry)
        self._table_rows: int = dit.text_embed.codec_embed.num_embeddings
        self._block_codes: int = dit.block_size // dit.repeats
        self._codes: Cell[tuple[int, ...]] = carry.cell(())

    def put(self, codes: Iterable[int]) -> None:
        """The next codes."""
        self._codes.value += tuple(self._audible(code) for code in codes)

    def take(self, *, last: bool) -> Frames:
        """The frames of all whole blocks of codes, or of all codes."""
        codes = self._codes.value
        count = len(codes) if last else len(codes) // self._block_codes * self._block_codes
        self._codes.value = codes[count:]
        rows = self._entrance.code_rows(codes[:count])
        return Frames(self._rotary.draw(rows), rows, (self._noise.draw(rows),))

    @property
    def frames_drawn(self) -> int:
        """How many frames have been taken."""
        return self._rotary.next_frame

    def _audible(self, code: int) -> int:
        if 0 <= code < self._table_rows:
            return code
        log.warning("codec id %d is outside the table of %d: 20 ms of a neutral code instead", code, self._table_rows)
        return NULL_CODE


class Noise:
    """Where the frames start: the noise of `torch.manual_seed(seed); torch.randn([1, F, M])` on the CPU.

    Drawn piece by piece it is the same as long as M is a multiple of 16 (80 in the checkpoints).
    """

    def __init__(self, seed: int, mel_dim: int, carry: Carry) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._at = carry.cell(self._generator.get_state())
        self._mel_dim = mel_dim

    def draw(self, rows: Tensor) -> Tensor:
        """[1, F, M] for the next frames, like `rows` in number, device and dtype."""
        self._generator.set_state(self._at.value)
        shape = (1, rows.shape[-2], self._mel_dim)
        noise = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu").to(rows)
        self._at.value = self._generator.get_state()
        return noise


class Rotary:
    """Rotary tables of the frames, in order, by absolute frame number.

    The angle is rounded to float32 as in the reference as far as the reference goes (32,768 frames, 5 minutes);
    further on that would lose the phase (0.02 rad after an hour), so the angle is float64 there.
    """

    def __init__(self, dit: Any, carry: Carry) -> None:
        self._frequency: Tensor = dit.rotary_embed.inv_freq.float().cpu()
        self._exact_from: int = dit.config.max_position_embeddings
        self._next_frame = carry.cell(0)

    @property
    def next_frame(self) -> int:
        return self._next_frame.value

    def draw(self, rows: Tensor) -> Tensor:
        """[F, D], cosines then sines, for the next frames, like `rows` in number, device and dtype."""
        first, after = self._next_frame.value, self._next_frame.value + rows.shape[-2]
        self._next_frame.value = after
        dtype = torch.float32 if after <= self._exact_from else torch.float64
        angle = torch.arange(first, after, dtype=dtype, device="cpu")[:, None] * self._frequency.to(dtype)
        return torch.cat((angle.cos(), angle.sin()), -1).to(rows)


class Entrance:
    """The input projection, with all that depends on the voice alone summed up beforehand.

    The reference concatenates (x, speaker vector, code embedding, x-vector) before one projection: the projection's
    columns are taken apart here, so that the code's part is computed once for all evaluations.
    """

    @torch.no_grad()
    def __init__(self, dit: Any, conditioning: Conditioning) -> None:
        self._table, self._projection = dit.text_embed.codec_embed, dit.input_embed.proj
        self._repeats: int = dit.repeats
        config = dit.config
        self._columns = (config.mel_dim, config.enc_dim, config.emb_dim, config.enc_emb_dim)
        _, speaker, code, x_vector = self._split_weight()
        speakers, x_vectors = conditioning.speaker_vectors, conditioning.x_vectors
        rows = multiply(speakers, speaker, self._projection.bias) + multiply(x_vectors, x_vector)
        null_code = multiply(self._table.weight[NULL_CODE].to(rows.dtype), code)
        self._voice_row = rows[:1]
        self._null_row = rows[1:] + null_code

    def code_rows(self, codes: Sequence[int]) -> Tensor:
        """What codes and voice add to the frames' rows: [1, F, H], constant over the evaluations."""
        _, _, code, _ = self._split_weight()
        ids = torch.tensor([codes], dtype=torch.long, device=code.device)
        heard = multiply(self._table(ids).to(self._voice_row.dtype), code)
        return (heard + self._voice_row).repeat_interleave(self._repeats, 1)

    def rows(self, x: Tensor, code_rows: Tensor) -> Tensor:
        """Frames x [1, F, M] as the first layer's input [G, F, H]."""
        columns, *_ = self._split_weight()
        x = multiply(x, columns)
        return torch.cat([x + code_rows, *(x + row for row in self._null_row)])

    def _split_weight(self) -> tuple[Tensor, ...]:
        # Anew at each use: a view that outlived it would keep the weights on the device.
        return self._projection.weight.split(self._columns, 1)
