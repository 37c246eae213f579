from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import pytest
import torch
from media_files import numbered_frame, write_video

from lowvram.device import Device
from lowvram.errors import InfeasibleBudgetError
from lowvram.offload.budget import Budget
from lowvram.offload.meter import TRACKED_LIVE_TENSORS
from lowvram.offload.profile import DEVICE_ALLOCATOR, DEVICE_RESERVED, PLANNED, TRACED
from lowvram.options import MODES, TALKER_SAMPLING, SamplingParams, SpeechParams

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
BRIEF = ("--device", "cpu", "--max-tokens", "2", "--max-codes", "12")


@pytest.fixture(scope="module", autouse=True)
def beside_their_scripts() -> Iterator[None]:
    """Benchmarks are found as `python benchmarks/memory.py` finds what it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    """benchmarks/memory.py"""
    import memory

    return memory


@pytest.fixture(scope="module")
def reference_memory() -> ModuleType:
    """benchmarks/reference_memory.py"""
    import reference_memory

    return reference_memory


@pytest.fixture(scope="module")
def measured(memory: ModuleType, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What one run on a silent clip of two seconds prints, and what it keeps."""
    folder = tmp_path_factory.mktemp("memory")
    clip = write_video(folder / "clip.mp4", [numbered_frame(n) for n in range(4)], fps=2)
    kept = folder / "results" / "memory.json"
    with redirect_stdout(StringIO()) as printed:
        assert memory.main([str(clip), "--model", str(demo), *BRIEF, "-o", str(kept)]) == 0
    return printed.getvalue(), json.loads(kept.read_text(encoding="utf-8"))


def test_planned_and_tracked_peaks_are_two_columns_over_the_same_phases(measured: tuple[str, dict[str, Any]]):
    peaks = measured[1]["peak_bytes"]
    assert list(peaks) == [PLANNED, TRACKED_LIVE_TENSORS]
    assert list(peaks[PLANNED]) == list(peaks[TRACKED_LIVE_TENSORS])
    assert all(peak_bytes > 2**20 for column in peaks.values() for peak_bytes in column.values())


def test_a_card_says_what_was_run_on_what(measured: tuple[str, dict[str, Any]]):
    card = measured[1]["card"]
    assert card["versions"]["torch"] == version("torch") and card["commit"] and card["date"]
    assert card["device"].startswith("CPU")
    assert (card["conditions"]["clip"], card["conditions"]["codes"]) == ("clip.mp4", 12)


def test_people_read_the_card_then_a_table_then_what_the_count_includes(measured: tuple[str, dict[str, Any]]):
    card, table = measured[0].split("\n\n")
    assert "commit: " in card and f"torch {version('torch')}" in card
    assert table.startswith("phase") and PLANNED in table and TRACKED_LIVE_TENSORS in table
    assert "the host's share" in table.splitlines()[-1]


def test_an_error_is_one_sentence_and_its_exit_code(memory: ModuleType, demo: Path, capsys: pytest.CaptureFixture[str]):
    assert memory.main(["missing.mp4", "--model", str(demo), *BRIEF]) == 5
    assert capsys.readouterr().err.startswith("error: cannot read missing.mp4")


