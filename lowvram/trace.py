"""The real code as the estimate: runs a turn's own stages at full size on tensors without data, and counts what lives.

torch's `meta` device stands for the card: an operator there makes a result of the right size and computes nothing, so
neither weights nor a GPU are needed. What crosses to the host arrives as zeros, and the ids that are drawn follow a
script: a few words of text, then speech until each of its kinds of step has been seen. Everything else is the code
that serves a real card, with its attention taken for flash attention and its 4-bit linears dequantized by slices.

Skipped is repeated work, and only that. A layer runs once for each combination of its place (first, last, in between),
its inputs' shapes and what lies in its cache (nothing, something, all of the prompt but this chunk); an equal call
after that only fills the cache and makes the result. Caches are allocated whole, so a longer answer holds no more.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .checkpoint import NUMPY_DTYPE, Checkpoint, Headers, TensorEntry, TensorReader
from .flow import AudioInput, ModelInputs, VisualInput
from .kv_cache import KVCache
from .model import Decoder, OmniModel, build_model
from .offload.allocator import CachingAllocator
from .offload.block import Block
from .offload.budget import Budget, format_bytes
from .offload.meter import LiveBytes
from .offload.plan import Plan
from .offload.plan import Turn as Workload
from .offload.profile import SIMULATED_ALLOCATOR, TRACED, MemoryProfile
from .offload.residency import Residency
from .offload.transfer import Transfer
from .options import SamplingParams, SpeechParams
from .quant.reference import ReferenceBackend
from .recall import Reading
from .room import Control
from .sampling import Sampler
from .token2wav.conditioning import Speaker
from .token2wav.ode import solver_stages, time_grid
from .token2wav.windows import chunk_codes, first_sound_codes
from .turn import Machine, Request, Turn, Voice

log = logging.getLogger(__name__)

DEVICE = torch.device("meta")
"""Stands for the card. Tensors of the host are real."""

TEXT_TOKENS = 3
"""Written before the stop token: the first step, and two that are like all others."""

FRAMES_PER_SOUND_TOKEN = 4
"""Mel frames: a convolution of stride 2, then pairs averaged."""

ID, STOP_ID = 0, 1
"""What is drawn: an ordinary id of either vocabulary, and the one that ends a text."""

LAYERED = ("audio_tower", "visual", "thinker", "talker")


def traceable_model(headers: Headers, dtype: torch.dtype = torch.float16) -> OmniModel:
    """The model of a checkpoint of which only the headers are known: no weight need be on this disk."""
    tensors = {
        name: TensorEntry(name, Path(headers.name), header.dtype, header.shape, 0, header.n_bytes)
        for name, header in headers.tensors.items()
    }
    checkpoint = Checkpoint(headers.name, Path(headers.name), dict(headers.config), {}, tensors)
    return build_model(checkpoint, _Unread(), device=DEVICE, dtype=dtype, backend=ReferenceBackend("the trace's"))


def trace_turn(
    model: OmniModel,
    plan: Plan,
    workload: Workload,
    speech: SpeechParams | None = None,
    *,
    ledger: LiveBytes | None = None,
) -> MemoryProfile:
    """Run the turn that `plan` was made for, and count the device's live bytes: planned beside traced, and a timeline.

    The turn speaks if the plan has codes, as `speech` says. What may come ahead of its phase is all there as soon as
    the phase before has loaded: no more of it can be held. No column includes tables that stay and what operators use
    inside themselves. What an allocator makes of it is simulated, at the plan's budget: a warning is logged where it
    would run out. A `ledger` of one's own (`LiveBytes("meta", explain=True)`) can be asked afterwards what was held at
    each peak, and needs no allocator.
    """
    assert plan.prompt_tokens == workload.prompt_tokens, "plan and prompt belong to different turns"
    assert not (plan.codes and workload.is_conditioned), "a trace has no earlier turn to know a voice from"
    ledger = ledger or LiveBytes(DEVICE.type, allocator=allocator_of(plan))
    speech = speech or SpeechParams()
    model.speak_in(getattr(torch, speech.dtype))
    machine = _machine(model, plan, ledger)
    control = Control(Budget(plan.budget_bytes, plan.ram_bytes))
    turn = _TracedTurn(machine, _request(model, plan, workload, speech), control, time.perf_counter())
    with _HostSide(_script(model, speech)), ledger:
        for _ in turn.run():
            pass
        machine.residency.release()
    return _with_reserved(MemoryProfile.of(plan), plan, ledger).add(TRACED, ledger.peaks, ledger.timeline)


def allocator_of(plan: Plan) -> CachingAllocator:
    """The allocator of a card of the plan's budget, on which the context is made and kernels have what they work in."""
    allocator = CachingAllocator(None if plan.budget_bytes is None else plan.budget_bytes - plan.context_bytes)
    if plan.workspace_bytes:
        allocator.allocate(plan.workspace_bytes)
    return allocator


