"""Torch's CUDA side over a runtime that computes nothing: a whole turn passes, and what a card refuses is refused."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CUDA = torch.version.cuda or ""

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and CUDA.startswith("13.") and shutil.which("cc") and shutil.which("nm"))
    or torch.cuda.is_available(),
    reason="needs Linux, a C compiler, torch built for CUDA 13, and no card",
)


def stubbed(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "stub.py"), "--vram", "4GiB", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(f"import torch\n{text}", encoding="utf-8")
    return str(path)


def test_a_turn_about_a_clip_passes_with_its_decode_steps_captured(tmp_path: Path):
    brief = ("--max-tokens", "4", "--max-codes", "60", "-o", str(tmp_path / "reply.wav"))
    turn = stubbed("-m", "lowvram", "run", "examples/clip.mp4", "--model", "demo", "--vram", "2GiB", *brief)
    assert turn.returncode == 0, turn.stderr
    assert "refused" not in turn.stderr
    assert " 0 captured" not in turn.stderr and " captured" in turn.stderr


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("x.sum().item()", "a wait for a captured stream"),
        ("torch.cuda.synchronize()", "a wait for the card during a capture"),
        ("torch.cuda.current_stream().wait_event(before)", "an event from before a capture"),
    ],
)
def test_what_breaks_a_capture_is_refused(tmp_path: Path, step: str, reason: str):
    capture = (
        "x = torch.ones(8, device='cuda')\nbefore = torch.cuda.current_stream().record_event()\n"
        f"with torch.cuda.graph(torch.cuda.CUDAGraph()):\n    x.add_(1)\n    {step}\n"
    )
    broken = stubbed(script(tmp_path, capture))
    assert broken.returncode == 1 and f"stub: refused, {reason}" in broken.stderr


def test_torchs_sanitizer_reports_waits_that_are_left_out_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_CUDA_SANITIZER", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    tests = stubbed("-m", "pytest", "-q", "tests/offload/test_streams.py", "-k", "sanitizer")
    assert tests.returncode == 0 and "skipped" not in tests.stdout, tests.stdout


def test_after_a_broken_capture_torch_gives_memory_back_as_before(tmp_path: Path):
    capture = (
        "from lowvram.graphs import CudaRecorder\nx = torch.ones(8, device='cuda')\n"
        "step = lambda: x.sum().item()\nassert CudaRecorder(torch.device('cuda:0')).capture(step) is step\n"
        "large = torch.empty(2**26, device='cuda')\ndel large\ntorch.cuda.empty_cache()\n"
        "assert torch.cuda.memory_reserved() < 2**26"
    )
    mended = stubbed(script(tmp_path, capture))
    assert mended.returncode == 0 and "a wait for a captured stream" in mended.stderr, mended.stderr


def test_kernels_of_ours_start_where_a_warning_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error:Passing foreign stream objects:DeprecationWarning")
    brief = ("--no-speech", "--max-tokens", "2", "--kernel", "int4-cuda")
    turn = stubbed("-m", "lowvram", "run", "-p", "hello", "--model", "demo", "--vram", "2GiB", *brief)
    assert turn.returncode == 0, turn.stderr


def test_tensors_beyond_the_cards_memory_are_an_out_of_memory_error(tmp_path: Path):
    full = stubbed(script(tmp_path, "held = [torch.empty(2**30, dtype=torch.uint8, device='cuda') for _ in range(5)]"))
    assert full.returncode == 1 and "torch.OutOfMemoryError" in full.stderr


def test_the_cards_memory_cannot_be_touched_by_the_host(tmp_path: Path):
    touch = "import ctypes\nctypes.string_at(torch.ones(8, device='cuda').data_ptr(), 1)"
    assert stubbed(script(tmp_path, touch)).returncode == -signal.SIGSEGV % 256
