"""Profiles -> one page of HTML that needs nothing else: the picture, its figures as tables, the plan, and the card.

No script, no network, no template engine; light or dark as the reader's system is, and fit to be printed. Whatever
comes from outside is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .chart import chart, limit_words, scale_bytes
from .offload.budget import format_bytes
from .offload.plan import Phase, Placement, Plan
from .offload.profile import KINDS, PLANNED, TRACED, TRACKED_LIVE_TENSORS
from .profile_file import MEANINGS, ProfileFile, card_lines

ALONE_PX, BESIDE_PX, NARROW_PX = 1080, 530, 372
"""Widths of a picture: by itself, beside another, and on a phone, where letters must not shrink with it."""

PLACES = {
    Placement.RESIDENT: "stays on the device",
    Placement.PHASE: "on the device for this phase",
    Placement.STREAMED: "streamed layer by layer",
}

STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --ink: #1d2327; --soft: #59636b; --rule: #d9dde0;
  --weights: #3f6fa3; --kv: #e3ab4b; --activations: #4aa287; --budget: #b3401f;
  --on-weights: #fff; --on-kv: #2b1f05; --on-activations: #06251c; }
@media (prefers-color-scheme: dark) { :root { --page: #14181b; --ink: #e6e9eb; --soft: #9aa5ad; --rule: #343c42;
  --weights: #5b8fc7; --kv: #e0ad55; --activations: #57b497; --budget: #ff8c66; --on-weights: #06121f; } }
@media print { :root { color-scheme: light; --page: #fff; --ink: #000; --soft: #444; --rule: #ccc;
  --weights: #3f6fa3; --kv: #e3ab4b; --activations: #4aa287; --budget: #b3401f; --on-weights: #fff; }
  body { print-color-adjust: exact; -webkit-print-color-adjust: exact; } section, table { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 24px 48px; max-width: 1130px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 25px; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 17px; margin: 34px 0 8px; }
h3 { font-size: 15px; margin: 18px 0 4px; }
p { margin: 8px 0 14px; max-width: 46em; } .about, .note, dt, caption { color: var(--soft); }
.key b { font-weight: 600; white-space: nowrap; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.scroll { overflow-x: auto; } .beside > * { min-width: 0; }
table { border-collapse: collapse; min-width: min(100%, 34em);
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: 4px; }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; } th:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; } dd { margin: 0; }
.chart { display: block; width: 100%; height: auto; font-size: 12px; } .chart text { fill: var(--ink); }
.chart .phase { font-weight: 650; font-size: 13px; }
.chart .figure, .chart .tick { fill: var(--soft); font-size: 11px; }
.chart .grid { stroke: var(--rule); } .chart .bound { stroke: var(--soft); stroke-width: .6; stroke-dasharray: 2 3; }
.weights { fill: var(--weights); background: var(--weights); } .kv { fill: var(--kv); background: var(--kv); }
.activations { fill: var(--activations); background: var(--activations); }
.chart .on-weights { fill: var(--on-weights); } .chart .on-kv { fill: var(--on-kv); }
.chart .on-activations { fill: var(--on-activations); }
.chart .planned { fill: none; stroke: var(--ink); stroke-width: 1.1; }
.chart .budget { stroke: var(--budget); stroke-width: 1.8; } .chart .limit { fill: var(--budget); font-weight: 600; }
.chart .hatch { stroke: var(--budget); stroke-width: 1.4; opacity: .5; }
.narrow { display: none; }
@media (min-width: 860px) { .beside { display: grid; grid-template-columns: 1fr 1fr; gap: 0 32px; }
  .beside .about { min-height: 3em; } .beside .key { min-height: 4.6em; } }
@media screen and (max-width: 620px) { body { padding: 18px 14px 36px; } .wide { display: none; }
  .narrow { display: block; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; }
  th, td { padding-right: 8px; font-size: 14px; } }
"""


def page(*profiles: ProfileFile) -> str:
    """A whole page about one profile, or about several side by side at the same scale."""
    title = "Memory of one answer" if len(profiles) == 1 else f"Memory of {len(profiles)} answers, at the same scale"
    most_bytes = max(scale_bytes(recorded) for recorded in profiles)
    width_px = ALONE_PX if len(profiles) == 1 else BESIDE_PX
    parts = [_part(recorded, most_bytes, f"p{number}", width_px) for number, recorded in enumerate(profiles, 1)]
    columns = "".join(f"<div>{part}</div>" for part in parts)
    body = parts[0] if len(parts) == 1 else f'<div class="beside">{columns}</div>'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(_headline(profiles[0]))}: memory</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{body}\n{_meanings(profiles)}\n</body>\n</html>\n"
    )


def where_weights_are(phase: Phase) -> str:
    """A phase's placements in words: "streamed layer by layer: thinker (12 of 28 layers stay); ..."."""
    groups = []
    for placement, words in PLACES.items():
        names = [_with_layers(phase, name) for name, where in phase.placements.items() if where is placement]
        if names:
            groups.append(f"{words}: {', '.join(names)}")
    if phase.prefetch_bytes:
        groups.append(f"of the next phase {format_bytes(phase.prefetch_bytes)} come meanwhile")
    return "; ".join(groups)