def _with_reserved(profile: MemoryProfile, plan: Plan, ledger: LiveBytes) -> MemoryProfile:
    """The profile with what was reserved for tensors, where there was an allocator."""
    if not ledger.allocator:
        return profile
    if short_bytes := ledger.allocator.short_bytes:
        log.warning("a card's allocator would run out by %s: it reserves more than lives", format_bytes(short_bytes))
    reserved = {phase: n_bytes - plan.workspace_bytes for phase, n_bytes in ledger.reserved_peaks.items()}
    return profile.add(SIMULATED_ALLOCATOR, reserved)


def _machine(model: OmniModel, plan: Plan, ledger: LiveBytes) -> Machine:
    trim = ledger.allocator.empty_cache if ledger.allocator else model.transfer.trim
    components = {name: [_Emptied(block) for block in blocks] for name, blocks in model.components.items()}
    decoders = {"thinker": model.thinker} | ({"talker": model.speech.decoder} if model.speech else {})
    return Machine(
        model=model,
        residency=_BrisklyWalked(components, model.transfer, decoders, plan.prompt_tokens, trim),
        trim=trim,
        free_bytes=lambda: None,
        device=DEVICE,
        meter=ledger,
        stop_ids=frozenset([STOP_ID]),
        detokenize=lambda ids: "." * len(ids),
    )


def _request(model: OmniModel, plan: Plan, workload: Workload, speech: SpeechParams) -> Request:
    def no_other(*_: object) -> Plan:
        raise AssertionError("a device without bounds is never short of room")

    return Request(
        reading=Reading(_inputs(model, workload)),
        plan=plan,
        replan=no_other,
        sampling=SamplingParams(max_tokens=plan.text_tokens),
        speech=replace(speech, sampling=replace(speech.sampling, max_tokens=max(1, plan.codes))),
        voice=_voice(model, workload.voice_frames) if plan.codes else None,
    )


