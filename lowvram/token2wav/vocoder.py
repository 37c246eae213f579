"""Mel frames to samples as they come: the reference's BigVGAN with a memory in every layer.

Each convolution keeps the inputs (a transposed one the outputs) that the next frames still touch, so nothing is
computed twice and the samples equal those of the whole utterance. Padding happens at its true ends only. Sound lags
the mel by the receptive field, 33.45 frames; the state, 5 MB at the published size, does not grow.

Layers here take and give [1, C, S], and any length may be 0, but for the last push: it always brings something, as
every layer that looks ahead has kept something back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .carry import Carry, Cell, Snapshot

Kernel = Callable[[], tuple[Tensor, Tensor | None]]
"""A convolution's kernel and bias, looked up at each use: they may have been elsewhere meanwhile."""


class StreamingVocoder:
    """One utterance through `Qwen2_5OmniToken2WavBigVGANModel`, whose submodules are used as they are; its own
    `forward` wants the whole utterance. Its weights are in place while `push` runs, and may be elsewhere in between.
    """

    def __init__(self, vocoder: nn.Module) -> None:
        reference: Any = vocoder
        self._carry = carry = Carry()
        branches = reference.num_residual_blocks
        layers: list[_Streaming] = [_convolution(reference.conv_pre, carry)]
        for level, (upsample,) in enumerate(reference.ups):
            blocks = reference.resblocks[level * branches : (level + 1) * branches]
            layers += [_transposed(upsample, carry), _Mean([_residual_block(block, carry) for block in blocks], carry)]
        layers += [_antialiased(reference.activation_post, carry), _convolution(reference.conv_post, carry)]
        self._network = _Chain(layers)
        self._to_decibel: Callable[[Tensor], Tensor] = reference.process_mel_spectrogram
        self._started = carry.cell(False)

    @torch.no_grad()
    def push(self, mel: Tensor, last: bool) -> Tensor:
        """Log-mel [1, M, F] in, the samples [S] that became final out, in -1..1; `last` gives all that are left.

        dtype and device are the weights'. After the last push, 240 samples per frame have come out; an utterance of
        no frames has no samples. What comes of infinities is NaN, where clipping would make it loud sound.
        """
        self._started.value |= mel.shape[-1] > 0
        if not self._started.value:
            return mel.new_empty(0)
        samples = self._network.push(self._to_decibel(_or_nan(mel)), last)
        return _or_nan(samples).clamp(-1.0, 1.0).flatten()

    @property
    def state_bytes(self) -> int:
        """What is held between pushes."""
        return self._carry.n_bytes

    def snapshot(self) -> Snapshot:
        """All that is held now, without a copy: for `restore`, where a push failed."""
        return self._carry.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Be as when the snapshot was taken."""
        self._carry.restore(snapshot)


class _Streaming(Protocol):
    def push(self, x: Tensor, last: bool) -> Tensor:
        """The next inputs; returns the outputs that no later input can change, all that are left when `last`."""


class _Chain:
    """Layers one after another."""

    def __init__(self, layers: Sequence[_Streaming]) -> None:
        self._layers = layers

    def push(self, x: Tensor, last: bool) -> Tensor:
        for layer in self._layers:
            x = layer.push(x, last)
        return x


class _Residual:
    """x + layer(x): the inputs wait for the layer's delay."""

    def __init__(self, layer: _Streaming, carry: Carry) -> None:
        self._layer = layer
        self._waiting: Cell[Tensor | None] = carry.cell(None)

    def push(self, x: Tensor, last: bool) -> Tensor:
        y = self._layer.push(x, last)
        x = _join(self._waiting.value, x)
        ready = y.shape[-1]
        self._waiting.value = x[..., ready:].clone()
        return x[..., :ready] + y


class _Mean:
    """The mean of branches with different delays: the quicker ones wait for the slowest."""

    def __init__(self, branches: Sequence[_Streaming], carry: Carry) -> None:
        self._branches = branches
        self._waiting: list[Cell[Tensor | None]] = [carry.cell(None) for _ in branches]

    def push(self, x: Tensor, last: bool) -> Tensor:
        outputs = [
            _join(waiting.value, branch.push(x, last))
            for waiting, branch in zip(self._waiting, self._branches, strict=True)
        ]
        ready = min(y.shape[-1] for y in outputs)
        for waiting, y in zip(self._waiting, outputs, strict=True):
            waiting.value = y[..., ready:].clone()
        return torch.stack([y[..., :ready] for y in outputs]).mean(0)


