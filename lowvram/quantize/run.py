"""The walk that quantizes: layer by layer, straight from the 16-bit checkpoint's files to the new one's.

One layer is on the device at a time, in float32; calibration rows wait in a file between layers. Every layer sees what
the 16-bit layers before it hand on, as with AutoAWQ, so that its scales do not make up for the errors of others. A run
that is stopped goes on after its last finished layer, and ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import (
    Checkpoint,
    TensorEntry,
    TensorHeader,
    TensorReader,
    open_checkpoint,
    stored_dtype,
)
from ..checkpoint_writer import (
    stored_pieces,
    tensor_bytes,
    write_shard,
)
from ..device import Device, choose_dtype
from ..errors import BudgetExceededError, CheckpointError, OptionError
from ..events import Progress
from ..hub import OnProgress
from ..model import EMBED_TOKENS, LM_HEAD, OmniModel, build_model
from ..offload.budget import format_bytes
from ..offload.residency import Residency
from ..offload.transfer import TORCH_DTYPE
from ..preprocess import Preprocessor
from ..quant.layer import LayerQuantizer, round_to_nearest
from ..quant.recipe import LINEARS
from ..quant.reference import ReferenceBackend
from ..quant.storage import AWQStorage, Storage, compressed
from .agreement import ByToken, HeadComparison, agreements
from .finish import finish_checkpoint, quantized_config
from .layout import layer_prefix, plan_layout
from .options import ALSO, LAYERS, Agreement, Deviations, LayerReport, PartReport, QuantizeOptions, QuantizeReport
from .parts import HEAD_PART, PartWriter, find_part, read_rows
from .rows import CHUNK_TOKENS, QUANTIZED, ROUNDED, SIXTEEN_BIT, TRACKS, HeldOut, RowFile, Samples
from .samples import Block, Choice, Embedder, Run, choose_blocks, embedded_blocks, gather_runs, phase_with
from .source import fingerprint, name_only, published_config, refuse_demo, refuse_quantized
from .state import Unfinished, require_new_or_unfinished, require_room

RECIPE = 2
"""Raise it when the same options begin to give other bytes, so that no run is finished differently than it began."""

CALIBRATION, HELD_OUT = "calibration", "held_out"

ROW_DTYPE = {CALIBRATION: torch.bfloat16, HELD_OUT: torch.float32}
"""Of rows between two layers: the 16-bit model hands on no more either; but what is compared is not to be rounded."""

ROW_TRACKS = {CALIBRATION: 1, HELD_OUT: TRACKS}

COMPARED_TOKENS = 2048
"""Held-out tokens whose next words are compared at once: four models' hidden states are then 112 MiB for a 7B."""

GO_ON = "once there is room, the same command goes on where it stopped"

Event = Progress | Deviations | LayerReport | PartReport | QuantizeReport


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    options: QuantizeOptions,
    *,
    device: Device,
    on_download: OnProgress | None = None,
) -> Iterator[Event]:
    """Write the checkpoint `source` (16 bit; a folder or a hub id) into the folder `target`, quantized as asked.

    Yields how that deviates from the published recipe, if it does, before anything is written; then progress, a report
    for each part and layer (those of an unfinished run that it continues, too) and one for the whole. Closing the
    iterator stops the run; with the same arguments it goes on later.

    Raises CheckpointError for a source that cannot be read, is quantized already or computes what is not a number,
    UnsupportedQuantError for groups that do not divide its linears, OptionError for a target that holds something else,
    a disk that is too small, another process at work there or too little to calibrate on, MediaError for media that
    cannot be used, and BudgetExceededError where the device runs out.
    """
    refuse_demo(source)
    checkpoint = open_checkpoint(source, on_progress=on_download)
    refuse_quantized(checkpoint)
    with (
        _disk_told(target),
        _shortage_told(device, "building the model"),
        TensorReader() as reader,
        _skeleton(checkpoint, reader, device, torch.float32) as model,
    ):
        yield from _Quantization(checkpoint, reader, model, Path(target).expanduser(), options, device).run()


