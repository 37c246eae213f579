"""One decoder layer in 16 bit -> the tensors that store it in 4 or 8, and what that changes in its output.

The layer is the modelling library's, in float32 on its device. Calibration rows pass through it twice: once to learn
what flows into its linears and what it hands on, once to judge the candidate scales. Rows come in chunks, so that
memory does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .calibrate import (
    CLIP_SLICE_WEIGHTS,
    InputStatistics,
    candidate_scales,
    clipped,
    rounded_under,
    search_clip,
    weight_magnitudes,
)
from .packing import NIBBLES_PER_WORD
from .recipe import LINEARS, UNCLIPPED, ScaledGroup, scaled_groups
from .storage import SHAPE, Storage

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [B, L, D] of the positions of a chunk."""

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Chunk:
    """Calibration rows `hidden` [B, L, H] float32 on the device: B sequences that do not see each other."""

    hidden: Tensor
    rotary: Rotary

    @property
    def tokens(self) -> int:
        """Rows of all its sequences."""
        return self.hidden.shape[0] * self.hidden.shape[1]


@dataclass(frozen=True)
class _Call:
    """What a module was called with and what it gave back."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor

    def square_error(self, module: nn.Module, parameters: Parameters) -> float:
        """Of the same call with other parameters, summed over the output."""
        change = _only(functional_call(module, dict(parameters), self.args, dict(self.kwargs))).sub_(self.output)
        return float(change.square_().sum(dtype=torch.float64))


class _Search:
    """The scales of one group: twenty candidates, and what each has cost so far."""

    def __init__(self, layer: nn.Module, group: ScaledGroup, statistics: InputStatistics, storage: Storage) -> None:
        self._inspected = layer.get_submodule(group.inspected)
        self._weights = {_below(group.inspected, path): _weight(layer, path) for path in group.linears}
        self._storage = storage
        weights = weight_magnitudes(list(self._weights.values()), storage.group_size)
        self._candidates = candidate_scales(statistics.magnitudes, weights)
        self._losses = [0.0] * len(self._candidates)

    def weigh(self, call: _Call) -> None:
        """Judge every candidate by one more call of the inspected module."""
        for index, scales in enumerate(self._candidates):
            rounded = {name: rounded_under(weight, scales, self._storage) for name, weight in self._weights.items()}
            self._losses[index] += call.square_error(self._inspected, rounded)

    @property
    def best(self) -> Tensor:
        """The scales [K] that cost least."""
        return self._candidates[self._losses.index(min(self._losses))]


class LayerQuantizer:
    """Quantizes `layer`: `observe` all chunks, then `weigh` them all, then `scale`, then `round`.

    `stored` gives the dtype in which each other tensor of the layer is stored, by path: norms and biases that take over
    scales are rounded to it. Until `scale` the layer is left as it was, and afterwards computes the same.
    """

    def __init__(self, layer: nn.Module, storage: Storage, stored: Mapping[str, torch.dtype]) -> None:
        self._layer = layer
        self._storage = storage
        self._stored = stored
        self._groups = dict(scaled_groups(layer))
        self.statistics = {
            group: InputStatistics(weight.shape[1], storage.group_size, weight.device)
            for group in self._groups
            for weight in [_weight(layer, group.linears[0])]
        }
        self._searches: dict[ScaledGroup, _Search] = {}
        self._scales: dict[ScaledGroup, Tensor] = {}

    def observe(self, chunk: Chunk) -> Tensor:
        """Note what flows into the linears; returns the layer's output [B, L, H]."""
        with _calls(self._layer, {group.linears[0] for group in self._groups}) as calls:
            output = run_layer(self._layer, chunk)
        for group, statistics in self.statistics.items():
            statistics.add(calls[group.linears[0]].args[0])
        return output

    def weigh(self, chunk: Chunk) -> None:
        """Judge candidate scales on one more chunk."""
        searches = self._searches or self._begin_searches()
        with _calls(self._layer, {group.inspected for group in searches}) as calls:
            run_layer(self._layer, chunk)
        for group, search in searches.items():
            search.weigh(calls.pop(group.inspected))

    @property
    def best_scales(self) -> dict[ScaledGroup, Tensor]:
        """The scales [K] that cost least so far, for each group that can be scaled."""
        return {group: search.best for group, search in self._searches.items()}

    def scale(self) -> None:
        """Apply the best scales."""
        self._scales = {group: self._scale(group, scales) for group, scales in self.best_scales.items()}
        self._searches.clear()

    def round(self) -> dict[str, Tensor]:
        """Clip and round. Returns what is to be stored, by path, on the host; the layer then computes with exactly
        that, in float32."""
        tensors: dict[str, Tensor] = {}
        for group, statistics in self.statistics.items():
            moments = statistics.moments(self._scales.get(group))
            for path in group.linears:
                tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in self._round(path, moments).items()}
        others = {name: value for name, value in self._layer.named_parameters() if name in self._stored}
        return tensors | {name: value.to(self._stored[name]).cpu() for name, value in others.items()}

    def _begin_searches(self) -> dict[ScaledGroup, _Search]:
        self._searches = {
            group: _Search(self._layer, group, self.statistics[group], self._storage)
            for group, scalable in self._groups.items()
            if scalable
        }
        return self._searches

    def _scale(self, group: ScaledGroup, scales: Tensor) -> Tensor:
        """Divide what makes a group's input by `scales`, and multiply its weights by what came of that."""
        absorber = self._layer.get_submodule(group.absorber)
        if isinstance(absorber, nn.Linear):
            absorber.weight.div_(scales.unsqueeze(1))
            if absorber.bias is not None:
                absorber.bias.copy_(_as_stored(absorber.bias / scales, self._stored[f"{group.absorber}.bias"]))
        else:
            scales = self._scale_norm(group, scales)
        for path in group.linears:
            _weight(self._layer, path).mul_(scales)
        return scales

    def _scale_norm(self, group: ScaledGroup, scales: Tensor) -> Tensor:
        """A norm is stored in 16 bit: the scales become what its rounded weight makes of them, so that the linears undo
        them exactly."""
        weight = _weight(self._layer, group.absorber)
        divided = _as_stored(weight / scales, self._stored[f"{group.absorber}.weight"])
        exact = torch.where(divided != 0, weight / divided, scales)
        weight.copy_(divided)
        return exact

    def _round(self, path: str, moments: Tensor) -> dict[str, Tensor]:
        """Clip and round one linear; returns its stored tensors on the host."""
        weight = _weight(self._layer, path)
        if path not in UNCLIPPED:
            largest = search_clip(weight, moments, self._storage)
            weight.copy_(clipped(weight, largest, self._storage.group_size))
        return store_linear(weight, self._storage)


