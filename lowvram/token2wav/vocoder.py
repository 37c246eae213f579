"""Mel frames to samples as they come: the reference's BigVGAN with a memory in every layer.

Each convolution keeps the inputs (a transposed one the outputs) that the next frames still touch, so nothing is
computed twice and the samples equal those of the whole utterance. Padding happens at its true ends only. Sound lags
the mel by the receptive field, 33.45 frames; the state, 5 MB at the published size, does not grow.

Layers here take and give [1, C, S], and any length may be 0, but for the last push: it always brings something, as
every layer that looks ahead has kept something back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StreamingVocoder:
    """One utterance through `Qwen2_5OmniToken2WavBigVGANModel`, whose weights are in place and whose submodules are
    used as they are; its own `forward` wants the whole utterance."""

    def __init__(self, vocoder: nn.Module) -> None:
        reference: Any = vocoder
        branches = reference.num_residual_blocks
        layers: list[_Streaming] = [_convolution(reference.conv_pre)]
        for level, (upsample,) in enumerate(reference.ups):
            blocks = reference.resblocks[level * branches : (level + 1) * branches]
            layers += [_transposed(upsample), _Mean([_residual_block(block) for block in blocks])]
        layers += [_antialiased(reference.activation_post), _convolution(reference.conv_post)]
        self._network = _Chain(layers)
        self._to_decibel: Callable[[Tensor], Tensor] = reference.process_mel_spectrogram
        self._started = False

    @torch.no_grad()
    def push(self, mel: Tensor, last: bool) -> Tensor:
        """Log-mel [1, M, F] in, the samples [S] that became final out, in -1..1; `last` gives all that are left.

        dtype and device are the weights'. After the last push, 240 samples per frame have come out; an utterance of
        no frames has no samples.
        """
        self._started |= mel.shape[-1] > 0
        if not self._started:
            return mel.new_empty(0)
        return self._network.push(self._to_decibel(mel), last).clamp(-1.0, 1.0).flatten()


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

    def __init__(self, layer: _Streaming) -> None:
        self._layer = layer
        self._waiting: Tensor | None = None

    def push(self, x: Tensor, last: bool) -> Tensor:
        y = self._layer.push(x, last)
        x = _join(self._waiting, x)
        ready = y.shape[-1]
        self._waiting = x[..., ready:].clone()
        return x[..., :ready] + y


class _Mean:
    """The mean of branches with different delays: the quicker ones wait for the slowest."""

    def __init__(self, branches: Sequence[_Streaming]) -> None:
        self._branches = branches
        self._waiting: list[Tensor | None] = [None] * len(branches)

    def push(self, x: Tensor, last: bool) -> Tensor:
        outputs = [
            _join(waiting, branch.push(x, last)) for waiting, branch in zip(self._waiting, self._branches, strict=True)
        ]
        ready = min(y.shape[-1] for y in outputs)
        self._waiting = [y[..., ready:].clone() for y in outputs]
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
        weight: Tensor,
        bias: Tensor | None,
        *,
        pad: tuple[int, int],
        mode: Literal["constant", "replicate"],
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        self._weight, self._bias = weight, bias
        self._pad, self._mode = pad, mode
        self._stride, self._dilation, self._groups = stride, dilation, groups
        self._span = (weight.shape[-1] - 1) * dilation + 1
        self._tail: Tensor | None = None

    def push(self, x: Tensor, last: bool) -> Tensor:
        left, right = self._pad
        if self._tail is None and x.shape[-1]:
            x = F.pad(x, (left, 0), self._mode)
        x = _join(self._tail, x)
        if last:
            x = F.pad(x, (0, right), self._mode)
        windows = max(0, (x.shape[-1] - self._span) // self._stride + 1)
        if x.shape[-1]:
            self._tail = x[..., windows * self._stride :].clone()
        if not windows:
            return x.new_empty(1, self._weight.shape[0], 0)
        return F.conv1d(x, self._weight, self._bias, stride=self._stride, dilation=self._dilation, groups=self._groups)


class _Transposed:
    """conv_transpose1d that keeps its unfinished outputs, to which the next inputs add; `crop` are lost at each end."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, stride: int, crop: tuple[int, int], replicate: int, groups: int
    ) -> None:
        self._weight, self._bias = weight, bias
        self._stride, self._groups = stride, groups
        self._skip, self._crop_right = crop
        self._replicate = replicate
        self._tail: Tensor | None = None

    def push(self, x: Tensor, last: bool) -> Tensor:
        if not x.shape[-1]:
            return x.new_empty(1, self._weight.shape[1] * self._groups, 0)
        edges = (0 if self._tail is not None else self._replicate, self._replicate if last else 0)
        x = F.pad(x, edges, "replicate")
        y = F.conv_transpose1d(x, self._weight, stride=self._stride, groups=self._groups)
        if self._tail is not None:
            y[..., : self._tail.shape[-1]] += self._tail
        final = x.shape[-1] * self._stride
        self._tail = y[..., final:].clone()
        y = y[..., : y.shape[-1] - self._crop_right] if last else y[..., :final]
        skipped = min(self._skip, y.shape[-1])
        self._skip -= skipped
        y = y[..., skipped:]
        return y if self._bias is None else y + self._bias[:, None]


def _join(waiting: Tensor | None, x: Tensor) -> Tensor:
    return x if waiting is None else torch.cat((waiting, x), -1)


def _convolution(conv: Any) -> _Convolution:
    """`nn.Conv1d`, stride 1."""
    (padding,), (dilation,) = conv.padding, conv.dilation
    return _Convolution(conv.weight, conv.bias, pad=(padding, padding), mode="constant", dilation=dilation)


def _transposed(conv: Any) -> _Transposed:
    """`nn.ConvTranspose1d`."""
    (padding,), (stride,) = conv.padding, conv.stride
    return _Transposed(conv.weight, conv.bias, stride=stride, crop=(padding, padding), replicate=0, groups=1)


def _antialiased(activation: Any) -> _Chain:
    """`Qwen2_5OmniAntiAliasedActivation1d`: up by 2, activation, down by 2, each channel through one filter."""
    up, down = activation.upsample, activation.downsample
    (channels,) = activation.act.alpha.shape
    rise = _Transposed(
        (up.ratio * up.filter).expand(channels, -1, -1),
        None,
        stride=up.stride,
        crop=(up.pad_left, up.pad_right),
        replicate=up.pad,
        groups=channels,
    )
    fall = _Convolution(
        down.filter.expand(channels, -1, -1),
        None,
        pad=(down.pad_left, down.pad_right),
        mode="replicate",
        stride=down.stride,
        groups=channels,
    )
    return _Chain([rise, _Pointwise(activation.act), fall])


def _residual_block(block: Any) -> _Chain:
    """`Qwen2_5OmniAMPBlock`: residual pairs of activation and convolution, the first one of each pair dilated."""
    pairs = zip(block.activations[::2], block.convs1, block.activations[1::2], block.convs2, strict=True)
    return _Chain(
        [
            _Residual(_Chain([_antialiased(act1), _convolution(conv1), _antialiased(act2), _convolution(conv2)]))
            for act1, conv1, act2, conv2 in pairs
        ]
    )
