"""What is quantized besides the thinker's layers: which linears of a 16-bit checkpoint, and their tensors' new bytes.

These are rounded to nearest: nothing is calibrated for them. Weights pass through a slice of rows at a time, so that an
output head of two gigabytes needs a few megabytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import TensorEntry, TensorHeader, TensorReader
from ..checkpoint_writer import header_of, tensor_bytes
from ..errors import CheckpointError, OptionError, UnsupportedQuantError
from ..model import EMBED_TOKENS, LM_HEAD
from ..offload.transfer import TORCH_DTYPE
from ..quant.int8 import MARKER
from ..quant.layer import slice_rows
from ..quant.storage import SHAPE, Storage
from .options import PartReport

Headers = Mapping[str, TensorHeader]

HEAD_PART = "lm_head"

LINEARS_OF = {
    "talker": r"talker\.model\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight",
    "encoders": r"thinker\.audio_tower\.layers\.\d+\.(self_attn\.\w+|fc[12])\.weight"
    r"|thinker\.visual\.blocks\.\d+\.(attn|mlp)\.\w+\.weight",
    HEAD_PART: re.escape(LM_HEAD),
}
"""Attention and MLP of all layers. What leads into the layers and out of them (`thinker_to_talker_proj`, `codec_head`,
`merger`, `proj`) is small, and an error there touches everything."""


@dataclass(frozen=True)
class Part:
    """Linears that are quantized as `storage` says, by published path -> the name of the weight that each is made of;
    and the paths of those that cannot be, `*` standing for a layer's number."""

    name: str
    storage: Storage
    sources: Mapping[str, str]
    left_alone: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Published paths of what is quantized, `*` standing for a layer's number."""
        return tuple(dict.fromkeys(map(any_layer, self.sources)))

    @property
    def replaced(self) -> frozenset[str]:
        """Names of the tensors that are not copied. An embedding table that is an output head, too, stays."""
        return frozenset(self.sources.values()) - {EMBED_TOKENS}

    @property
    def sentence(self) -> str:
        """What it deviates from the published recipe by."""
        count = len(self.sources)
        told = f"{self.name}: {count} linear{'s' * (count > 1)} in {self.storage.bits} bits, rounded to nearest"
        if not self.left_alone:
            return told
        left = ", ".join(self.left_alone)
        return f"{told}; {left} do not divide into words and groups of {self.storage.group_size} and stay as they are"

    def tensors(self, stored: Headers) -> dict[str, TensorHeader]:
        """What is written of it, where `stored` is what there was."""
        return {
            f"{path}.{leaf}": header_of(torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
            for path, source in self.sources.items()
            for leaf, spec in self.storage.layout(*reversed(stored[source].shape)).items()
        }


def find_part(name: str, stored: Headers, storage: Storage) -> Part:
    """The part called `name` of a checkpoint that stores such tensors.

    Raises OptionError for a checkpoint without it, UnsupportedQuantError where nothing of it can be stored so.
    """
    sources = {t.removesuffix(".weight"): t for t in stored if re.fullmatch(LINEARS_OF[name], t)}
    if name == HEAD_PART and not sources:
        sources = {LM_HEAD.removesuffix(".weight"): EMBED_TOKENS}
    if not sources:
        raise OptionError(f"the checkpoint has no {name} to quantize also", hint="leave it out")
    left = dict.fromkeys(any_layer(path) for path, source in sources.items() if not _fits(storage, stored[source]))
    taken = {path: source for path, source in sources.items() if any_layer(path) not in left}
    if not taken:
        raise UnsupportedQuantError(
            f"no linear of {name} divides into words and groups of {storage.group_size}", hint="ask for smaller groups"
        )
    return Part(name, storage, taken, tuple(left))


def any_layer(path: str) -> str:
    """A published path with `*` for the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", path)


def read_rows(reader: TensorReader, entry: TensorEntry, n: int) -> Iterator[Tensor]:
    """A stored matrix, `n` rows at a time, on the host."""
    total, width = entry.shape
    for start in range(0, total, n):
        rows = torch.empty(min(n, total - start), width, dtype=TORCH_DTYPE[entry.dtype], device="cpu")
        reader.read_into(entry, tensor_bytes(rows), start * entry.n_bytes // total)
        yield rows


class PartWriter:
    """Rounds a part's weights on `device` and gives their bytes; knows what that cost once all have been given."""

    def __init__(
        self, part: Part, tensors: Mapping[str, TensorEntry], reader: TensorReader, device: torch.device
    ) -> None:
        self._part = part
        self._tensors = tensors
        self._reader = reader
        self._device = device
        self._squared_error = self._squared = 0.0
        self._bytes_before = self._bytes_after = 0

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor of `Part.tensors`."""
        path, _, leaf = name.rpartition(".")
        entry = self._tensors[self._part.sources[path]]
        if leaf == SHAPE:
            yield self._counted(torch.tensor(entry.shape, device="cpu"))
            return
        for rows in read_rows(self._reader, entry, slice_rows(entry.shape[1])):
            weight = rows.to(self._device).float()
            if leaf == MARKER:  # the other tensors are made of the same rows once more
                self._bytes_before += rows.nbytes
                self._judge(weight, entry)
            yield self._counted(self._part.storage.pack(weight)[leaf].cpu())

    @property
    def report(self) -> PartReport:
        """Of all that was given."""
        return PartReport(
            part=self._part.name,
            bits=self._part.storage.bits,
            linears=len(self._part.sources),
            left_alone=self._part.left_alone,
            bytes_before=self._bytes_before,
            bytes_after=self._bytes_after,
            weight_error=self._squared_error / self._squared if self._squared else 0.0,
        )

    def _counted(self, tensor: Tensor) -> memoryview:
        self._bytes_after += tensor.nbytes
        return tensor_bytes(tensor)

    def _judge(self, weight: Tensor, entry: TensorEntry) -> None:
        if not weight.isfinite().all():
            raise CheckpointError(
                f"tensor {entry.name} in {entry.path.name} holds what is not a finite number",
                path=str(entry.path),
                tensor=entry.name,
                hint="the weights are damaged",
            )
        change = self._part.storage.nearest(weight).sub_(weight)
        self._squared_error += float(change.square_().sum(dtype=torch.float64))
        self._squared += float(weight.square().sum(dtype=torch.float64))


def _fits(storage: Storage, header: TensorHeader) -> bool:
    try:
        storage.layout(*reversed(header.shape))
    except UnsupportedQuantError:
        return False
    return True
