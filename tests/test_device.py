from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from threading import Barrier, BrokenBarrierError, Thread

import pytest
import torch

from lowvram import device as device_module
from lowvram.device import CONTEXT_BYTES, MemoryCap, choose_dtype, exact_convolutions, open_device
from lowvram.errors import BackendError, OptionError
from lowvram.offload.budget import GIB

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_cpu_says_what_it_is_and_what_is_free():
    device = open_device("cpu")
    assert device.torch == CPU
    assert "thread" in device.title
    assert device.free_bytes > 0


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "mps", ""])
def test_other_names_are_refused(name: str):
    with pytest.raises(OptionError, match="auto, cpu, cuda"):
        open_device(name)


@pytest.mark.parametrize(
    ("device", "stored", "chosen"),
    [
        (CPU, "float32", torch.float32),
        (CPU, "float16", torch.bfloat16),
        (CPU, "bfloat16", torch.bfloat16),
        (CPU, None, torch.bfloat16),
        (CUDA, "float16", torch.float16),
    ],
)
def test_auto_is_the_stored_dtype_where_the_device_is_good_at_it(device: torch.device, stored: str | None, chosen):
    assert choose_dtype("auto", device, stored) is chosen


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), torch.float16), ((8, 6), torch.bfloat16)])
def test_bfloat16_needs_an_ampere_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: capability)
    assert choose_dtype("auto", CUDA, "bfloat16") is chosen


def test_a_named_dtype_is_taken_as_it_is():
    assert choose_dtype("float16", CPU, "bfloat16") is torch.float16


def test_bfloat16_by_name_is_refused_on_a_card_without_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: (7, 5))
    with pytest.raises(OptionError, match=r"compute capability 7\.5, but bfloat16 needs 8\.0"):
        choose_dtype("bfloat16", CUDA, "float16")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(OptionError, match="'int4' is unknown"):
        choose_dtype("int4", CPU, None)


def test_a_card_that_cannot_be_used_from_here_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch):
    def in_a_fork() -> int:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.\nMore of it.")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.current_device", in_a_fork)
    with pytest.raises(BackendError, match=r"does not compute: Cannot re-initialize CUDA in forked subprocess\. \("):
        open_device("cuda")


class Card:
    """What a process's allocator says of a card of 16 GiB, and the fraction of it that the process may take."""

    fraction = 1.0
    tensors_bytes = gaps_bytes = 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("memory_stats", "get_device_properties"):
            monkeypatch.setattr(f"torch.cuda.{name}", getattr(self, name))
        monkeypatch.setattr("torch.cuda.get_per_process_memory_fraction", lambda _device: self.fraction)
        monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", self.allow)

    total_memory = 16 * GIB

    def get_device_properties(self, _device: torch.device) -> Card:
        return self

    def memory_stats(self, _device: torch.device) -> dict[str, int]:
        return {
            "active_bytes.all.current": self.tensors_bytes,
            "inactive_split_bytes.all.current": self.gaps_bytes,
            "reserved_bytes.all.current": 15 * GIB,
        }

    def allow(self, fraction: float, _device: torch.device) -> None:
        assert 0 <= fraction <= 1
        self.fraction = fraction

    @property
    def allowed_bytes(self) -> int:
        return round(self.fraction * self.total_memory)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    device_module._fraction_of.cache_clear()
    yield Card(monkeypatch)
    device_module._fraction_of.cache_clear()


def test_others_tensors_come_on_top_of_the_budget_and_what_is_only_cached_does_not(card: Card):
    card.tensors_bytes, card.gaps_bytes = 5 * GIB, GIB
    with MemoryCap(CUDA, held_bytes=4 * GIB).at(8 * GIB):
        assert card.allowed_bytes == 2 * GIB + 8 * GIB - CONTEXT_BYTES
    assert card.fraction == 1.0


def test_a_stricter_cap_of_the_application_stays(card: Card):
    card.fraction = 0.25
    with MemoryCap(CUDA, held_bytes=0).at(8 * GIB):
        assert card.fraction == 0.25
    assert card.fraction == 0.25


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_runtimes_that_compute_at_once_have_a_budget_each_and_leave_no_cap_behind(card: Card, first_leaves_first: bool):
    budgets = (3 * GIB, 5 * GIB)
    caps = [MemoryCap(CUDA, held_bytes=0).at(budget) for budget in budgets]
    for cap in caps:
        cap.__enter__()
    assert card.allowed_bytes == sum(budgets) - 2 * CONTEXT_BYTES
    leaving, staying = caps if first_leaves_first else caps[::-1]
    leaving.__exit__(None, None, None)
    assert card.allowed_bytes == budgets[first_leaves_first] - CONTEXT_BYTES
    staying.__exit__(None, None, None)
    assert card.fraction == 1.0


def test_runtimes_that_are_both_the_first_to_compute_share_a_cap(card: Card, monkeypatch: pytest.MonkeyPatch):
    in_time, made = Barrier(2), []

    def slowly(_device: torch.device) -> Card:
        made.append(card)
        with suppress(BrokenBarrierError):
            in_time.wait(0.1)
        return card

    def compute() -> None:
        with MemoryCap(CUDA, held_bytes=0).at(GIB):
            pass

    monkeypatch.setattr("torch.cuda.get_device_properties", slowly)
    threads = [Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert made == [card]


def test_a_step_that_fails_leaves_no_cap_behind(card: Card):
    with pytest.raises(ZeroDivisionError), MemoryCap(CUDA, held_bytes=0).at(GIB):
        _ = 1 // 0
    assert card.fraction == 1.0


def test_convolutions_are_exact_until_the_last_of_those_inside_has_left():
    before = torch.backends.cudnn.conv.fp32_precision
    first, second = exact_convolutions(CUDA), exact_convolutions(CUDA)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.cudnn.conv.fp32_precision == "ieee" != before
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_on_a_cpu_no_switch_of_the_application_is_touched():
    before = torch.backends.cudnn.conv.fp32_precision
    with exact_convolutions(CPU):
        assert torch.backends.cudnn.conv.fp32_precision == before
