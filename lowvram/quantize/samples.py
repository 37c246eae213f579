"""Texts and media -> blocks of prompt rows that a model is calibrated on, and others that it is judged by.

Texts become one long run of tokens; a conversation with media becomes a run of its own, its pictures and sounds encoded
as for an answer. Runs are cut into blocks of equal length, of which a seed picks some. Built-in conversations
are always among the texts.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..encoders import AudioTower, VisionTower, embed_prompt, encode_audios, encode_visuals
from ..errors import MediaError, OptionError
from ..flow import ModelInputs
from ..media import open_medium
from ..model import OmniModel
from ..offload.placement import Phase, Placement
from ..offload.residency import Residency
from ..options import Limits, MediaParams
from ..preprocess import Preprocessor
from ..preprocess.messages import read_messages

log = logging.getLogger(__name__)

BUILT_IN = Path(__file__).with_name("texts.jsonl")
"""134 conversations in 26 languages, code and sums among them, written for this project: 136 KB without the JSON."""

QUESTION = "Describe what you see and hear."
"""What is asked about a medium that comes without words."""

HELD_OUT_SHARE = 8
"""One block is held out for so many that are calibrated on."""


@dataclass(frozen=True)
class Run:
    """`length` rows that follow one another. `inputs` opens what they are made from."""

    length: int
    inputs: Callable[[], AbstractContextManager[ModelInputs]]


@dataclass(frozen=True)
class Block:
    """`length` rows of run `run`, from row `start` on, which see only each other."""

    run: int
    start: int
    length: int

    @property
    def rows(self) -> slice:
        """Where the block lies in its run."""
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True)
class Choice:
    """Blocks to calibrate on, and blocks held out."""

    calibrated: tuple[Block, ...]
    held_out: tuple[Block, ...]


def gather_runs(
    preprocessor: Preprocessor, sources: Sequence[str], *, seed: int, limits: Limits | None = None
) -> list[Run]:
    """The runs of the built-in texts and of `sources`: folders and files of texts (.txt, .jsonl), sounds, pictures and
    clips. All text is one run, its pieces in an order that `seed` decides.

    Raises OptionError for a source that is not there or a line that is no text, MediaError for a medium that cannot be
    used.
    """
    limits = limits or Limits()
    pieces, media = [], []
    for example in [*read_lines(BUILT_IN), *(e for source in sources for e in read_source(source, limits))]:
        if isinstance(example, str):
            pieces.append(preprocessor.tokenize(example))
            continue
        shape = preprocessor.measure(example, limits=limits)
        if shape.media:
            media.append(Run(shape.prompt_tokens, partial(_opened, preprocessor, example, limits)))
        else:
            with preprocessor.open(example, limits=limits) as prompt:
                pieces.append(prompt.inputs.input_ids.tolist())
    random.Random(seed).shuffle(pieces)
    ids = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64, device="cpu")
    positions = torch.arange(len(ids), device="cpu").expand(3, -1)
    text = ModelInputs(ids, positions, len(ids))
    return [Run(len(ids), lambda: nullcontext(text)), *media]


def choose_blocks(lengths: Sequence[int], *, samples: int, sample_tokens: int, seed: int) -> Choice:
    """Cut runs of such `lengths` into blocks of `sample_tokens` rows, choose `samples` of them or what there is, and
    hold out an eighth as many.

    The rest of a run after its last whole block is left out; a run shorter than that is a block as it is. Raises
    OptionError where that makes less than two blocks.
    """
    blocks = [block for run, length in enumerate(lengths) for block in _cut(run, length, sample_tokens)]
    if len(blocks) < 2:
        raise OptionError(
            f"there are {sum(lengths)} calibration tokens, which make {len(blocks)} of the 2 samples needed at least",
            hint="give more with --calibrate, or shorten --sample-tokens",
        )
    random.Random(seed).shuffle(blocks)
    wanted = samples + samples // HELD_OUT_SHARE
    held_out = max(1, min(wanted, len(blocks)) // (HELD_OUT_SHARE + 1))
    chosen = blocks[held_out : held_out + samples]
    return Choice(_by_length(chosen), _by_length(blocks[:held_out]))


def read_source(source: str, limits: Limits) -> Iterator[str | list[dict[str, Any]]]:
    """The texts and conversations in a file, or in all files of a folder and its subfolders, by name; hidden ones are
    passed over, and with a warning those that are no media: a folder of clips may hold notes as well.

    Raises OptionError for a folder with nothing to use in it, and MediaError for a file named by itself that is none.
    """
    if not source:  # which would be the current folder
        raise OptionError("a path to calibrate on is empty: 0 characters", hint="name a file or a folder")
    source = os.path.expanduser(source)
    path = Path(source)
    if path.is_dir():
        yield from _read_folder(path, limits)
    elif path.suffix.lower() == ".jsonl":
        yield from read_lines(path)
    elif path.suffix.lower() == ".txt":
        yield _read_text(path)
    else:
        with open_medium(source, limits) as medium:
            kind = medium.kind
        question = {"type": "text", "text": QUESTION}
        yield [{"role": "user", "content": [{"type": kind, kind: source}, question]}]


def _read_folder(folder: Path, limits: Limits) -> Iterator[str | list[dict[str, Any]]]:
    """See `read_source`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(folder)))
    passed_over = 0
    for file in files:
        try:
            yield from read_source(str(file), limits)
        except MediaError as error:
            log.warning("passed over: %s", error.args[0])
            passed_over += 1
    if passed_over == len(files):
        raise OptionError(
            f"{folder} holds 0 files to calibrate on", hint="texts (.txt, .jsonl), sounds, pictures or clips"
        )