class _Quantization:
    """One run, from whatever has been done of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        reader: TensorReader,
        model: OmniModel,
        target: Path,
        options: QuantizeOptions,
        device: Device,
    ) -> None:
        self._checkpoint = checkpoint
        self._tensors = checkpoint.tensors
        self._reader = reader
        self._model = model
        self._target = target
        self._options = options
        self._device = device
        self._state = Unfinished(target)
        self._width = model.embed_tokens.width
        *layers, rest = model.components["thinker"]
        self._layer_names = [block.stored_names for block in layers]
        headers = {name: TensorHeader(entry.dtype, entry.shape) for name, entry in self._tensors.items()}
        self._storage = _thinker_storage(options)
        besides = compressed(options.also_bits, options.group_size)
        self._parts = [find_part(name, headers, besides) for name in ALSO if name in options.also]
        self._layout = plan_layout(headers, self._layer_names, self._storage, self._parts)
        self._names = [block.name for block in (*layers, rest)]
        # Each block a component of its own, so that it can be on the device alone.
        self._residency = Residency({block.name: (block,) for block in (*layers, rest)}, model.transfer)

    @torch.inference_mode()
    def run(self) -> Iterator[Event]:
        if self._deviations:
            yield Deviations(self._deviations)
        self._require_place()
        chosen = None if self._has_begun else self._choose_samples()
        with self._state.alone():
            begun = self._has_begun  # choosing takes a while, in which another process may have come further
            self._state.open_run(self._record(), begun=begun)
            if chosen and not begun:
                with _shortage_told(self._device, "encoding media", "smaller pictures and clips in --calibrate"):
                    yield from self._embed_samples(*chosen)
            yield from self._copy_others()
            yield from self._quantize_parts()
            calibrated, held_out = self._samples(CALIBRATION), self._samples(HELD_OUT)
            layers = yield from self._quantize_layers(calibrated, held_out)
            agreeing = yield from self._compare_next_words(held_out)
            report = self._report(layers, agreeing, calibrated, held_out)
            self._finish(report)
        self._state.discard()
        yield report

    @property
    def _has_begun(self) -> bool:
        return self._state.read(HELD_OUT) is not None

    @property
    def _deviations(self) -> tuple[str, ...]:
        if self._options.follows_the_recipe:
            return ()
        thinker = (f"thinker: its layers in {self._options.bits} bits instead of 4",) if self._options.bits != 4 else ()
        written = "all of it is written as compressed-tensors instead of AWQ"
        return (*thinker, *(part.sentence for part in self._parts), written)

    def _require_place(self) -> None:
        """There is a new folder or one of ours, and room for all of it."""
        require_new_or_unfinished(self._target)
        require_room(self._target, self._layout.file_bytes + self._rows_bytes(), self._checkpoint.name)

    def _rows_bytes(self) -> int:
        """Of the rows before a layer and after it, at most: held-out ones are an eighth as many as calibrated ones."""
        row_bytes = self._width * (ROW_DTYPE[CALIBRATION].itemsize + TRACKS * ROW_DTYPE[HELD_OUT].itemsize / 8)
        return round(2 * self._options.samples * self._options.sample_tokens * row_bytes)

    def _record(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        options = asdict(self._options) | {"calibrate": [str(Path(p).absolute()) for p in self._options.calibrate]}
        return {
            "recipe": RECIPE,
            "weights": fingerprint(self._checkpoint, self._reader),
            "device": self._device.torch.type,
            **options,
        }

    def _copy_others(self) -> Iterator[Progress]:
        """Copy every tensor that stays as it is."""
        done, total = 0, self._layout.copied_bytes
        for file, tensors in self._layout.copied.items():
            if (self._target / file).exists():
                done += sum(header.n_bytes for header in tensors.values())
                continue
            for n_bytes in write_shard(self._target / file, tensors, self._pieces):
                done += n_bytes
                yield Progress("copy", done, total, "bytes")

    def _pieces(self, name: str) -> Iterator[memoryview]:
        return stored_pieces(self._reader, self._tensors[name])

    def _quantize_parts(self) -> Iterator[Progress | PartReport]:
        """Write the file of each part that is quantized besides the thinker."""
        for part, (file, headers) in zip(self._parts, self._layout.parts.items(), strict=True):
            kept = f"part-{part.name}"
            if self._state.read(kept) is None:
                writer = PartWriter(part, self._tensors, self._reader, self._device.torch)
                done, total = 0, sum(header.n_bytes for header in headers.values())
                with _shortage_told(self._device, f"quantizing {part.name}"):
                    for n_bytes in write_shard(self._target / file, headers, writer.pieces):
                        done += n_bytes
                        yield Progress(f"quantize {part.name}", done, total, "bytes")
                self._state.keep(kept, asdict(writer.report))
            yield self._part_report(part.name)

    def _part_report(self, name: str) -> PartReport:
        kept = self._state.read(f"part-{name}")
        return PartReport(**kept | {"left_alone": tuple(kept["left_alone"])})

    def _choose_samples(self) -> tuple[Sequence[Run], Choice]:
        """Read what there is to calibrate on, as far as it takes to choose from it. What is wrong with that is said
        before anything is written."""
        options = self._options
        preprocessor = Preprocessor(self._checkpoint.folder, self._checkpoint.config)
        runs = gather_runs(preprocessor, options.calibrate, seed=options.seed)
        lengths = [run.length for run in runs]
        return runs, choose_blocks(
            lengths, samples=options.samples, sample_tokens=options.sample_tokens, seed=options.seed
        )

    def _embed_samples(self, runs: Sequence[Run], choice: Choice) -> Iterator[Progress]:
        """Turn texts and media into the rows that the first layer reads."""
        with self._embedding_model(len(runs) > 1) as model, Embedder(model, self._device.torch) as embedder:
            yield from self._embed(CALIBRATION, embedder, runs, choice.calibrated)
            yield from self._embed(HELD_OUT, embedder, runs, choice.held_out)

    def _embedding_model(self, with_media: bool) -> AbstractContextManager[OmniModel]:
        """Encoders compute in 16 bit, as for an answer: in float32 they would take twice the room."""
        if not with_media:
            return nullcontext(self._model)
        dtype = choose_dtype("auto", self._device.torch, stored_dtype(self._checkpoint.config))
        return _skeleton(self._checkpoint, self._reader, self._device, dtype)

    def _embed(self, kind: str, embedder: Embedder, runs: Sequence[Run], blocks: Sequence[Block]) -> Iterator[Progress]:
        tokens = sum(block.length for block in blocks)
        positions = torch.empty(3, tokens, dtype=torch.int64, device="cpu")
        done = 0
        with self._state.writing_rows(f"{kind}-0", self._width, ROW_DTYPE[kind]) as rows:
            for start, embeds, places in embedded_blocks(embedder, runs, blocks):
                _require_finite(embeds, "the encoders or the embedding table")
                positions[:, start : start + len(embeds)] = places
                for track in range(ROW_TRACKS[kind]):
                    rows.write(track * tokens + start, embeds)
                done += len(embeds)
                yield Progress(f"embed {kind.replace('_', '-')} samples", done, tokens, "tokens")
        lengths = [block.length for block in blocks]
        self._state.keep(kind, {"lengths": lengths, "positions": positions.tolist()})

    def _samples(self, kind: str) -> Samples:
        kept = self._state.read(kind)
        positions = torch.tensor(kept["positions"], device="cpu")
        return Samples(tuple(kept["lengths"]), positions, self._model.thinker.rotary, self._device.torch)

    def _quantize_layers(
        self, calibrated: Samples, held_out: Samples
    ) -> Generator[Progress | LayerReport, None, list[LayerReport]]:
        """Quantize the layers that are left; returns the reports of all."""
        reports = []
        for index in range(len(self._layer_names)):
            if self._state.read(f"layer-{index}") is None:
                with _shortage_told(self._device, f"quantizing {self._layer_stage(index)}", self._shorter_samples):
                    yield from self._quantize_layer(index, calibrated, held_out)
            yield Progress(LAYERS, index + 1, len(self._layer_names), "layers")
            reports.append(LayerReport(**self._state.read(f"layer-{index}")))
            yield reports[-1]
        return reports

    def _quantize_layer(self, index: int, calibrated: Samples, held_out: Samples) -> Iterator[Progress]:
        """Quantize a layer, write its file, and take the rows past it."""
        with ExitStack() as stack:
            layer = stack.enter_context(self._on_device(self._names[index]))
            (rows, next_rows), held_rows = (
                [stack.enter_context(opened) for opened in self._row_files(kind, index)]
                for kind in (CALIBRATION, HELD_OUT)
            )
            judged = HeldOut(held_out, layer, *held_rows)
            quantizer = LayerQuantizer(layer, self._storage, self._float_dtypes(index))
            stage, total = self._layer_stage(index), 2 * calibrated.tokens
            for start, chunk in calibrated.chunks(rows):
                output = quantizer.observe(chunk).flatten(0, 1)
                _require_finite(output, layer_prefix(index).rstrip("."))
                next_rows.write(start, output)
                yield Progress(stage, start + len(output), total, "tokens")
            rounded_error = self._judge_rounded(judged)
            for start, chunk in calibrated.chunks(rows):
                quantizer.weigh(chunk)
                yield Progress(stage, calibrated.tokens + start + chunk.tokens, total, "tokens")
            quantizer.scale()
            tensors = quantizer.round()
            report = LayerReport(index, rounded_error, judged.error())
            judged.advance(QUANTIZED)
        self._keep_layer(report, tensors)

    def _layer_stage(self, index: int) -> str:
        return f"layer {index + 1} of {len(self._layer_names)}"

    @property
    def _shorter_samples(self) -> str:
        """What takes less room in a layer: samples beyond a chunk, which are computed whole; shorter ones share one."""
        return f"--sample-tokens {CHUNK_TOKENS}" if self._options.sample_tokens > CHUNK_TOKENS else ""

    def _judge_rounded(self, judged: HeldOut) -> float:
        judged.advance(SIXTEEN_BIT)
        rounded = round_to_nearest(judged.layer, self._storage)
        judged.advance(ROUNDED, rounded)
        return judged.error(rounded)

    def _keep_layer(self, report: LayerReport, tensors: dict[str, Tensor]) -> None:
        """Once its report is kept a layer is done, and the rows that it read are not needed again."""
        index, prefix = report.layer, layer_prefix(report.layer)
        file, headers = list(self._layout.layers.items())[index]
        for _ in write_shard(
            self._target / file, headers, lambda name: [tensor_bytes(tensors[name.removeprefix(prefix)])]
        ):
            pass
        self._state.keep(f"layer-{index}", asdict(report))
        for kind in (CALIBRATION, HELD_OUT):
            self._state.forget_rows(f"{kind}-{index}")

    @contextmanager
    def _on_device(self, name: str) -> Iterator[nn.Module]:
        """A block's weights in float32, alone on the device; whatever is done to them there is forgotten."""
        for _ in self._residency.enter(phase_with(name)):
            pass
        (use,) = self._residency.component(name)
        try:
            with use as module:
                yield module
        finally:
            self._residency.leave()

    def _row_files(self, kind: str, index: int) -> tuple[Any, Any]:
        """Rows before a layer, to be read, and after it, to be written."""
        before = self._state.rows(f"{kind}-{index}", self._width, ROW_DTYPE[kind])
        return before, self._state.writing_rows(f"{kind}-{index + 1}", self._width, ROW_DTYPE[kind])

    def _float_dtypes(self, index: int) -> dict[str, torch.dtype]:
        """Stored dtypes of what stays in floating point in a layer, by path."""
        prefix = layer_prefix(index)
        paths = (name.removeprefix(prefix) for name in self._layer_names[index])
        return {
            path: TORCH_DTYPE[self._tensors[prefix + path].dtype]
            for path in paths
            if path.removesuffix(".weight") not in LINEARS
        }

    def _report(
        self, layers: Sequence[LayerReport], agreeing: Sequence[Agreement], calibrated: Samples, held_out: Samples
    ) -> QuantizeReport:
        rounded, quantized, *head_alone = agreeing
        return QuantizeReport(
            model=name_only(self._checkpoint.name),
            options=replace(self._options, calibrate=tuple(map(name_only, self._options.calibrate))),
            deviations=self._deviations,
            calibration_tokens=calibrated.tokens,
            held_out_tokens=held_out.tokens,
            layers=tuple(layers),
            rounded=rounded,
            quantized=quantized,
            head_alone=next(iter(head_alone), None),
            parts=tuple(self._part_report(part.name) for part in self._parts),
            weights_bytes=self._layout.file_bytes,
        )

    def _compare_next_words(self, held_out: Samples) -> Generator[Progress, None, list[Agreement]]:
        """How far the next words after held-out tokens agree with those of the model in 16 bit: of the rounded and of
        the quantized thinker, and, where the output head is quantized, of the 16-bit thinker with that head."""
        head, quantized_head = self._head, self._quantized_head
        starts = range(0, held_out.tokens, COMPARED_TOKENS)
        done, total = 0, len(starts) * head.n_bytes
        compared: list[ByToken] = []
        with (
            _shortage_told(self._device, "comparing next words"),
            self._on_device(self._names[-1]) as rest,
            self._held_out_rows() as rows,
        ):
            for start in starts:
                hidden = self._final_hidden(rest, rows, held_out, start)
                comparison = HeadComparison(torch.cat((hidden, hidden[:1])) if quantized_head else hidden)
                for stored in read_rows(self._reader, head, comparison.slice_rows):
                    published = stored.to(hidden.device).float()
                    comparison.add(published, quantized_head.nearest(published) if quantized_head else None)
                    done += stored.nbytes
                    yield Progress("compare next words", done, total, "bytes")
                compared.append(comparison.by_token())
        return agreements(compared)

    def _held_out_rows(self) -> RowFile:
        """What held-out samples are after the last layer."""
        return self._state.rows(f"{HELD_OUT}-{len(self._layer_names)}", self._width, ROW_DTYPE[HELD_OUT])

    def _final_hidden(self, rest: nn.Module, rows: RowFile, held_out: Samples, start: int) -> Tensor:
        """Hidden states [TRACKS, n, H] of some held-out tokens, from token `start` on."""
        stop = min(start + COMPARED_TOKENS, held_out.tokens)
        firsts = (track * held_out.tokens for track in range(TRACKS))
        tracks = torch.stack([rows.read(first + start, first + stop) for first in firsts])
        return rest.get_submodule("norm")(tracks.to(self._device.torch))

    @property
    def _head(self) -> TensorEntry:
        """The output head; a model without one shares its embedding table."""
        return self._tensors.get(LM_HEAD) or self._tensors[EMBED_TOKENS]

    @property
    def _quantized_head(self) -> Storage | None:
        return next((part.storage for part in self._parts if part.name == HEAD_PART), None)

    def _finish(self, report: QuantizeReport) -> None:
        config = quantized_config(published_config(self._checkpoint), self._options, self._storage, self._parts)
        finish_checkpoint(self._checkpoint.folder, self._target, self._layout.shards, report, config)


