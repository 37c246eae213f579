from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from media_files import numbered_frame, write_video
from typer.testing import CliRunner, Result

from lowvram.cli import app
from lowvram.offload.profile import PLANNED, SIMULATED_ALLOCATOR, TRACED, TRACKED_LIVE_TENSORS
from lowvram.profile_file import read_profile

BRIEF = ("--device", "cpu", "--max-tokens", "2", "--no-speech", "-q")


def profile(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A silent clip of two seconds."""
    return write_video(tmp_path_factory.mktemp("media") / "clip.mp4", [numbered_frame(n) for n in range(4)], fps=2)


@pytest.fixture(scope="module")
def kept(clip: Path, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kept profile of a measured answer."""
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    done = profile(clip, "--model", demo, *BRIEF, "-o", path)
    assert done.exit_code == 0, done.output
    return path


def test_a_real_answer_is_measured_beside_its_plan(kept: Path):
    recorded = read_profile(kept)
    assert list(recorded.profile.columns) == [PLANNED, TRACKED_LIVE_TENSORS]
    assert all(recorded.profile.columns[TRACKED_LIVE_TENSORS].values())


def test_a_profile_names_its_medium_without_the_folder(kept: Path):
    assert read_profile(kept).card["conditions"]["clip"] == "clip.mp4"


def test_a_traced_answer_of_a_stand_in_is_drawn_beside_a_kept_one(kept: Path, demo: Path, tmp_path: Path):
    shown = tmp_path / "report.html"
    done = profile(
        "--trace", "--video-seconds", 2, "--size", "56x56", "--model", demo, "--no-speech", "-q", "--json",
        "--html", shown, "--vs", kept,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    told: dict[str, Any] = json.loads(done.stdout)
    assert list(told["peak_bytes"]) == [PLANNED, SIMULATED_ALLOCATOR, TRACED] and told["timeline"]
    assert shown.read_text(encoding="utf-8").count("<svg") == 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--vs", "{kept}"), "--vs has no effect without --html"),
        (("--video-seconds", "2"), "--video-seconds has no effect without --trace"),
        (("--trace", "--device", "cpu"), "--trace and --device contradict"),
        (("--html", "page.html", "--vs", "missing.json"), "missing.json cannot be read"),
        (("{clip}", "-o", "{clip}"), "would be written over"),
        (("--html", "{kept}", "--vs", "{kept}"), "would be written over"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_model_is_opened(
    arguments: tuple[str, ...], complaint: str, kept: Path, clip: Path
):
    done = profile(*(argument.format(kept=kept, clip=clip) for argument in arguments), "--model", "no/such-model")
    assert done.exit_code == 2 and complaint in done.stderr