def read_lines(path: Path) -> Iterator[str | list[dict[str, Any]]]:
    """The examples in a .jsonl file: a line is a string, {"text": ...} or {"messages": [...]}."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            json.dumps(example, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        except ValueError as error:
            raise OptionError(f"{path}, line {number} is not JSON in UTF-8: {error}") from error
        match example:
            case str(text) | {"text": str(text)}:
                yield text
            case {"messages": [*messages]}:
                yield _checked(messages, f"{path}, line {number}")
            case _:
                raise OptionError(f"{path}, line {number} is no text", hint='"…", {"text": "…"} or {"messages": […]}')


class Embedder:
    """Prompt rows of a model: text looked up, media encoded. The encoders stay on the device until it is left."""

    def __init__(self, model: OmniModel, device: torch.device, limits: Limits | None = None) -> None:
        self._model = model
        self._device = device
        self._limits = limits or Limits()
        self._residency = Residency(model.components, model.transfer)

    def __enter__(self) -> Embedder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._residency.release()

    def blocks(self, inputs: ModelInputs, blocks: Sequence[Block]) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Each block with its rows [L, H] and positions [3, L], counted from 0, on the host."""
        embeds = self._encode(inputs) if inputs.audios or inputs.visuals else None
        for block in blocks:
            rows = self._model.embed_tokens(inputs.input_ids[block.rows]) if embeds is None else embeds[block.rows]
            positions = inputs.position_ids[:, block.rows]
            yield block, rows, positions - positions.min()

    def _encode(self, inputs: ModelInputs) -> Tensor:
        embeds = embed_prompt(inputs, self._model.embed_tokens).embeds
        media = {"audio_tower": inputs.audios, "visual": inputs.visuals}
        _finish(self._residency.enter(phase_with(*(component for component, present in media.items() if present))))
        if inputs.audios:
            ears = AudioTower(self._model.hearing, *self._layers_and_rest("audio_tower"))
            heard = encode_audios(
                inputs.audios,
                ears,
                embeds,
                chunk_windows=lambda: self._limits.audio_chunk_windows,
                device=self._device,
            )
            _finish(heard)
        if inputs.visuals:
            eyes = VisionTower(self._model.vision, *self._layers_and_rest("visual"))
            seen = encode_visuals(
                inputs.visuals,
                eyes,
                embeds,
                chunk_patches=lambda: self._limits.vision_chunk_patches,
                device=self._device,
            )
            _finish(seen)
        return embeds

    def _layers_and_rest(self, component: str) -> tuple[tuple[Any, ...], Any]:
        *layers, rest = self._residency.component(component)
        return tuple(layers), rest


def embedded_blocks(
    embedder: Embedder, runs: Sequence[Run], blocks: Sequence[Block]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each of the blocks with the row at which it begins when they lie one after another in their order.

    Runs are opened one at a time, so blocks come run by run.
    """
    starts = dict(zip(blocks, accumulate((block.length for block in blocks), initial=0), strict=False))
    for index, run in enumerate(runs):
        wanted = [block for block in blocks if block.run == index]
        if wanted:
            with run.inputs() as inputs:
                for block, embeds, positions in embedder.blocks(inputs, wanted):
                    yield starts[block], embeds, positions


def phase_with(*components: str) -> Phase:
    """A phase that holds these components and nothing else."""
    placements = dict.fromkeys(components, Placement.PHASE)
    return Phase("quantize", components, placements, weights_bytes=0, kv_bytes=0, activation_bytes=0, traffic_bytes=0)


@contextmanager
def _opened(preprocessor: Preprocessor, messages: Sequence[Mapping[str, Any]], limits: Limits) -> Iterator[ModelInputs]:
    with preprocessor.open(messages, limits=limits) as prompt:
        yield prompt.inputs


def _finish(steps: Iterator[object]) -> None:
    """Take every step; nobody wants to know how far it is."""
    for _ in steps:
        pass


def _cut(run: int, length: int, sample_tokens: int) -> list[Block]:
    whole = [Block(run, start, sample_tokens) for start in range(0, length - sample_tokens + 1, sample_tokens)]
    return whole or ([Block(run, 0, length)] if length else [])


def _by_length(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Blocks of one length side by side, so that they can be computed together."""
    return tuple(sorted(blocks, key=lambda block: -block.length))


def _checked(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The same conversation; what is wrong with it is said with the line it stands in."""
    try:
        read_messages(messages, MediaParams())
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error
    return messages


def _is_hidden(path: Path) -> bool:
    """As most systems mark it; so is what lies in a folder that is."""
    return any(part.startswith(".") for part in path.parts)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not text at byte {error.start}", hint="save it in UTF-8") from error