@pytest.fixture(scope="module")
def kept_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `traced` keeps its rows."""
    return tmp_path_factory.mktemp("traced") / "memory.json"


@pytest.fixture(scope="module")
def traced(memory: ModuleType, kept_trace: Path) -> tuple[str, dict[str, Any]]:
    """What a trace of the demo prints and keeps: one clip in a budget that is enough, and in one that is not."""
    options = (
        "--trace",
        "demo",
        "--seconds",
        "2",
        "--budgets",
        "2GiB",
        "1MiB",
        "--no-speech",
        "--largest",
        "2",
        "--timeline",
    )
    with redirect_stdout(StringIO()) as printed:
        assert memory.main([*options, "-o", str(kept_trace)]) == 0
    return printed.getvalue(), json.loads(kept_trace.read_text(encoding="utf-8"))


def test_planned_and_traced_peaks_are_two_columns_over_the_same_phases(traced: tuple[str, dict[str, Any]]):
    planned, counted = (traced[1]["rows"][0]["peak_bytes"][kind] for kind in (PLANNED, TRACED))
    assert list(planned) == list(counted)
    assert all(planned[phase] >= counted[phase] > 2**20 for phase in planned)


def test_a_trace_keeps_its_timeline_and_the_card_says_that_nothing_was_measured(traced: tuple[str, dict[str, Any]]):
    _, kept = traced
    assert kept["card"]["device"].startswith("none: traced")
    assert {moment["label"] for moment in kept["rows"][0]["timeline"]} >= {"load", "see", "prefill", "text"}


def test_a_budget_in_which_nothing_fits_is_a_row_that_says_so(traced: tuple[str, dict[str, Any]]):
    printed, kept = traced
    assert "refused" in kept["rows"][1] and "1MiB  16bit  refused: phase" in printed


def test_a_trace_goes_on_where_its_file_ends(
    memory: ModuleType, kept_trace: Path, traced: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "trace_turn", None)  # what is there is not traced again
    again = ("--trace", "demo", "--seconds", "2", "--no-speech", "--resume", "-o", str(kept_trace))
    with redirect_stdout(StringIO()):
        assert memory.main([*again, "--budgets", "2GiB", "1MiB", "--kv", "16bit"]) == 0
        assert memory.main([*again, "--budgets", "1MiB", "--kv", "int8"]) == 0
    rows = json.loads(kept_trace.read_text(encoding="utf-8"))["rows"]
    assert rows[:2] == traced[1]["rows"]
    assert [row["kv"] for row in rows] == ["16bit", "16bit", "int8"]


@pytest.mark.parametrize("text", ["", "{}", '{"card": {}, "rows": []}'])
def test_rows_of_another_kind_are_not_gone_on_with(
    memory: ModuleType, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "memory.json").write_text(text)
    assert memory.main(["--trace", "demo", "--resume", "-o", str(tmp_path / "memory.json")]) == 2
    assert "holds no rows to go on with" in capsys.readouterr().err


def test_rows_of_another_question_are_not_gone_on_with(
    memory: ModuleType, kept_trace: Path, traced: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
):
    assert memory.main(["--trace", "demo", "--resume", "-o", str(kept_trace)]) == 2
    assert "'speech': False" in capsys.readouterr().err


def test_processes_side_by_side_trace_the_same_rows_in_the_same_order(
    memory: ModuleType, traced: tuple[str, dict[str, Any]], tmp_path: Path
):
    kept = tmp_path / "memory.json"
    options = ("--trace", "demo", "--seconds", "2", "--budgets", "2GiB", "1MiB", "--no-speech", "--jobs", "2")
    with redirect_stdout(StringIO()):
        assert memory.main([*options, "-o", str(kept)]) == 0
    rows = json.loads(kept.read_text(encoding="utf-8"))["rows"]
    assert [row.get("refused") for row in rows] == [row.get("refused") for row in traced[1]["rows"]]
    assert rows[0]["peak_bytes"] == traced[1]["rows"][0]["peak_bytes"]


def test_rows_there_was_no_time_for_are_named(memory: ModuleType, tmp_path: Path):
    kept = tmp_path / "memory.json"
    with redirect_stdout(StringIO()):
        assert memory.main(["--trace", "demo", "--seconds", "2", "3", "--minutes", "0", "-o", str(kept)]) == 0
    result = json.loads(kept.read_text(encoding="utf-8"))
    assert result["rows"] == []
    assert [cell["seconds"] for cell in result["left_out_for_time"]] == [2.0] * 5 + [3.0] * 5


def test_what_a_card_says_of_a_turn_joins_its_row(memory: ModuleType):
    row = {"budget": "8GiB", "peak_bytes": {PLANNED: {"think": 3}, TRACED: {"think": 2}}}
    card = {"card_peak_bytes": {DEVICE_ALLOCATOR: {"think": 2}, DEVICE_RESERVED: {"think": 4}}, "card_retries": 1}
    merged = memory._merged(row, card)
    assert list(merged["peak_bytes"]) == [PLANNED, TRACED, DEVICE_ALLOCATOR, DEVICE_RESERVED]
    assert merged["card_retries"] == 1


def test_a_turn_that_failed_on_the_card_is_still_a_row(memory: ModuleType):
    row = {"budget": "8GiB", "peak_bytes": {PLANNED: {"think": 3}, TRACED: {"think": 2}}}
    assert memory._merged(row, {"failed": "OutOfMemoryError"}) == row | {"failed": "OutOfMemoryError"}
    assert list(memory.row_lines(row | {"seconds": 1.0, "kv": "16bit", "failed": "OutOfMemoryError"}))[-1].endswith(
        "failed on the card: OutOfMemoryError"
    )


CARD_BYTES = 10 * 2**30


@pytest.fixture
def card(memory: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of ten GiB, as far as opening it goes."""
    opened = Device(torch.device("cuda", 0), "a card", CARD_BYTES)
    monkeypatch.setattr(memory, "open_device", lambda _name: opened)


