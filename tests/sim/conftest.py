"""A card for a test, the checkpoint that is run on it, and what the CPU answers to the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from sim.device import Card, simulated_card
from sim.harness import PLENTY_BYTES, QUESTIONS, Answer

from lowvram.demo import TINY, build_demo
from lowvram.runtime import OmniRuntime


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Omni, with enough layers to stream some of them."""
    folder = tmp_path_factory.mktemp("demo")
    build_demo(folder, size=replace(TINY, layers=4))
    return folder


@pytest.fixture
def card() -> Iterator[Card]:
    """A bare card."""
    with simulated_card(PLENTY_BYTES) as card:
        yield card


@pytest.fixture(scope="session")
def on_cpu(demo: Path) -> Mapping[str, Answer]:
    """What the demo answers to each of `QUESTIONS` on the CPU, with everything resident."""
    with OmniRuntime.open(demo, device="cpu", dtype="float32", kernel="reference") as omni:
        return {name: question.answer(omni) for name, question in QUESTIONS.items()}