class _Pointwise:
    """A function of each sample alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def push(self, x: Tensor, last: bool) -> Tensor:
        return self._function(x)


class _Convolution:
    """conv1d that pads its true ends and keeps the inputs that its next window starts with."""

    def __init__(
        self,
        kernel: Kernel,
        carry: Carry,
        *,
        pad: tuple[int, int],
        mode: Literal["constant", "replicate"],
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        self._kernel = kernel
        self._pad, self._mode = pad, mode
        self._stride, self._dilation, self._groups = stride, dilation, groups
        self._tail: Cell[Tensor | None] = carry.cell(None)

    def push(self, x: Tensor, last: bool) -> Tensor:
        weight, bias = self._kernel()
        left, right = self._pad
        if self._tail.value is None and x.shape[-1]:
            x = F.pad(x, (left, 0), self._mode)
        x = _join(self._tail.value, x)
        if last:
            x = F.pad(x, (0, right), self._mode)
        span = (weight.shape[-1] - 1) * self._dilation + 1
        windows = max(0, (x.shape[-1] - span) // self._stride + 1)
        if x.shape[-1]:
            self._tail.value = x[..., windows * self._stride :].clone()
        if not windows:
            return x.new_empty(1, weight.shape[0], 0)
        return F.conv1d(x, weight, bias, stride=self._stride, dilation=self._dilation, groups=self._groups)


class _Transposed:
    """conv_transpose1d that keeps its unfinished outputs, to which the next inputs add; `crop` are lost at each end."""

    def __init__(
        self, kernel: Kernel, carry: Carry, *, stride: int, crop: tuple[int, int], replicate: int, groups: int
    ) -> None:
        self._kernel = kernel
        self._stride, self._groups = stride, groups
        crop_left, self._crop_right = crop
        self._replicate = replicate
        self._skip = carry.cell(crop_left)
        self._tail: Cell[Tensor | None] = carry.cell(None)

    def push(self, x: Tensor, last: bool) -> Tensor:
        weight, bias = self._kernel()
        if not x.shape[-1]:
            return x.new_empty(1, weight.shape[1] * self._groups, 0)
        tail = self._tail.value
        x = F.pad(x, (0 if tail is not None else self._replicate, self._replicate if last else 0), "replicate")
        y = F.conv_transpose1d(x, weight, stride=self._stride, groups=self._groups)
        if tail is not None:
            y[..., : tail.shape[-1]] += tail
        final = x.shape[-1] * self._stride
        self._tail.value = y[..., final:].clone()
        y = y[..., : y.shape[-1] - self._crop_right] if last else y[..., :final]
        skipped = min(self._skip.value, y.shape[-1])
        self._skip.value -= skipped
        y = y[..., skipped:]
        return y if bias is None else y + bias[:, None]


def _or_nan(x: Tensor) -> Tensor:
    """The same where it is finite, else NaN."""
    return x + x * 0


def _join(waiting: Tensor | None, x: Tensor) -> Tensor:
    return x if waiting is None else torch.cat((waiting, x), -1)


def _kernel_of(conv: Any) -> tuple[Tensor, Tensor | None]:
    return conv.weight, conv.bias


def _convolution(conv: Any, carry: Carry) -> _Convolution:
    """`nn.Conv1d`, stride 1."""
    (padding,), (dilation,) = conv.padding, conv.dilation
    return _Convolution(partial(_kernel_of, conv), carry, pad=(padding, padding), mode="constant", dilation=dilation)


def _transposed(conv: Any, carry: Carry) -> _Transposed:
    """`nn.ConvTranspose1d`."""
    (padding,), (stride,) = conv.padding, conv.stride
    return _Transposed(partial(_kernel_of, conv), carry, stride=stride, crop=(padding, padding), replicate=0, groups=1)


def _antialiased(activation: Any, carry: Carry) -> _Chain:
    """`Qwen2_5OmniAntiAliasedActivation1d`: up by 2, activation, down by 2, each channel through one filter."""
    up, down = activation.upsample, activation.downsample
    (channels,) = activation.act.alpha.shape
    rise = _Transposed(
        lambda: ((up.ratio * up.filter).expand(channels, -1, -1), None),
        carry,
        stride=up.stride,
        crop=(up.pad_left, up.pad_right),
        replicate=up.pad,
        groups=channels,
    )
    fall = _Convolution(
        lambda: (down.filter.expand(channels, -1, -1), None),
        carry,
        pad=(down.pad_left, down.pad_right),
        mode="replicate",
        stride=down.stride,
        groups=channels,
    )
    return _Chain([rise, _Pointwise(activation.act), fall])


def _residual_block(block: Any, carry: Carry) -> _Chain:
    """`Qwen2_5OmniAMPBlock`: residual pairs of activation and convolution, the first one of each pair dilated."""
    pairs = zip(block.activations[::2], block.convs1, block.activations[1::2], block.convs2, strict=True)
    return _Chain([_residual(act1, conv1, act2, conv2, carry) for act1, conv1, act2, conv2 in pairs])


def _residual(act1: Any, conv1: Any, act2: Any, conv2: Any, carry: Carry) -> _Residual:
    layers = (
        _antialiased(act1, carry),
        _convolution(conv1, carry),
        _antialiased(act2, carry),
        _convolution(conv2, carry),
    )
    return _Residual(_Chain(layers), carry)