@pytest.mark.usefixtures("card")
def test_a_turn_that_failed_on_the_card_is_kept_and_fails_the_run(
    memory: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept, options = tmp_path / "memory.json", ("--trace", "demo", "--seconds", "2", "--budgets", "1MiB", "--no-speech")
    for said, code in (({"failed": "OutOfMemoryError"}, 1), ({"not_measured": "9 GiB are free"}, 0)):
        monkeypatch.setattr(memory, "measure_on_card", lambda *_, said=said: dict(said))
        with redirect_stdout(StringIO()):
            assert memory.main([*options, "--weights", "folder", "-o", str(kept)]) == code
        (row,) = json.loads(kept.read_text(encoding="utf-8"))["rows"]
        assert said.items() <= row.items()


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("budget", ["10GiB", "11GiB"])
def test_a_turn_is_measured_in_its_rows_own_budget_or_not_at_all(
    memory: ModuleType, budget: str, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise InfeasibleBudgetError("too little", phase="think", needed_bytes=2, available_bytes=1)

    monkeypatch.setattr(memory, "_answer_about_gray", refuse)
    cell = memory.Cell(15.0, budget, "16bit")
    assert list(memory.measure_on_card("folder", cell, SamplingParams(), None)) == ["not_measured"]


def test_the_largest_storages_of_a_peak_are_listed_by_who_made_them(traced: tuple[str, dict[str, Any]]):
    for lines in traced[1]["rows"][0]["largest"].values():
        assert len(lines) == 2 and all("aten." in line and ".py:" in line for line in lines)


def test_a_made_up_clip_is_as_long_as_asked_and_has_sound(memory: ModuleType, tmp_path: Path):
    memory.write_clip(tmp_path / "clip.mp4", 3)
    with av.open(str(tmp_path / "clip.mp4")) as clip:
        shown = [(frame.height, frame.width) for frame in clip.decode(video=0)]
    with av.open(str(tmp_path / "clip.mp4")) as clip:
        samples = sum(frame.samples for frame in clip.decode(audio=0))
    assert shown == 6 * [memory.FRAME]
    assert samples >= 3 * memory.SOUND_HZ


@pytest.mark.parametrize("seconds", [15, 60])
def test_the_references_traced_peak_is_the_published_one_read_as_gib(reference_memory: ModuleType, seconds: int):
    tokens = reference_memory.prompt_tokens(seconds)
    peak_bytes = reference_memory.trace_thinker(reference_memory.thinker_config(), tokens)
    assert peak_bytes / 2**30 == pytest.approx(reference_memory.PUBLISHED[seconds], rel=0.05)


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """benchmarks/gpu.py"""
    import gpu

    return gpu


def test_the_run_for_a_card_can_be_gone_through_without_one(
    gpu: ModuleType, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu, "SAMPLING", SamplingParams(max_tokens=4, seed=1))
    monkeypatch.setattr(gpu, "SPEECH", SpeechParams(sampling=replace(TALKER_SAMPLING, max_tokens=24), steps=2))
    kept, sections = (
        tmp_path / "gpu.json",
        ("missing", "races", "rates", "overhead", "kernels", "int8_kernels", "graphs", "speed", "guest"),
    )
    with redirect_stdout(StringIO()):
        code = gpu.main(["--device", "cpu", "--weights", str(demo), "--only", *sections, "-o", str(kept)])
    results = json.loads(kept.read_text(encoding="utf-8"))
    assert code == 0 and list(results) == ["card", *sections]
    assert results["missing"]["needed"] == []
    assert results["guest"]["same_answer"] is True
    assert results["rates"]["device_read_and_write"] > 0
    assert results["overhead"]["blocks"] > 2
    assert [turn["way"] for turn in results["speed"]["turns"]] == [f"{mode}, euler" for mode in MODES]
    assert results["graphs"]["alike_codes"] == {"one by one": 24, "fixed shapes": 24}
    assert results["races"]["exit_code"] == 0 and "test_cuda.py: " in results["races"]["printed"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_card_is_asked_to_hold_is_a_question_that_can_be_asked(
    gpu: ModuleType, memory: ModuleType, demo: Path, device: str
):
    """The card's own arguments are gone through as far as a machine without one can."""
    chosen = memory._parser().parse_args(gpu.memory_arguments(gpu.Bench(device, demo)))
    assert chosen.trace in memory.MODELS and chosen.json
    assert all(Budget.of(budget).vram_bytes for budget in chosen.budgets)
    assert (chosen.weights == str(demo)) is (device == "cuda")


def test_time_that_making_weights_takes_is_not_left_for_memory(
    gpu: ModuleType, memory: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = SimpleNamespace(monotonic=lambda: clock.now_s, now_s=0.0)
    making = SimpleNamespace(wait=lambda: setattr(clock, "now_s", 90.0))
    monkeypatch.setattr(gpu, "time", clock)
    arguments = gpu.memory_arguments(gpu.Bench("cuda", tmp_path, making, until_s=120.0))
    assert memory._parser().parse_args(arguments).minutes == 0.5


def test_as_many_processes_trace_as_memory_and_half_the_cores_allow(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch):
    def jobs(cores: int, free_gib: int) -> int:
        monkeypatch.setattr(gpu.os, "cpu_count", lambda: cores)
        monkeypatch.setattr(gpu.psutil, "virtual_memory", lambda: SimpleNamespace(available=free_gib * 2**30))
        return int(gpu._jobs())

    assert [jobs(16, 120), jobs(12, 12), jobs(12, 2), jobs(1, 12)] == [8, 4, 1, 1]


def test_weights_that_could_not_be_made_fail_the_sections_that_need_them(gpu: ModuleType, tmp_path: Path):
    making = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    bench = gpu.Bench("cpu", tmp_path, making)
    assert gpu.run_section(gpu.guest, bench)["failed"] == "RuntimeError: no weights: synthetic.py ended with 7"


def test_a_program_that_is_not_done_in_time_has_failed_with_what_it_printed(gpu: ModuleType):
    hangs = "import time; print('so far', flush=True); time.sleep(60)"
    result = gpu._python("-S", "-c", hangs, give_up_s=3)
    assert result == {"failed": "not done after 3 s", "printed": "so far\n"}


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), AssertionError("no code was said"), KeyError("ttft")])
def test_a_section_that_fails_says_how_and_the_others_still_run(gpu: ModuleType, demo: Path, error: Exception):
    def broken(_: object) -> dict[str, Any]:
        raise error

    assert gpu.run_section(broken, gpu.Bench("cpu", demo))["failed"] == f"{type(error).__name__}: {error}"