def _inputs(model: OmniModel, workload: Workload) -> ModelInputs:
    """A prompt of zeros: pictures, one sound, words. The sound's last window is taken to be full, if there is room."""
    visuals, row, merged = [], 0, model.vision.merge_size**2
    for grid in workload.grids:
        rows = torch.arange(row, row + math.prod(grid) // merged)
        visuals.append(VisualInput(grid, rows, _blank(model, grid)))
        row += len(rows)
    per_window = model.hearing.window_frames // FRAMES_PER_SOUND_TOKEN
    sound_tokens = min(workload.audio_windows * per_window, workload.prompt_tokens - row)
    mel = torch.zeros(_mel_bins(model), sound_tokens * FRAMES_PER_SOUND_TOKEN)
    audios = (AudioInput(mel, torch.arange(row, row + sound_tokens)),) if sound_tokens else ()
    nowhere = torch.zeros(3, workload.prompt_tokens, dtype=torch.long)
    return ModelInputs(nowhere[0], nowhere, workload.prompt_tokens, tuple(visuals), audios)


def _blank(model: OmniModel, grid: tuple[int, int, int]) -> Any:
    """Temporal patches of nothing."""
    times, height, width = grid
    patch_elements = math.prod(model.components["visual"][-1].module.get_parameter("patch_embed.proj.weight").shape[1:])
    return lambda: (torch.zeros(height * width, patch_elements) for _ in range(times))


def _mel_bins(model: OmniModel) -> int:
    return model.components["audio_tower"][-1].module.get_parameter("conv1.weight").shape[1]


def _voice(model: OmniModel, frames: int) -> Voice:
    config: Any = model.components["dit"][-1].module.config
    speaker = Speaker(torch.zeros(1, config.enc_emb_dim), torch.zeros(1, frames, config.mel_dim))
    return Voice("traced", ID, speaker)


class _Unread(TensorReader):
    """Reads nothing: rows of a table are zeros, all of them the same memory."""

    def read_into(self, entry: TensorEntry, buffer: memoryview, start: int = 0) -> None:
        pass

    def rows(self, entry: TensorEntry) -> Any:
        return np.lib.stride_tricks.as_strided(np.zeros(1, NUMPY_DTYPE[entry.dtype]), entry.shape, (0, 0))


class _Emptied:
    """A block without weights to read."""

    def __init__(self, block: Block) -> None:
        self.name, self.n_bytes, self.module = block.name, block.n_bytes, block.module
        self.bind, self.unbind = block.bind, block.unbind

    def fill(self, run: Tensor) -> None:
        pass


class _BrisklyWalked(Residency):
    """Weights where the plan has them; layers that skip what they have done before."""

    def __init__(
        self,
        components: Mapping[str, Sequence[Block]],
        transfer: Transfer,
        decoders: Mapping[str, Decoder],
        prompt_tokens: int,
        empty_cache: Callable[[], None],
    ) -> None:
        super().__init__(components, transfer)
        self._empty_cache = empty_cache
        self._decoders = decoders
        self._prompt_tokens = prompt_tokens
        self._brisk = {name: self._brisk_layers(name, len(components.get(name, ())) - 1) for name in LAYERED}

    def _trim(self) -> None:
        self._empty_cache()

    def component(self, name: str) -> tuple[Any, ...]:
        uses = super().component(name)
        if name not in LAYERED:
            return uses
        *layers, rest = uses
        return (*(_BriskUse(*pair) for pair in zip(layers, self._brisk[name], strict=True)), rest)

    def _brisk_layers(self, name: str, n_layers: int) -> list[_Brisk]:
        seen: dict[tuple[Any, ...], type] = {}
        last = n_layers - 1
        places = (index if index in (0, last) else 1 for index in range(n_layers))
        decoder = self._decoders.get(name)
        return [_Brisk(index, place, seen, decoder, self._prompt_tokens) for index, place in enumerate(places)]


class _BriskUse:
    """Enters a layer's block for its weights, and gives the layer that skips repeated work."""

    def __init__(self, use: AbstractContextManager[nn.Module], brisk: _Brisk) -> None:
        self._use = use
        self._brisk = brisk

    def __enter__(self) -> nn.Module:
        self._brisk.layer = self._use.__enter__()
        return self._brisk

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._use.__exit__(kind, error, trace)


class _Brisk(nn.Module):
    """Runs `layer` on calls unlike all before, among its fellows in `seen`; on others fills its cache and makes room
    for the result."""

    layer: nn.Module

    def __init__(
        self,
        index: int,
        place: int,
        seen: dict[tuple[Any, ...], type],
        decoder: Decoder | None,
        prompt_tokens: int,
    ) -> None:
        super().__init__()
        self._index = index
        self._place = place
        self._seen = seen
        self._decoder = decoder
        self._prompt_tokens = prompt_tokens

    def forward(self, hidden: Tensor, **inputs: Any) -> Any:
        cache: KVCache | None = inputs.get("past_key_values")
        call = (
            self._place,
            hidden.shape,
            inputs.get("windows"),
            None if cache is None else self._past(cache.get_seq_length(self._index), hidden.shape[1]),
        )
        if call not in self._seen:
            result = self.layer(hidden, **inputs)
            self._seen[call] = type(result)
            return result
        if cache is not None:
            self._advance(cache, hidden)
        result = torch.empty_like(hidden)
        return (result,) if self._seen[call] is tuple else result

    def get_submodule(self, target: str) -> nn.Module:
        """A part of the layer, for a stage that walks it by parts: nothing is skipped then."""
        return self.layer.get_submodule(target)

    def _past(self, held: int, n: int) -> str:
        return "whole" if held + n == self._prompt_tokens else "some" if held else "none"

    def _advance(self, cache: KVCache, hidden: Tensor) -> None:
        assert self._decoder
        shape = (1, self._decoder.kv_heads, hidden.shape[1], self._decoder.head_dim)
        heads = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
        cache.update(heads, heads, self._index)


class _TracedTurn(Turn):
    """A turn whose random numbers are the host's: the traced device makes none."""

    def _sampler(self, params: SamplingParams, **options: Any) -> Sampler:
        return _HostDrawn(params, **options)


class _HostDrawn(Sampler):
    """Weighs on the traced device, draws on the host."""

    def __init__(self, params: SamplingParams, **options: Any) -> None:
        super().__init__(params, device=torch.device("cpu"), **options)
        self._suppressed, self._seen = self._suppressed.to(DEVICE), self._seen.to(DEVICE)


def _script(model: OmniModel, speech: SpeechParams) -> Mapping[int, Iterator[int]]:
    """The ids to draw, by the size of the vocabulary drawn from.

    Speech goes on until a chunk has sounded and one is left unfinished, which ends in all that waited.
    """
    script = {len(model.embed_tokens): _say(TEXT_TOKENS, STOP_ID)}
    if model.speech:
        evaluations = len(solver_stages(speech.solver, time_grid(speech.steps)))
        chunk = chunk_codes(speech.chunk_s)
        codes = math.ceil(first_sound_codes(evaluations, speech.mode, speech.chunk_s) / chunk) * chunk + chunk // 2
        assert len(model.speech.codec_embed) not in script, "two vocabularies of one size cannot be told apart"
        script[len(model.speech.codec_embed)] = _say(codes, model.speech.codec_ids.end)
    return script


def _say(n: int, end: int) -> Iterator[int]:
    yield from (ID for _ in range(n))
    while True:
        yield end


class _HostSide(TorchDispatchMode):
    """What the host gets from a device without data: zeros where a tensor is copied to it, and, where it asks for an
    id that was drawn, the next one of the script."""

    def __init__(self, script: Mapping[int, Iterator[int]]) -> None:
        super().__init__()
        self._script = script
        self._drawn = ID

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        if func is aten.max.dim and args[0].is_meta and args[0].numel() in self._script:
            self._drawn = next(self._script[args[0].numel()])
        elif func is aten._local_scalar_dense.default and args[0].is_meta:
            return self._drawn
        elif func is aten._to_copy.default and args[0].is_meta and _goes_to_host(kwargs):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
        elif func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].zero_()
        return func(*args, **kwargs)


def _goes_to_host(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"
