from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
BRIEF = ["--device", "cpu", "--shape", "128x64", "--rows", "1", "3", "--threads", "1", "2", "--rounds", "2"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def found_as_a_script_finds_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bandwidth
    import kernels

    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 2**16)
    monkeypatch.setattr(bandwidth, "CPU_READ_BYTES", 2**14)
    monkeypatch.setattr(kernels, "BUFFER_BYTES", 2**16)
    monkeypatch.setattr(kernels, "CELL_S", 0.0)


def run_and_keep(folder: Path) -> dict[str, Any]:
    import kernels

    kept = folder / "kernels.json"
    assert kernels.main([*BRIEF, "-o", str(kept)]) == 0
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return result


def test_every_way_has_a_cell_for_every_number_of_threads_and_rows(tmp_path: Path):
    import kernels

    cells = run_and_keep(tmp_path)["cells"]
    names = [kernels.LINEAR, *kernels.backends(CPU, torch.bfloat16)]
    assert [(cell["threads"], cell["rows"], cell["way"]) for cell in cells] == [
        (threads, rows, name) for threads in (1, 2) for rows in (1, 3) for name in names
    ]
    assert "reference" in names and all(cell["rounds"] == 2 for cell in cells)


def test_8_bit_ways_have_cells_of_their_own(tmp_path: Path):
    import kernels

    kept = tmp_path / "kernels.json"
    assert kernels.main([*BRIEF, "--bits", "8", "-o", str(kept)]) == 0
    cells = json.loads(kept.read_text(encoding="utf-8"))["cells"]
    names = list(kernels.int8_backends(CPU, torch.bfloat16))
    assert list(dict.fromkeys(cell["way"] for cell in cells)) == [kernels.LINEAR, *names]
    assert {cell["weight_bytes"] for cell in cells if cell["way"] in names} == {128 * 64 + 2 * 64}


def test_rates_count_the_bytes_that_a_layout_holds_and_two_operations_for_a_weight(tmp_path: Path):
    cells = run_and_keep(tmp_path)["cells"]
    held = {cell["way"]: cell["weight_bytes"] for cell in cells}
    assert held["16-bit linear"] == 2 * 128 * 64
    assert held["reference"] == (128 * 64 + 64) // 2 + 2 * 64  # nibbles and one group's zeros, then its scales
    for cell in cells:
        assert cell["gb_per_s"] == pytest.approx(cell["weight_bytes"] / cell["ms"] / 1e6)
        assert cell["gflop_per_s"] == pytest.approx(2 * cell["rows"] * 128 * 64 / cell["ms"] / 1e6)


def test_the_16_bit_linear_is_what_others_are_compared_with(tmp_path: Path):
    cells = run_and_keep(tmp_path)["cells"]
    linears = [cell for cell in cells if cell["way"] == "16-bit linear"]
    assert {cell["speedup"] for cell in linears} == {1.0}
    assert [max(cell["matmul_share"] for cell in linears if cell["threads"] == n) for n in (1, 2)] == [1.0, 1.0]


def test_ratios_are_medians_of_rounds_and_not_ratios_of_medians(monkeypatch: pytest.MonkeyPatch):
    import kernels

    seconds = iter((9.0, 9.0, 9.0, 1.0, 4.0, 2.0, 2.0, 1.0, 4.0, 4.0, 8.0, 1.0))
    monkeypatch.setattr(kernels, "_timer", lambda way, x: lambda: next(seconds))
    monkeypatch.setattr(kernels, "seconds", lambda work, device: next(seconds))
    found = {kernels.LINEAR: kernels.Way([], 8 * 10**9), "packed": kernels.Way([], 2 * 10**9)}
    read = kernels.PlainRead("by hand", 10**9, int)
    _, packed = kernels._cells((2, 2), 1, found, torch.ones(1, 2), read, 3)
    # Rounds of (read, linear, packed): (1, 4, 2), (2, 1, 4) and (4, 8, 1) seconds.
    assert packed.speedup == 2.0 and packed.speedup_quartiles == (1.125, 5.0)
    assert packed.ms == 2000 and packed.gb_per_s == 1.0
    assert packed.read_gb_per_s == 0.5 and packed.read_share == 1.0


def test_short_cells_take_more_rounds_until_the_most_of_them(monkeypatch: pytest.MonkeyPatch):
    import kernels

    monkeypatch.setattr(kernels, "CELL_S", 60.0)
    assert len(kernels._rounds({"quick": lambda: 0.0}, least=2)["quick"]) == kernels.MOST_ROUNDS


def test_copies_of_the_weights_take_turns_and_are_more_than_a_cache_holds():
    import kernels

    found = kernels.ways((128, 64), kernels.Bench(CPU, torch.bfloat16, 1))
    for way in found.values():
        assert len(way.calls) * way.weight_bytes > kernels.BUFFER_BYTES
        first, second = way.calls[0].args[-1], way.calls[1].args[-1]
        assert all(tensor.data_ptr() != second[name].data_ptr() for name, tensor in first.items())
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_torch_has_its_threads_back_after_a_run(tmp_path: Path):
    import kernels

    with kernels.torch_threads(3):
        run_and_keep(tmp_path)
        assert torch.get_num_threads() == 3


def test_the_card_says_how_busy_the_machine_was_and_that_llama_cpp_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import kernels

    monkeypatch.setattr(kernels, "version", lambda: None)
    conditions = run_and_keep(tmp_path)["card"]["conditions"]
    assert conditions["llama_cpp"] == "absent"
    assert {"load_average_before", "load_average_after"} <= set(conditions)
    printed = capsys.readouterr().out
    assert "load average before" in printed and "128x64, 2 thread(s)" in printed


def test_a_kept_result_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    import kernels_picture

    run_and_keep(tmp_path)
    assert kernels_picture.main([str(tmp_path / "kernels.json"), "-o", str(tmp_path / "kernels.png")]) == 0
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_run_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    import kernels

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert kernels.main([*BRIEF, "--picture", str(tmp_path / "kernels.png")]) == 6
    assert 'pip install "lowvram[plots]"' in capsys.readouterr().err
