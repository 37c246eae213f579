"""A runtime that is closed, at rest or at work, leaves an empty card."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim.harness import QUESTIONS, Host, furnished_card

from lowvram.errors import LowVRAMError

QUESTION = QUESTIONS["in text alone"]


@pytest.fixture
def host(demo: Path) -> Iterator[Host]:
    with furnished_card() as card:
        yield Host(card, demo)


def test_closing_takes_residents_off_the_card(host: Host):
    QUESTION.answer(host.omni)
    assert host.held_bytes > 0
    host.omni.close()
    host.omni.close()
    assert host.held_bytes == 0


def test_closing_in_the_middle_of_a_step_ends_the_answer_and_empties_the_card(host: Host):
    host.card.at(1000, host.omni.close)
    assert QUESTION.answer(host.omni).finished.finish_reason == "cancelled"
    assert host.held_bytes == 0


def test_tables_go_with_the_runtime(demo: Path):
    with furnished_card() as card:
        host = Host(card, demo)
        QUESTION.answer(host.omni)
        host.omni.close()
        assert card.live_bytes == host.tables_bytes > 0
        del host
        gc.collect()
        assert card.live_bytes == 0


def test_a_closed_runtime_has_nothing_to_release(host: Host):
    host.omni.close()
    with pytest.raises(LowVRAMError, match="closed"):
        host.omni.release()
