"""The card itself: the CPU's numbers, an exact count of bytes, and faults on request."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sim.device import DEVICE, Card, simulated_card
from torch import Tensor, nn

FLOATS = 4


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[True, False], ids=["inference mode", "no mode"])
def mode(request: pytest.FixtureRequest):
    """Composite operators reach a device whole in inference mode, and taken apart outside of it."""
    with torch.inference_mode(request.param):
        yield


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: x @ x.mT,
    "softmax": lambda x: x.softmax(-1),
    "linear": lambda x: F.linear(x, x),
    "convolution": lambda x: F.conv1d(x.unsqueeze(0), x[:, :3].unsqueeze(1), groups=x.shape[0]),
    "sort": lambda x: x.sort().values,
    "choice": lambda x: torch.where(x > 0, x, -torch.inf),
    "rows": lambda x: x[torch.tensor([2, 0], device="cpu")],
    "bytes": lambda x: x.view(torch.uint8)[..., 4:8].contiguous().view(torch.float32),
    "in place": lambda x: x.clone().mul_(2).add_(x),
    "pieces": lambda x: torch.cat(x.split(3, dim=1)[::-1], 1),
    "assignment": lambda x: assigned(x.clone()),
}


def assigned(x: Tensor) -> Tensor:
    x[1, 2:] = x[0, :-2]
    return x


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_operators_give_the_bits_of_the_cpu(card: Card, mode: None, operator: Callable[[Tensor], Tensor]):
    x = values(8, 8)
    there = operator(x.to(DEVICE))
    assert there.device == DEVICE
    assert torch.equal(there.cpu(), operator(x))


def test_draws_take_a_generator_of_the_host(card: Card):
    chances = values(16).softmax(0)
    draws = [
        torch.multinomial(where, 5, generator=torch.Generator().manual_seed(3)).tolist()
        for where in (chances, chances.to(DEVICE).cpu())
    ]
    assert draws[0] == draws[1]


def test_a_layer_moves_and_computes(card: Card):
    layer = nn.Linear(8, 4).requires_grad_(False)
    x = values(2, 8)
    expected = layer(x)
    assert torch.equal(layer.to(DEVICE)(x.to(DEVICE)).cpu(), expected)
    assert card.live_bytes == (8 * 4 + 4) * FLOATS


def test_a_storage_counts_once_until_its_last_view_is_gone(card: Card, mode: None):
    x = torch.empty(100, device=DEVICE)
    view = x[10:20].unsqueeze(0)
    assert card.live_bytes == 100 * FLOATS
    del x
    assert card.live_bytes == 100 * FLOATS
    del view
    assert card.live_bytes == 0


def test_the_peak_remembers_what_was_only_passing(card: Card, mode: None):
    x = torch.ones(100, device=DEVICE)
    x = x + 1
    assert card.peak_bytes == 200 * FLOATS
    assert card.live_bytes == 100 * FLOATS


def test_what_is_changed_in_place_is_no_new_memory(card: Card, mode: None):
    x = torch.zeros(4, device=DEVICE)
    before = card.allocations
    assert x.add_(1) is x
    assert card.allocations == before


def test_a_copy_to_the_host_is_its_own(card: Card, mode: None):
    x = torch.zeros(2, device=DEVICE)
    copy = x.to("cpu")
    x.add_(1)
    assert copy.tolist() == [0, 0]


def test_a_copy_to_the_card_is_its_own(card: Card, mode: None):
    x = torch.zeros(2)
    copy = x.to(DEVICE)
    x.add_(1)
    assert copy.cpu().tolist() == [0, 0]


def test_copies_between_devices_fill_what_waits(card: Card, mode: None):
    x, waiting, back = values(4), torch.empty(4, device=DEVICE), torch.empty(4)
    back.copy_(waiting.copy_(x))
    assert torch.equal(back, x)
    assert card.live_bytes == 4 * FLOATS


MIXTURES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda there, here: there + here,
    "product": lambda there, here: here @ there,
    "in place": lambda there, here: here.add_(there),
    "pieces": lambda there, here: torch.cat([there, here]),
    "rows of the host by indices of the card": lambda there, here: here[there.argmax(0)],
    "layer": lambda there, here: F.linear(there, here),
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_mixing_devices_is_refused(card: Card, mode: None, mixture: Callable[[Tensor, Tensor], object]):
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        mixture(torch.ones(2, 2, device=DEVICE), torch.ones(2, 2))


def test_scalars_of_the_host_are_welcome(card: Card, mode: None):
    assert (torch.ones(2, device=DEVICE) * torch.tensor(3.0)).cpu().tolist() == [3, 3]


def test_the_hosts_arrays_are_out_of_reach(card: Card):
    with pytest.raises(RuntimeError, match="numpy"):
        torch.ones(2, device=DEVICE).numpy()


def test_attention_makes_its_result_and_no_scores(card: Card, mode: None):
    q = torch.ones(1, 2, 64, 8, device=DEVICE)
    before = card.live_bytes
    out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert out.nbytes == q.nbytes
    assert card.peak_bytes == before + q.nbytes


def test_a_full_card_refuses_and_holds_what_it_held(card: Card, mode: None):
    card.capacity_bytes = 40 * FLOATS
    x = torch.ones(30, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError, match="asks for 120 bytes, 120 of 160 are in use"):
        x + x
    assert (card.live_bytes, card.refusals) == (30 * FLOATS, 1)


def test_the_allocation_that_is_to_fail_fails_alone(card: Card):
    card.fail(2)
    outcomes = []
    for _ in range(3):
        try:
            outcomes.append(torch.ones(1, device=DEVICE))
        except torch.OutOfMemoryError:
            outcomes.append(None)
    assert [outcome is None for outcome in outcomes] == [False, True, False]


def test_a_card_shrinks_at_the_allocation_named_and_can_be_restored(card: Card):
    card.shrink(2, 8 * FLOATS)
    torch.ones(10, device=DEVICE)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(10, device=DEVICE)
    card.restore(100 * FLOATS)
    torch.ones(10, device=DEVICE)
    assert card.refusals == 2


def test_things_happen_in_the_middle_of_a_computation(card: Card):
    seen = []
    card.at(2, lambda: seen.append(card.live_bytes))
    x = torch.ones(10, device=DEVICE)
    x = x + 1
    assert seen == [10 * FLOATS]


def test_a_card_serves_every_thread(card: Card):
    held = []
    thread = threading.Thread(target=lambda: held.append(torch.ones(10, device=DEVICE)))
    thread.start()
    thread.join()
    assert card.live_bytes == 10 * FLOATS


def test_a_card_leaves_nothing_behind():
    before = torch.accelerator.current_accelerator()
    with simulated_card(1000) as card:
        kept = torch.ones(10, device=DEVICE)
        assert torch.accelerator.current_accelerator() == before
    with pytest.raises(NotImplementedError, match="Lazy"):
        torch.empty(1, device=DEVICE)
    del kept
    assert card.live_bytes == 0


def test_a_second_card_at_once_is_refused(card: Card):
    with pytest.raises(AssertionError, match="there is a simulated card already"), simulated_card(1000):
        pass


def test_cards_come_one_after_another():
    for _ in range(2):
        with simulated_card(1000) as card:
            torch.ones(10, device=DEVICE)
            assert card.allocations == 1