def store_linear(weight: Tensor, storage: Storage) -> dict[str, Tensor]:
    """`weight` [N, K] as it is stored, on the host; `weight` becomes what that stands for. Some rows at a time, since
    packing takes several times the memory of what it packs."""
    parts = []
    for rows in weight.split(slice_rows(weight.shape[1])):
        parts.append({leaf: tensor.cpu() for leaf, tensor in storage.pack(rows).items()})
        rows.copy_(storage.nearest(rows))
    tensors = {leaf: torch.cat([part[leaf] for part in parts], dim=storage.rows_dim) for leaf in parts[0]}
    if SHAPE in storage.layout(weight.shape[1], len(weight)):
        tensors[SHAPE] = torch.tensor(weight.shape, device="cpu")
    return tensors


def slice_rows(in_features: int) -> int:
    """How many rows of a weight to pack at once: whole words of them."""
    return max(1, CLIP_SLICE_WEIGHTS // in_features // NIBBLES_PER_WORD) * NIBBLES_PER_WORD


def round_to_nearest(layer: nn.Module, storage: Storage) -> dict[str, Tensor]:
    """The layer's linears as plain rounding leaves them, by parameter path: what any search has to do better than."""
    return {f"{path}.weight": storage.nearest(_weight(layer, path)) for path in LINEARS}


def run_layer(layer: nn.Module, chunk: Chunk, parameters: Parameters | None = None) -> Tensor:
    """The layer's output [B, L, H] for a chunk, with other `parameters` in place of its own if some are given."""
    return _only(functional_call(layer, dict(parameters or {}), (chunk.hidden,), {"position_embeddings": chunk.rotary}))


@contextmanager
def _calls(layer: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, _Call]]:
    """The calls of some modules inside `layer` while it runs, by path."""
    calls: dict[str, _Call] = {}

    def note(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[path] = _Call(args, kwargs, _only(output))

    with ExitStack() as hooks:
        for path in paths:
            hook: Callable[..., None] = partial(note, path)
            handle = layer.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield calls


def _only(output: Any) -> Tensor:
    """Attention returns its weights beside its output, or None for them."""
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, Tensor)
    return tensor


def _weight(layer: nn.Module, path: str) -> Tensor:
    return layer.get_parameter(f"{path}.weight")


def _below(module: str, path: str) -> str:
    """The name of a linear's weight inside `module`, which may be the linear itself."""
    return f"{path.removeprefix(module)}.weight".lstrip(".")


def _as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, in float32."""
    return values.to(dtype).float()
