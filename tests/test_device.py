from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from operator import attrgetter
from threading import Barrier, BrokenBarrierError, Event, Thread
from typing import Any

import pytest
import torch

from lowvram import device as device_module
from lowvram.device import MemoryCap, choose_dtype, exact_arithmetic, float32_by_default, open_device
from lowvram.errors import BackendError, OptionError
from lowvram.offload.budget import GIB
from lowvram.offload.plan import CONTEXT_BYTES, WORKSPACE_BYTES

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
        for name in ("memory_stats", "get_device_properties", "mem_get_info", "memory_reserved"):
            monkeypatch.setattr(f"torch.cuda.{name}", getattr(self, name))
        monkeypatch.setattr("torch.cuda.get_per_process_memory_fraction", lambda _device: self.fraction)
        monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", self.allow)

    total_memory = 16 * GIB

    def get_device_properties(self, _device: torch.device) -> Card:
        return self

    def mem_get_info(self, _device: torch.device) -> tuple[int, int]:
        return self.total_memory - self.memory_reserved(_device), self.total_memory

    def memory_reserved(self, _device: torch.device) -> int:
        return self.tensors_bytes + self.gaps_bytes

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
    device_module._only_fraction_of.cache_clear()
    yield Card(monkeypatch)
    device_module._only_fraction_of.cache_clear()


def test_others_tensors_come_on_top_of_the_budget_and_what_is_only_cached_does_not(card: Card):
    card.tensors_bytes, card.gaps_bytes = 5 * GIB, GIB
    with MemoryCap(CUDA, held_bytes=4 * GIB).at(8 * GIB):
        assert card.allowed_bytes == 2 * GIB + 8 * GIB - CONTEXT_BYTES - WORKSPACE_BYTES
    assert card.fraction == 1.0


def test_libraries_workspaces_and_gaps_between_a_runtimes_own_tensors_are_within_its_budget(card: Card):
    card.tensors_bytes, card.gaps_bytes = 4 * GIB + WORKSPACE_BYTES, GIB
    with MemoryCap(CUDA, held_bytes=4 * GIB).at(8 * GIB):
        assert card.allowed_bytes == 8 * GIB - CONTEXT_BYTES


@pytest.fixture
def opens(card: Card, monkeypatch: pytest.MonkeyPatch) -> Card:
    """The card as one that can be opened."""
    for name, answer in (("is_available", True), ("device_count", 1), ("get_device_name", "a card")):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, answer=answer: answer)
    monkeypatch.setattr(device_module, "_compute", lambda _device: None)
    return card


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.125])
def test_what_the_application_lets_the_process_take_is_all_that_is_free(opens: Card, fraction: float):
    opens.fraction, opens.tensors_bytes = fraction, GIB
    assert open_device("cuda:0").free_bytes == round(fraction * 16) * GIB - GIB + CONTEXT_BYTES


def test_a_process_that_has_all_that_it_may_finds_nothing_free(opens: Card):
    opens.fraction, opens.tensors_bytes = 0.25, 5 * GIB
    assert open_device("cuda:0").free_bytes == CONTEXT_BYTES


def test_a_cap_that_another_runtime_has_lent_makes_nothing_less_free(opens: Card):
    with MemoryCap(CUDA, held_bytes=0).at(GIB):
        assert open_device("cuda:0").free_bytes == 16 * GIB


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


@pytest.fixture(params=["cudnn.conv", "cuda.matmul"])
def products(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Torch's switch for a kind of products, by which an application has them rounded."""
    switch = attrgetter(request.param)(torch.backends)
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    yield switch
    switch.fp32_precision = before


def test_products_are_exact_until_the_last_of_those_inside_has_left(products: Any):
    first, second = exact_arithmetic(CUDA), exact_arithmetic(CUDA)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert products.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert products.fp32_precision == "tf32"


def test_how_another_thread_has_products_computed_meanwhile_stays(products: Any):
    for theirs in ("none", "ieee"):
        with exact_arithmetic(CUDA):
            products.fp32_precision = theirs
        assert products.fp32_precision == theirs


def test_an_applications_autocast_is_not_ours():
    ones = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with exact_arithmetic(CPU):
            assert (ones @ ones).dtype is torch.float32
        assert (ones @ ones).dtype is torch.bfloat16


def test_on_a_cpu_no_switch_of_the_application_is_touched():
    before = torch.backends.cudnn.conv.fp32_precision
    with exact_arithmetic(CPU):
        assert torch.backends.cudnn.conv.fp32_precision == before


def test_float32_is_the_default_inside_and_the_applications_choice_before_and_after(default_dtype: Any):
    default_dtype(torch.bfloat16)
    with suppress(KeyError), float32_by_default():
        assert torch.get_default_dtype() is torch.float32
        raise KeyError
    assert torch.get_default_dtype() is torch.bfloat16


def test_no_thread_loses_float32_because_another_one_leaves(default_dtype: Any):
    default_dtype(torch.bfloat16)
    found: list[torch.dtype] = []
    entered, left = Event(), Event()

    def second() -> None:
        with float32_by_default():
            entered.set()
            left.wait(10)
            found.append(torch.get_default_dtype())

    thread = Thread(target=second)
    with float32_by_default():
        thread.start()
        entered.wait(0.2)
    left.set()
    thread.join()
    assert found == [torch.float32] and torch.get_default_dtype() is torch.bfloat16
