"""What a decode step starts on a device, and how often the host waits for it: counted, not measured.

    python benchmarks/launches.py [--model 7b|3b] [--json]

The stages' own code decodes at full size, in 16 bit, on tensors without data. Counted is each operator that computes or
copies there; views and fresh memory are nothing, and an operator that starts several kernels counts once. A captured
step is started as one graph: what is in it is counted apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowvram.flow import PromptEmbeds, ThinkerStep
from lowvram.graphs import CapturedSteps, Stepping, one_by_one
from lowvram.model import OmniModel, Speech
from lowvram.offload.meter import ByOperator
from lowvram.options import TALKER_SAMPLING, SamplingParams
from lowvram.sampling import Sampler
from lowvram.shapes import shipped_headers
from lowvram.talker import Talker, TextRows, seen_by_penalty, talk
from lowvram.thinker import Prefilled, Thinker, decode
from lowvram.trace import traceable_model

MODELS = {"7b": "Qwen/Qwen2.5-Omni-7B", "3b": "Qwen/Qwen2.5-Omni-3B"}
CARD, HOST = torch.device("meta"), torch.device("cpu")
PROMPT_TOKENS, DECODED = 16, 4

T = TypeVar("T")


@dataclass(frozen=True)
class Started:
    """By one decode step: what the host starts, how often it waits, and how much is in the graph that it starts."""

    launches: int
    waits: int
    in_graph: int = 0


class Count(ByOperator):
    """Counts what is started on the card and what comes back from it: zeros, here."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = self.in_graph = 0

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta and _comes_back(func, kwargs):
            self.waits += 1
            return 0 if func is torch.ops.aten._local_scalar_dense.default else torch.zeros(args[0].shape, device=HOST)
        result = func(*args, **kwargs)
        self.launches += _starts_work(func, result)
        return result

    def capture(self, step: Callable[[], T]) -> Callable[[], T]:
        """As a recorder: what is captured is not started."""
        before = self.launches
        result = step()
        self.in_graph, self.launches = self.launches - before, before

        def again() -> T:
            self.launches += 1
            return result

        return again

    def taken(self) -> Started:
        """The count so far, which begins anew."""
        started = Started(self.launches, self.waits, self.in_graph)
        self.launches = self.waits = 0
        return started


def _comes_back(func: Any, kwargs: dict[str, Any]) -> bool:
    to_host = func is torch.ops.aten._to_copy.default and torch.device(kwargs.get("device") or CARD) == HOST
    return to_host or func is torch.ops.aten._local_scalar_dense.default


def _starts_work(func: Any, result: Any) -> bool:
    made = result[0] if isinstance(result, tuple | list) else result
    if func is torch.ops.aten.exponential_.default:  # of the host here, of the card itself where there is one
        return True
    if not isinstance(made, Tensor) or not made.is_meta or func.is_view:
        return False
    return not func.overloadpacket.__name__.startswith(("empty", "new_empty", "_unsafe_view", "_reshape_alias"))


class CardSampler(Sampler):
    """A sampler on the counted card, which has no random numbers of its own."""

    def __init__(self, params: SamplingParams, **options: Any) -> None:
        super().__init__(params, device=HOST, seed=0, **options)
        self._suppressed, self._seen = self._suppressed.to(CARD), self._seen.to(CARD)


def count_talker(model: OmniModel, captured: bool) -> Started:
    """One code: its row is read, and the next one drawn as the reference draws."""
    assert model.speech
    *layers, rest = _on_card(model, "talker")
    count = Count()
    sampler = CardSampler(TALKER_SAMPLING, **draw_options(model.speech))
    talker = Talker(model.speech, layers, rest, stepping=_stepping(count, captured))
    return _of_a_later_one(babble(talker, sampler, DECODED, CARD), count)


def babble(talker: Talker, sampler: Sampler, max_codes: int, device: torch.device) -> Iterator[int]:
    """What a talker makes of a prompt and a reply without content: as many codes as are asked for."""
    row = torch.zeros(talker.speech.codec_embed.width, dtype=talker.speech.decoder.dtype)
    return talk(
        talker,
        PromptEmbeds(
            row.expand(PROMPT_TOKENS, -1),
            torch.zeros(PROMPT_TOKENS, dtype=torch.bool),
            torch.arange(PROMPT_TOKENS).expand(3, -1),
            PROMPT_TOKENS,
        ),
        row.expand(PROMPT_TOKENS, -1),
        [ThinkerStep(0, row)],
        TextRows(row, row, row),
        talker.speech.decoder.new_cache(PROMPT_TOKENS + 2 + max_codes, device),
        sampler,
        chunk_tokens=lambda: PROMPT_TOKENS,
        max_codes=max_codes,
        device=device,
    )


def draw_options(speech: Speech) -> dict[str, Any]:
    """A sampler's, for codes of which none ends the speech."""
    ids = speech.codec_ids
    suppressed = (ids.start, ids.pad, ids.end)
    return {"vocab_size": len(speech.codec_embed), "suppressed": suppressed, "seen": seen_by_penalty(ids)}


def count_thinker(model: OmniModel, captured: bool) -> Started:
    """One text token: drawn greedily, and its row read."""
    *layers, rest = _on_card(model, "thinker")
    (head,) = _on_card(model, "lm_head")
    cache, count = model.thinker.new_cache(PROMPT_TOKENS + DECODED, CARD), Count()
    heads = torch.empty(
        1, model.thinker.kv_heads, PROMPT_TOKENS, model.thinker.head_dim, dtype=model.dtype, device=CARD
    )
    for layer in range(model.thinker.n_layers):
        cache.update(heads, heads, layer)
    thinker = Thinker(model.thinker, layers, rest, head, model.embed_tokens, stepping=_stepping(count, captured))
    last = torch.empty(1, model.embed_tokens.width, dtype=model.dtype, device=CARD)
    sampler = CardSampler(SamplingParams(), vocab_size=len(model.embed_tokens))
    written = decode(thinker, Prefilled(last, PROMPT_TOKENS), cache, sampler, stop_ids=frozenset(), max_tokens=DECODED)
    return _of_a_later_one(written, count)


def _on_card(model: OmniModel, component: str) -> list[nullcontext[nn.Module]]:
    """A component's blocks, where they stay."""
    for block in model.components[component]:
        block.bind(torch.empty(block.n_bytes, dtype=torch.uint8, device=CARD))
    return [nullcontext(block.module) for block in model.components[component]]


def _stepping(count: Count, captured: bool) -> Stepping:
    return CapturedSteps(count, lambda: "always there") if captured else one_by_one


def _of_a_later_one(decoded: Iterable[Any], count: Count) -> Started:
    """The count between two steps that are like all others: the third and, where there is more, those after it."""
    with count:
        for _ in islice(decoded, DECODED - 1):
            started = count.taken()
    return started


def count_all(model: OmniModel) -> dict[str, Started]:
    """Each stage that decodes, both ways."""
    counted = {}
    for name, count in (("text token", count_thinker), ("code", count_talker)):
        counted[f"{name}, one by one"] = count(model, False)
        counted[f"{name}, captured"] = count(model, True)
    return counted


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="7b")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    headers = shipped_headers(MODELS[chosen.model])
    assert headers
    counted = count_all(traceable_model(headers))
    if chosen.json:
        print(json.dumps({name: asdict(started) for name, started in counted.items()}, indent=2))
        return 0
    print(f"{'':24}{'launches':>10}{'waits':>10}{'in the graph':>16}")
    for name, started in counted.items():
        print(f"{name:24}{started.launches:>10}{started.waits:>10}{started.in_graph or '':>16}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
