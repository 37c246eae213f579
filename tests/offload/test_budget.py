"""Sizes as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.errors import OptionError
from lowvram.offload.budget import GIB, KIB, MIB, Budget, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [
        ("8GiB", 8 * 2**30),
        ("8G", 8 * 2**30),
        ("8GB", 8_000_000_000),
        ("8192MiB", 8 * 2**30),
        (" 7.5 gib ", 8_053_063_680),
        ("0.1GB", 100_000_000),
        ("512k", 512 * 1024),
        ("1048576", 2**20),
        ("42B", 42),
        (8589934592, 8589934592),
    ],
)
def test_a_size_is_read_in_its_unit(size: str | int, n_bytes: int):
    assert parse_bytes(size) == n_bytes


@pytest.mark.parametrize(
    "size", ["", "GiB", "9" * 5000, "8 TiBs", "-1GiB", "8,5GiB", "1e9", "8GiB2", "٨GiB", None, 1.5, True]
)
def test_what_is_no_size_is_refused_by_name(size: Any):
    with pytest.raises(OptionError, match="is not a size") as refused:
        parse_bytes(size)
    assert "8GiB" in refused.value.hint


@pytest.mark.parametrize("size", ["0", "0GiB", "0.1B", 0, -5])
def test_less_than_a_byte_is_refused(size: str | int):
    with pytest.raises(OptionError, match="at least 1 byte"):
        parse_bytes(size)


@pytest.mark.parametrize(("size", "meant"), [("8", "8GiB"), (" 12 ", "12GiB"), ("8192", "8192MiB")])
def test_a_number_that_lacks_its_unit_is_refused_with_the_likely_one(size: str, meant: str):
    with pytest.raises(OptionError, match=rf"without a unit is \d+ bytes \(did you mean {meant}\?\)"):
        parse_bytes(size)


@given(st.integers(min_value=MIB, max_value=2**80))
def test_a_bare_number_is_exact_at_any_size(n_bytes: int):
    assert parse_bytes(str(n_bytes)) == n_bytes


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (135_680, "132.5 KiB"),
        (MIB, "1.0 MiB"),
        (GIB, "1.00 GiB"),
        (7_784_628_224, "7.25 GiB"),
    ],
)
def test_a_size_is_printed_in_its_largest_unit(n_bytes: int, text: str):
    assert format_bytes(n_bytes) == text


@given(st.integers(min_value=1, max_value=2**45))
def test_what_is_printed_can_be_read_back_to_its_precision(n_bytes: int):
    assert parse_bytes(format_bytes(n_bytes)) == pytest.approx(n_bytes, rel=0.05)


def test_a_budget_is_read_from_sizes():
    assert Budget.of("8GiB", "16GB") == Budget(vram_bytes=8 * GIB, ram_bytes=16_000_000_000)


def test_no_size_is_no_limit():
    assert Budget.of() == Budget(vram_bytes=None, ram_bytes=None)


@pytest.mark.parametrize("sizes", [{"vram_bytes": 0}, {"ram_bytes": -1}])
def test_a_budget_of_nothing_is_refused(sizes: dict[str, int]):
    with pytest.raises(OptionError, match="budget is"):
        Budget(**sizes)
