"""Cards: what their specifications come to."""

from __future__ import annotations

import pytest

from lowvram.errors import OptionError
from lowvram.offload.budget import GIB
from lowvram.offload.cards import CARDS, find_card


@pytest.mark.parametrize(
    ("name", "gb_per_s"),
    [("rtx-3060-12gb", 360), ("rtx-3080-10gb", 760), ("rtx-3080-12gb", 912), ("rtx-4060-ti-16gb", 288),
     ("rtx-4070", 504), ("rtx-4080", 716.8), ("rtx-4090", 1008), ("rtx-5060-ti-16gb", 448), ("rtx-5070", 672),
     ("rtx-5080", 960)],
)  # fmt: skip
def test_memory_is_as_fast_as_the_product_page_says(name: str, gb_per_s: float):
    assert find_card(name).memory_gb_per_s == pytest.approx(gb_per_s)


@pytest.mark.parametrize(
    ("name", "tflops"), [("rtx-3080-10gb", 59.5), ("rtx-4080", 97.5), ("rtx-4090", 165.2), ("rtx-5080", 112.6)]
)
def test_dense_float16_summed_in_float32_is_as_the_whitepaper_says(name: str, tflops: float):
    assert find_card(name).float16_tflops == pytest.approx(tflops, rel=0.001)


def test_a_slot_of_16_lanes_of_generation_4_moves_31_gb_a_second():
    assert find_card("rtx-4090").pcie_gb_per_s == pytest.approx(31.5, abs=0.01)
    assert find_card("rtx-4060-ti-16gb").pcie_gb_per_s == pytest.approx(15.75, abs=0.01)


def test_a_desktop_keeps_some_of_every_card():
    assert find_card("rtx-3080-10gb").usable_bytes == pytest.approx(9.2 * GIB, abs=1)


@pytest.mark.parametrize("name", ["RTX 4070", "rtx-4070", "Rtx-4070"])
def test_a_name_is_found_however_it_is_written(name: str):
    assert find_card(name) is CARDS["rtx-4070"]


def test_an_unknown_card_is_refused_with_the_names_of_the_known():
    with pytest.raises(OptionError, match=r"rtx-3060-12gb, .*rtx-5080"):
        find_card("voodoo-2")
