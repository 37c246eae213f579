from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def launches() -> Iterator[ModuleType]:
    """benchmarks/launches.py"""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import launches

        yield launches


@pytest.fixture(scope="module")
def counted(launches: ModuleType) -> Mapping[str, Any]:
    """By one step of the published 7B, in 16 bit."""
    from lowvram.shapes import shipped_headers
    from lowvram.trace import traceable_model

    return launches.count_all(traceable_model(shipped_headers(launches.MODELS["7b"])))


def test_a_code_is_waited_for_once(counted: Mapping[str, Any]):
    assert counted["code, one by one"].waits == counted["code, captured"].waits == 1


def test_a_text_token_is_waited_for_and_so_is_its_row(counted: Mapping[str, Any]):
    assert counted["text token, one by one"].waits == counted["text token, captured"].waits == 2


def test_one_by_one_a_layer_starts_at_most_41_operators(counted: Mapping[str, Any]):
    """24 and 28 layers, and beside them rows, rotary tables, the head, and the draw: 28 filters, 5 without any."""
    assert counted["code, one by one"].launches <= 24 * 41 + 48
    assert counted["text token, one by one"].launches <= 28 * 41 + 28


def test_captured_the_host_starts_a_graph_and_little_else(counted: Mapping[str, Any]):
    """Row, place, random numbers and where they are read; the graph; what was seen. For text: row, place, graph, the
    head, its logits in float32, the likeliest and whether it is finite (3), what was seen."""
    assert counted["code, captured"].launches == 6
    assert counted["text token, captured"].launches == 10


def test_what_is_captured_is_the_same_work_and_at_most_9_operators_a_layer_for_the_tail(counted: Mapping[str, Any]):
    assert counted["code, captured"].in_graph <= counted["code, one by one"].launches + 24 * 9
    assert counted["text token, captured"].in_graph <= counted["text token, one by one"].launches + 28 * 9


def test_views_and_fresh_memory_are_not_counted_and_parts_are(launches: ModuleType):
    with launches.Count() as count, torch.inference_mode():
        x = torch.empty(4, 4, device="meta")
        x.view(16)[:3].expand(2, 3)
        assert count.taken().launches == 0
        torch.nn.functional.linear(x, x, x[0])  # a transposed view and one product
        torch.nn.functional.normalize(x)  # a norm, a bound, a division
    assert count.launches == 1 + 3


def test_people_read_a_table(launches: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launches, "count_all", lambda model: {"code, captured": launches.Started(6, 1, 1200)})
    assert launches.main(["--model", "3b"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["code,", "captured", "6", "1", "1200"]