@contextmanager
def _skeleton(checkpoint: Checkpoint, reader: TensorReader, device: Device, dtype: torch.dtype) -> Iterator[OmniModel]:
    """The checkpoint's skeletons, to be filled in `dtype`."""
    model = build_model(
        checkpoint, reader, device=device.torch, dtype=dtype, backend=ReferenceBackend("nothing is quantized yet")
    )
    try:
        yield model
    finally:
        model.close()


@contextmanager
def _disk_told(target: str | Path) -> Iterator[None]:
    """Errors of the disk that is written to; what cannot be read has its own."""
    try:
        yield
    except OSError as error:
        raise OptionError(f"{error.filename or target} cannot be written: {error.strerror}", hint=GO_ON) from error


@contextmanager
def _shortage_told(device: Device, step: str, lower: str = "") -> Iterator[None]:
    """A device that runs out of memory at a `step`, and what could be asked for instead that takes less of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        instead = " or ".join(filter(None, (lower, "--device cpu")))
        raise BudgetExceededError(
            f"{device.title} ran out of memory while {step}; {format_bytes(device.free_bytes)} were free when it was"
            " opened",
            phase="quantize",
            available_bytes=device.free_bytes,
            hint=f"close what else uses it; {GO_ON}; or name a new folder, with {instead}",
        ) from error


def _thinker_storage(options: QuantizeOptions) -> Storage:
    if options.follows_the_recipe:
        return AWQStorage(options.group_size)
    return compressed(options.bits, options.group_size)


def _require_finite(rows: Tensor, where: str) -> None:
    broken = int((~rows.isfinite().all(-1)).sum())
    if broken:
        raise CheckpointError(
            f"{where} gave no finite numbers for {broken} of {len(rows)} calibration tokens",
            hint="the weights are damaged, or something given with --calibrate is",
        )
