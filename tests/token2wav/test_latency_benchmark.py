"""benchmarks/latency.py in miniature."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BRIEF = ("--tiny", "--codes", "60", "--rounds", "2", "--modes", "exact", "low-latency", "--solvers", "euler")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, Any]]]:
    """What one run prints, and what it keeps."""
    kept = tmp_path_factory.mktemp("latency") / "latency.json"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.syspath_prepend(BENCHMARKS)
        import latency

        assert latency.main([*BRIEF, "-o", str(kept)]) == 0
    yield printed.getvalue(), json.loads(kept.read_text(encoding="utf-8"))


def test_every_way_stands_beside_the_references(measured) -> None:
    ways = [one["way"] for one in measured[1]["ways"]]
    assert ways == [
        "reference, whole, rk4",
        "whole, euler",
        "chunks 48/24/12, euler",
        "exact, euler",
        "low-latency, euler",
    ]
    assert all(way in measured[0] for way in ways)


def test_the_figures_of_each_way_are_those_of_its_definition(measured) -> None:
    reference, whole, chunks, exact, early = measured[1]["ways"]
    assert [one["first_codes"] for one in (reference, whole, chunks, exact, early)] == [60, 60, 60, 60, 36]
    assert [one["work"] for one in (reference, whole, exact)] == [36, 9, 9]
    assert early["work"] == pytest.approx(9 * (60 + 12) / 60)
    assert exact["error"] < 1e-5 < min(chunks["error"], early["error"])
    assert all(one["rtf"] > 0 and one["first_s"] > 0 and one["spread"] >= 0 for one in measured[1]["ways"])


def test_more_work_has_a_higher_floor(measured) -> None:
    reference, whole, chunks, *_ = (one["floor"] * one["rtf"] for one in measured[1]["ways"])
    assert reference > whole > 0 and chunks > whole


def test_the_ratios_are_to_the_references_own_way_and_to_the_whole_decode(measured) -> None:
    reference, whole, *_ = measured[1]["ways"]
    assert (reference["of_reference"], whole["of_whole"], whole["spread"]) == (1, 1, 0)
    assert reference["of_whole"] > 1 > whole["of_reference"]


def test_the_card_says_what_was_measured(measured) -> None:
    conditions = measured[1]["card"]["conditions"]
    assert (conditions["size"], conditions["codes"], conditions["rounds"]) == ("a toy's", 60, 2)
    assert "codes 60" in measured[0]
