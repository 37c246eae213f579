"""Mel frames to samples as they come: the reference's BigVGAN with a memory in every layer.

Each layer keeps the inputs (a transposed convolution the outputs) that the next frames still touch, so that the samples
equal those of the whole utterance; a few within activations are computed again, and less than two frames at the ends.
Padding happens at the true ends only. Sound lags the mel by the receptive field, 33.45 frames; the state, 4.1 MB at the
published size, does not grow.

Layers here take and give [1, C, S], and any length may be 0, but for the last push: it always brings something, as
every layer that looks ahead has kept something back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .carry import Carry, Cell, Snapshot

Function = Callable[[Tensor, int, int], Tensor]
"""Of the samples [1, C, S] that overlapping windows see, and how many of the first and of the last S are padding: one
output per window. It looks its weights up at each use: they may have been elsewhere meanwhile."""


class StreamingVocoder:
    """One utterance through `Qwen2_5OmniToken2WavBigVGANModel`, whose weights are used where they are; its own
    `forward` wants the whole utterance. They are in place while `push` runs, and may be elsewhere in between.
    """

    def __init__(self, vocoder: nn.Module) -> None:
        reference: Any = vocoder
        self._carry = carry = Carry()
        branches = reference.num_residual_blocks
        frame = 1
        layers: list[_Streaming] = [_convolution(reference.conv_pre, carry, frame)]
        for level, (upsample,) in enumerate(reference.ups):
            frame *= upsample.stride[0]
            blocks = reference.resblocks[level * branches : (level + 1) * branches]
            mean = _Mean([_residual_block(block, carry, frame) for block in blocks], carry)
            layers += [_Transposed(upsample, carry), mean]
        layers += [_antialiased(reference.activation_post, carry, frame)]
        layers += [_convolution(reference.conv_post, carry, frame)]
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


class _Windowed:
    """A function of overlapping windows that pads its true ends and keeps the inputs that its next window starts with.

    At the ends its windows are filled up to whole mel frames, of `frame` windows each: libraries prepare a kernel for
    every length they meet, and there each layer would bring lengths of its own.
    """

    def __init__(
        self,
        function: Function,
        carry: Carry,
        *,
        channels: int,
        span: int,
        pad: int,
        mode: Literal["constant", "replicate"],
        frame: int,
    ) -> None:
        self._function, self._channels = function, channels
        self._span, self._pad, self._mode = span, pad, mode
        self._frame = frame
        self._done = carry.cell(0)
        self._tail: Cell[Tensor | None] = carry.cell(None)

    def push(self, x: Tensor, last: bool) -> Tensor:
        x = _join(self._tail.value, x)
        done = self._done.value
        left, right = 0 if done else self._pad, self._pad if last else 0
        windows = left + x.shape[-1] + right - self._span + 1
        if windows <= 0:
            self._tail.value = x.clone()
            return x.new_empty(1, self._channels, 0)
        right += -windows % self._frame
        if left or right:
            x = F.pad(x, (left, right), self._mode)
        self._done.value = done + windows
        self._tail.value = x[..., windows : windows + self._span - 1].clone()
        return self._function(x, max(0, self._pad - done), right)[..., :windows]


class _Transposed:
    """`nn.ConvTranspose1d` that keeps its unfinished outputs, to which the next inputs add."""

    def __init__(self, conv: Any, carry: Carry) -> None:
        self._conv = conv
        (self._crop,), (self._stride,) = conv.padding, conv.stride
        self._skip = carry.cell(self._crop)
        self._tail: Cell[Tensor | None] = carry.cell(None)

    def push(self, x: Tensor, last: bool) -> Tensor:
        if not x.shape[-1]:
            return x.new_empty(1, self._conv.out_channels, 0)
        y = F.conv_transpose1d(x, self._conv.weight, stride=self._stride)
        tail = self._tail.value
        if tail is not None:
            y[..., : tail.shape[-1]] += tail
        final = x.shape[-1] * self._stride
        self._tail.value = y[..., final:].clone()
        y = y[..., : y.shape[-1] - self._crop] if last else y[..., :final]
        skipped = min(self._skip.value, y.shape[-1])
        self._skip.value -= skipped
        return y[..., skipped:] + self._conv.bias[:, None]


def _or_nan(x: Tensor) -> Tensor:
    """The same where it is finite, else NaN."""
    return x + x * 0


def _join(waiting: Tensor | None, x: Tensor) -> Tensor:
    return x if waiting is None else torch.cat((waiting, x), -1)


def _convolution(conv: Any, carry: Carry, frame: int) -> _Windowed:
    """`nn.Conv1d`, stride 1."""
    (taps,), (padding,), (dilation,) = conv.kernel_size, conv.padding, conv.dilation

    def convolve(x: Tensor, before: int, after: int) -> Tensor:
        return F.conv1d(x, conv.weight, conv.bias, dilation=dilation)

    span = (taps - 1) * dilation + 1
    return _Windowed(convolve, carry, channels=conv.out_channels, span=span, pad=padding, mode="constant", frame=frame)


def _antialiased(activation: Any, carry: Carry, frame: int) -> _Windowed:
    """`Qwen2_5OmniAntiAliasedActivation1d`: up by 2, activation, down by 2, each channel through one filter.

    The reference pads its inputs, and once more what it activates, as if that went on at its ends' value.
    """
    up, down, act = activation.upsample, activation.downsample, activation.act
    (channels,) = act.alpha.shape
    rise, fall = up.kernel_size - up.stride, down.kernel_size - down.stride

    def activate(x: Tensor, before: int, after: int) -> Tensor:
        kernel = (up.ratio * up.filter).expand(channels, -1, -1)
        y = _snake(act, F.conv_transpose1d(x, kernel, stride=up.stride, padding=rise, groups=channels))
        before, after = (up.stride * padding - rise // 2 for padding in (before, after))
        if before > 0:
            y[..., :before] = y[..., before, None]
        if after > 0:
            y[..., -after:] = y[..., -after - 1, None]
        return F.conv1d(y, down.filter.expand(channels, -1, -1), stride=down.stride, groups=channels)

    span = (rise + fall) // up.stride + 1
    return _Windowed(activate, carry, channels=channels, span=span, pad=up.pad, mode="replicate", frame=frame)


def _snake(act: Any, x: Tensor) -> Tensor:
    """`Qwen2_5OmniSnakeBeta`, operation by operation, in one tensor of the size of x where that makes three."""
    flatness = (act.beta.exp() + act.no_div_by_zero).reciprocal()
    return (x * act.alpha.exp()[:, None]).sin_().square_().mul_(flatness[:, None]).add_(x)


def _residual_block(block: Any, carry: Carry, frame: int) -> _Chain:
    """`Qwen2_5OmniAMPBlock`: residual pairs of activation and convolution, the first one of each pair dilated."""
    pairs = zip(block.activations[::2], block.convs1, block.activations[1::2], block.convs2, strict=True)
    return _Chain([_residual(act1, conv1, act2, conv2, carry, frame) for act1, conv1, act2, conv2 in pairs])


def _residual(act1: Any, conv1: Any, act2: Any, conv2: Any, carry: Carry, frame: int) -> _Residual:
    layers = (
        _antialiased(act1, carry, frame),
        _convolution(conv1, carry, frame),
        _antialiased(act2, carry, frame),
        _convolution(conv2, carry, frame),
    )
    return _Residual(_Chain(layers), carry)
