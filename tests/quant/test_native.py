from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from awq_by_hand import random_stored, weight_by_hand
from torch import Tensor

from lowvram.errors import BackendError
from lowvram.quant import compiled, native
from lowvram.quant.compiled import CSource
from lowvram.quant.int4_cpu import PACKED, SCALES_AND_ZEROS, Int4CpuBackend
from lowvram.quant.native import Multiply

TOLERANCE = 3e-3
SLIPS = [
    ("the nibble for 0", "(i & 15) - 8", "(i & 15) - 7"),
    ("halves of a byte", "_mm512_srli_epi16(second, 4)", "second"),
    ("the two inputs of a pair", "first[4 * j + 2] = (uint8_t)(HALF + j)", "first[4 * j + 2] = (uint8_t)j"),
    ("the group's scale", "2 * (group * p->columns +", "2 * ("),
    ("the row's sums", "(row + r) * groups + group", "row * groups + group"),
    ("scale and zero", "_mm512_fmadd_ps(zero, inputs", "_mm512_fnmadd_ps(zero, inputs"),
    ("the last row of a tile", "case 3: multiply_tile(p, block, row, 3,", "case 3: multiply_tile(p, block, row, 2,"),
]


NOT_FOR_THIS_MACHINE = re.compile(
    "no C compiler here|no AVX-512 instructions for bfloat16|OpenMP threads cannot be reached"
)
"""Refusals that say nothing against the kernel. That it does not compile, or is wrong, is a failure."""


@pytest.fixture
def multiply() -> Multiply:
    try:
        return native.load_kernel()
    except BackendError as refusal:
        if NOT_FOR_THIS_MACHINE.search(str(refusal)):
            pytest.skip(str(refusal))
        raise


def random_rows(n: int, inputs: int) -> Tensor:
    return torch.randn(n, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()


def packed_by_torch(stored: tuple[Tensor, Tensor, Tensor], group_size: int) -> tuple[Tensor, Tensor]:
    backend = Int4CpuBackend(load=None)
    layout = backend.layout(len(stored[0]), stored[2].shape[1], group_size, torch.bfloat16)
    weights = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in layout.items()}
    backend.pack(*stored, group_size, weights)
    return weights[PACKED], weights[SCALES_AND_ZEROS]


@pytest.mark.parametrize("shape", [(64, 64, 32), (256, 192, 64), (3584, 512, 128), (512, 128, 256)], ids=str)
def test_products_are_as_close_to_exact_as_bfloat16_allows(multiply: Multiply, shape: tuple[int, int, int]):
    inputs, outputs, group_size = shape
    stored = random_stored(*shape)
    packed, pairs = packed_by_torch(stored, group_size)
    for n in (1, 2, 3, 4, 5, 9, 260):
        rows = random_rows(n, inputs)
        exact = rows.double() @ weight_by_hand(stored, group_size).t()
        product = multiply(rows, packed, pairs, group_size)
        assert product.shape == (n, outputs) and product.dtype == torch.bfloat16
        assert (product - exact).norm() <= TOLERANCE * exact.norm()


def test_a_row_has_the_same_bits_whatever_comes_with_it_and_on_any_number_of_threads(multiply: Multiply):
    packed, pairs = packed_by_torch(random_stored(256, 320, 32), 32)
    rows = random_rows(7, 256)
    together = multiply(rows, packed, pairs, 32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(multiply(rows, packed, pairs, 32), together)
            assert torch.equal(torch.cat([multiply(row, packed, pairs, 32) for row in rows.split(1)]), together)
    finally:
        torch.set_num_threads(before)


def test_no_rows_give_no_rows(multiply: Multiply):
    packed, pairs = packed_by_torch(random_stored(64, 64, 32), 32)
    assert multiply(random_rows(0, 64), packed, pairs, 32).shape == (0, 64)


def test_the_backend_multiplies_by_it_where_it_serves(multiply: Multiply):
    asked: list[int] = []

    def counted(rows: Tensor, packed: Tensor, pairs: Tensor, group_size: int) -> Tensor:
        asked.append(len(rows))
        return multiply(rows, packed, pairs, group_size)

    stored = random_stored(128, 64, 32)
    packed, pairs = packed_by_torch(stored, 32)
    backend = Int4CpuBackend(load=lambda: counted)
    x = random_rows(200, 128)
    for rows in (x[:1], x.view(2, 100, 128)):
        product = backend.matmul(rows, {PACKED: packed, SCALES_AND_ZEROS: pairs}, 32)
        exact = rows.double() @ weight_by_hand(stored, 32).t()
        assert (product - exact).norm() <= TOLERANCE * exact.norm()
    assert backend.compiled and asked == [1, 200]


@pytest.mark.parametrize(("what", "right", "wrong"), SLIPS, ids=[what for what, _, _ in SLIPS])
def test_a_kernel_with_a_slip_is_refused(
    multiply: Multiply, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, right: str, wrong: str
):
    source = native.SOURCE.text.decode()
    assert right in source
    monkeypatch.setattr(CSource, "text", source.replace(right, wrong).encode())
    with pytest.raises(BackendError, match="what was compiled is wrong by"):
        native.load_kernel(tmp_path)


def test_it_is_compiled_once(multiply: Multiply, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    native.load_kernel(tmp_path)
    compiled._library.cache_clear()
    monkeypatch.setattr(compiled, "COMPILERS", ())
    native.load_kernel(tmp_path)
    assert [kept.suffix for kept in tmp_path.iterdir()] == [".so"]


def test_without_a_compiler_torch_s_own_kernel_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(BackendError, match="none of no-such-compiler was found"):
        native.load_kernel(tmp_path)
    backend = Int4CpuBackend(load=lambda: native.load_kernel(tmp_path))
    stored = random_stored(128, 64, 32)
    packed, pairs = packed_by_torch(stored, 32)
    x = random_rows(3, 128)
    product = backend.matmul(x, {PACKED: packed, SCALES_AND_ZEROS: pairs}, 32)
    exact = x.double() @ weight_by_hand(stored, 32).t()
    assert not backend.compiled and (product - exact).norm() <= TOLERANCE * exact.norm()


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler here")
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(CSource, "text", b"#error this machine is not for us\n")
    with pytest.raises(BackendError, match="this machine is not for us"):
        native.load_kernel(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler here")
def test_a_processor_without_the_instructions_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    source = b"int lowvram_supported(void) { return 0; }\nvoid lowvram_multiply(void) {}\n"
    monkeypatch.setattr(CSource, "text", source)
    with pytest.raises(BackendError, match="no AVX-512 instructions for bfloat16"):
        native.load_kernel(tmp_path)


def test_without_torch_s_threads_it_is_refused_and_not_compiled(
    multiply: Multiply, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
):
    (tmp_path / "maps").write_text("7f00-7f01 r-xp 00000000 00:00 0 /usr/lib/libc.so.6\n")
    monkeypatch.setattr(compiled, "MAPS", tmp_path / "maps")
    compiled._torch_team.cache_clear()
    request.addfinalizer(compiled._torch_team.cache_clear)
    with pytest.raises(BackendError, match="torch's OpenMP threads cannot be reached"):
        native.load_kernel(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(compiled, "COMPILERS", ("cc", "python3"))
    occupied = tmp_path / "a file"
    occupied.touch()
    with pytest.raises(BackendError, match="a file"):
        native.load_kernel(occupied / "below")
