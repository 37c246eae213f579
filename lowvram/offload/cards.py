"""Names of consumer graphics cards to what a plan and its expectations need: memory, and how fast it all moves.

Figures are from the vendor's published specifications; none is measured here, and a partner's model of a card may
be clocked otherwise. Rates are derived from them below, so that they can be checked with a pencil.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionError
from .budget import GIB

DESKTOP_BYTES = 8 * GIB // 10
"""What a desktop and its windows keep of a card's memory. An estimate: one or two screens, a browser open."""

PCIE_LANE_GB_PER_S = {3: 0.985, 4: 1.969, 5: 3.938}
"""Each way, by generation: 8, 16 and 32 GT/s with 128 of 130 bits carrying data."""

TENSOR_FLOPS_PER_CLOCK = 512
"""Of a multiprocessor of a GeForce card since Ampere: dense float16 products summed in float32, half the rate of those
summed in float16. Four tensor cores x 64 multiply-adds."""

FLOAT32_FLOPS_PER_CLOCK = 256
"""Of the same, outside its tensor cores: 128 multiply-adds."""


@dataclass(frozen=True)
class Card:
    """A graphics card. `bus_bits` and `pin_gbit_per_s` are its memory's; `boost_ghz` its clock under load."""

    name: str
    vram_gib: int
    bus_bits: int
    pin_gbit_per_s: float
    multiprocessors: int
    boost_ghz: float
    pcie_generation: int
    pcie_lanes: int

    @property
    def vram_bytes(self) -> int:
        return self.vram_gib * GIB

    @property
    def usable_bytes(self) -> int:
        """What is left of the memory beside a desktop."""
        return self.vram_bytes - DESKTOP_BYTES

    @property
    def memory_gb_per_s(self) -> float:
        return self.bus_bits * self.pin_gbit_per_s / 8

    @property
    def float16_tflops(self) -> float:
        """Dense, on the tensor cores, summed in float32."""
        return self.multiprocessors * self.boost_ghz * TENSOR_FLOPS_PER_CLOCK / 1000

    @property
    def float32_tflops(self) -> float:
        return self.multiprocessors * self.boost_ghz * FLOAT32_FLOPS_PER_CLOCK / 1000

    @property
    def pcie_gb_per_s(self) -> float:
        """Nominal, one way, in a slot that has all the lanes."""
        return self.pcie_lanes * PCIE_LANE_GB_PER_S[self.pcie_generation]


CARDS = {
    card.name: card
    for card in (
        # NVIDIA's Ampere GA102 whitepaper and GeForce product pages (RTX 30)
        Card("rtx-3060-12gb", 12, 192, 15, 28, 1.777, 4, 16),
        Card("rtx-3080-10gb", 10, 320, 19, 68, 1.710, 4, 16),
        Card("rtx-3080-12gb", 12, 384, 19, 70, 1.710, 4, 16),
        # NVIDIA's Ada whitepaper and GeForce product pages (RTX 40)
        Card("rtx-4060-ti-16gb", 16, 128, 18, 34, 2.535, 4, 8),
        Card("rtx-4070", 12, 192, 21, 46, 2.475, 4, 16),
        Card("rtx-4080", 16, 256, 22.4, 76, 2.505, 4, 16),
        Card("rtx-4090", 24, 384, 21, 128, 2.520, 4, 16),
        # NVIDIA's RTX Blackwell whitepaper and GeForce product pages (RTX 50)
        Card("rtx-5060-ti-16gb", 16, 128, 28, 36, 2.572, 5, 8),
        Card("rtx-5070", 12, 192, 28, 48, 2.512, 5, 16),
        Card("rtx-5080", 16, 256, 30, 84, 2.617, 5, 16),
    )
}
"""Cards by the name that `--gpu` takes."""


def find_card(name: str) -> Card:
    """The card of that name, in any case and with blanks for dashes. Raises OptionError, listing all, for another."""
    card = CARDS.get("-".join(name.lower().split()))
    if card is None:
        raise OptionError(f"the card {name!r} is not among the {len(CARDS)} known", hint=f"one of: {', '.join(CARDS)}")
    return card