def _with_layers(phase: Phase, component: str) -> str:
    kept = phase.kept_layers.get(component, 0)
    layers = kept + phase.streamed_layers.get(component, 0)
    return f"{component} ({kept} of {layers} layers stay)" if kept else component


def _headline(recorded: ProfileFile) -> str:
    conditions = recorded.card.get("conditions", {})
    named = [str(conditions[name]) for name in ("model", "clip") if conditions.get(name)]
    return " · ".join(named) or "a profile"


def _part(recorded: ProfileFile, most_bytes: int, key: str, width_px: int) -> str:
    """All about one profile."""
    return (
        f'<p class="about">{escape(_headline(recorded))} · {limit_words(recorded.plan)}</p>\n'
        f"<section>{_key(recorded)}"
        f'<div class="wide">{chart(recorded, most_bytes, key=f"{key}w", width_px=width_px)}</div>'
        f'<div class="narrow">{chart(recorded, most_bytes, key=f"{key}n", width_px=NARROW_PX)}</div>'
        f'<p class="note">{escape(_axis_words(recorded))}</p></section>\n'
        f"<section><h2>Peaks by phase</h2>{_peaks_table(recorded)}</section>\n"
        f"<section><h2>The plan</h2>{_plan(recorded.plan)}</section>\n"
        f"<section><h2>The card</h2>{_definitions(card_lines(recorded.card))}</section>"
    )


def _key(recorded: ProfileFile) -> str:
    kinds = (("weights", "weights"), ("kv", "KV cache"), ("activations", "activations and all else"))
    bands = ", ".join(f'<b><i class="{css}"></i>{name}</b>' for css, name in kinds)
    hatched = " Hatched is the reserve, for what no count sees." if recorded.plan.reserve_bytes else ""
    return f'<p class="key">From the ground up: {bands}. The thin outline is each phase’s planned peak.{hatched}</p>'


def _axis_words(recorded: ProfileFile) -> str:
    """What runs from left to right, and which kind of figures is shown."""
    if not recorded.profile.timeline:
        return "No run was watched step by step: the areas are the plan’s, one for each phase."
    words = (
        f"The areas are {recorded.counted}. From left to right are steps of the answer, not seconds: a block loaded,"
        " a chunk read, a token, a piece of sound. Every phase has a scale of its own."
    )
    if recorded.counted == TRACED:
        words += " A traced answer has but a few words, since more of them hold no more memory."
    if recorded.counted == TRACKED_LIVE_TENSORS:
        words += " On a CPU they include the host’s share, which the plan does not count."
    return words


def _peaks_table(recorded: ProfileFile) -> str:
    profile = recorded.profile
    kinds = [kind for kind in KINDS if kind in profile.columns]
    rows = ([phase, *(_size(profile.columns[kind].get(phase)) for kind in kinds)] for phase in profile.phases)
    return _table("Highest bytes of tensors at once, without the reserve", ["phase", *kinds], rows)


def _plan(plan: Plan) -> str:
    """What was planned for each phase, where its weights are, and the rest in words."""
    sizes = (
        (p.name, p.weights_bytes, p.kv_bytes, p.activation_bytes, p.prefetch_bytes, p.peak_bytes) for p in plan.phases
    )
    rows = ([name, *map(format_bytes, n_bytes)] for name, *n_bytes in sizes)
    heads = ["phase", "weights", "KV cache", "activations", "next phase’s", "peak"]
    table = _table("Planned, without the reserve", heads, rows)
    places = _definitions((phase.name, where_weights_are(phase)) for phase in plan.phases)
    return f"{table}<h3>Where weights are</h3>{places}<p>{escape(_plan_words(plan))}</p>"


def _plan_words(plan: Plan) -> str:
    limit = "without a limit" if plan.budget_bytes is None else f"of {format_bytes(plan.budget_bytes)}"
    parts = [("context", plan.context_bytes), ("workspace", plan.workspace_bytes), ("slack", plan.slack_bytes)]
    reserve = ", ".join(f"{format_bytes(n_bytes)} {name}" for name, n_bytes in parts if n_bytes)
    of_it = f" (reserve: {reserve})" if reserve else ""
    return (
        f"Peak with reserve: {format_bytes(plan.peak_bytes)} {limit} on {plan.device}{of_it}."
        f" The prompt has {plan.prompt_tokens:,} tokens, read in chunks of"
        f" {plan.prefill_chunk_tokens:,}; the answer at most {plan.text_tokens:,} tokens and {plan.codes:,} codes of"
        f" speech. An answer moves {format_bytes(plan.traffic_bytes)} of weights to the device. The host holds"
        f" {format_bytes(plan.host_bytes)}."
    )


def _meanings(profiles: Sequence[ProfileFile]) -> str:
    """What the kinds of figures on this page are."""
    shown = {PLANNED} | {kind for recorded in profiles for kind in recorded.profile.columns}
    words = [(kind, MEANINGS[kind]) for kind in KINDS if kind in shown]
    return f"<section><h2>What the figures are</h2>{_definitions(words)}</section>"


def _definitions(pairs: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(words)}</dd>' for name, words in pairs)}</dl>"


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(map(_row, rows))}</tbody></table></div>"
    )


def _row(row: Sequence[str]) -> str:
    name, *cells = map(escape, row)
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _size(n_bytes: int | None) -> str:
    return "–" if n_bytes is None else format_bytes(n_bytes)
