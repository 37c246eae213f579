"""A comparison of two checkpoints, as `quality.py` keeps it -> tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness import card_lines


def lines_of(result: Mapping[str, Any]) -> Iterator[str]:
    """A result for people."""
    yield from card_lines(result["card"])
    yield f"reference: {result['reference']}"
    yield f"candidate: {result['candidate']}"
    yield ""
    yield f"{'next token':12}{'positions':>10}{'KL mean':>11}{'KL p99':>11}{'same top':>10}   (KL in nats)"
    for kind, row in result["next_token"].items():
        yield _divergence_line(kind, row)
    if result["speech"]:
        yield _divergence_line("codec", result["speech"])
    yield ""
    yield f"{'greedy text':12}{'answers':>10}{'agree for':>11}{'at least':>11}{'length':>10}{'identical':>11}"
    for kind, row in result["answers"].items():
        agreed = f"{row['agreed_tokens_median']:11g}{row['agreed_tokens_min']:11d}"
        yield f"{kind:12}{row['answers']:10d}{agreed}{row['reference_tokens_median']:10g}{row['identical']:11d}"
    yield from _speech_lines(result["speech"])
    yield from _word_error_lines(result["word_errors"])
    yield from _choice_lines(result["choices"])
    yield ""
    yield f"Published ({result['published']['source']}): {' and '.join(result['published']['columns'])}"
    for name, figures in result["published"]["rows"].items():
        yield f"  {name:32}" + "".join(f"{figure:8g}" for figure in figures)


def _divergence_line(name: str, row: Mapping[str, Any]) -> str:
    apart = f"{row['kl_mean_nats']:11.2e}{row['kl_p99_nats']:11.2e}"
    return f"{name:12}{row['positions']:10d}{apart}{row['top1_agreement']:10.2%}"


def _speech_lines(found: Mapping[str, Any] | None) -> Iterator[str]:
    yield ""
    if found is None:
        yield "speech: not compared, a checkpoint has no voices"
        return
    yield (
        f"sound of the same {found['codes']} codes: relative error up to {found['waveform_relative_error_max']:.2e},"
        f" log-spectral distance {found['log_spectral_distance_db_mean']:.3f} dB"
    )


def _word_error_lines(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    yield ""
    yield f"word error rate, recordings: {found['recordings']}, words: {found['words']} (95 % by resampling recordings)"
    for who in ("reference", "candidate", "surplus"):
        yield _share_line(who, found[who]["rate"], found[who]["interval"])


def _choice_lines(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    yield ""
    yield (
        f"multiple choice, questions: {found['questions']} (95 % by Wilson); right in one model alone: reference"
        f" {found['only_reference_right']}, candidate {found['only_candidate_right']}"
    )
    for who in ("reference", "candidate"):
        unread = f", {found[who]['unread']} named no choice" if found[who]["unread"] else ""
        yield _share_line(who, found[who]["accuracy"], found[who]["interval"]) + unread


def _share_line(who: str, share: float, interval: Sequence[float]) -> str:
    return f"  {who:10}{share:8.2%}   {interval[0]:.2%} to {interval[1]:.2%}"
