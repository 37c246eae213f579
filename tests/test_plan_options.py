"""`plan` and `run --plan` told the same: whatever `run` can be told that changes a plan, `plan` can be told as well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from media_files import numbered_frame, sine, write_video
from typer.testing import CliRunner

from lowvram.cli import app
from lowvram.offload.plan import Plan

HERE = ("--device", "cpu", "--vram", "64MiB")
"""The machine that both plan for; what is free on it is no option."""

CHANGING = {
    "--system": "x",
    "--prompt": "How many people are there, and what is each of them doing?",
    "--max-tokens": "7",
    "--no-speech": "",
    "--max-seconds": "2",
    "--max-codes": "9",
    "--solver": "rk4",
    "--steps": "4",
    "--speech-mode": "low-latency",
    "--speech-dtype": "bfloat16",
    "--chunk-seconds": "4.8",
    "--play": "",
    "--fps": "1",
    "--max-frames": "2",
    "--max-pixels": "784",
    "--start": "1",
    "--end": "1",
    "--no-video-sound": "",
    "--vram": "8MiB",
    "--ram": "2GiB",
    "--kv": "int8",
    "--dtype": "float32",
    "--prefill-chunk": "16",
}
"""Options of `run` with a value, empty for a switch, that a plan depends on."""

INDIFFERENT = {
    "--temperature": "0.5",
    "--seed": "3",
    "--voice": "Ethan",
    "--speech-temperature": "0",
    "--guidance": "0",
    "--output": "said.wav",
    "--kernel": "reference",
    "--max-prompt-tokens": "5000",
    "--verbose": "",
    "--quiet": "",
}
"""Options of `run` with a value that no plan depends on."""

NEEDING_ANOTHER = {"--top-k", "--top-p", "--revision"}
NOT_FOR_A_PLAN = {"--device", "--model", "--speak", "--json", "--ndjson", "--plan", "--dry-run"}
"""Options that cannot be tried one by one here: the machine and the model, and what is done about them."""

SPELLED = {"--play": ("--speech-mode", "balanced")}
"""What `plan` is told instead: it need not know why a mode was chosen."""


def options_of(command: str) -> set[str]:
    """The longest name of each option."""
    params = typer.main.get_command(app).commands[command].params
    return {max(param.opts, key=len) for param in params if param.param_type_name == "option"} - {"--help"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = [numbered_frame(n) for n in range(16)]
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", frames, fps=4, sound=sine(48_000, 4.0))


@pytest.fixture(scope="module")
def asked(demo: Path, clip: Path) -> tuple[str, ...]:
    return (str(clip), "--model", str(demo), "--json", *HERE)


def plan_told(*arguments: str) -> Plan:
    done = CliRunner().invoke(app, [argument for argument in arguments if argument])
    assert done.exit_code == 0, done.stderr
    return Plan.from_json(json.loads(done.stdout))


@pytest.fixture(scope="module")
def usual(asked: tuple[str, ...]) -> Plan:
    return plan_told("run", "--plan", *asked)


def test_every_option_of_run_is_known_to_change_a_plan_or_not():
    assert options_of("run") == {*CHANGING, *INDIFFERENT, *NEEDING_ANOTHER, *NOT_FOR_A_PLAN}


def test_plan_and_run_agree_when_nothing_more_is_said(asked: tuple[str, ...], usual: Plan):
    assert plan_told("plan", *asked) == usual


@pytest.mark.parametrize(("option", "value"), CHANGING.items(), ids=CHANGING)
def test_an_option_that_changes_the_plan_of_run_changes_that_of_plan_alike(
    asked: tuple[str, ...], usual: Plan, option: str, value: str
):
    here = plan_told("run", "--plan", *asked, option, value)
    assert here != usual
    assert plan_told("plan", *asked, *SPELLED.get(option, (option, value))) == here


@pytest.mark.parametrize(("option", "value"), INDIFFERENT.items(), ids=INDIFFERENT)
def test_an_option_that_plan_may_lack_changes_no_plan(asked: tuple[str, ...], usual: Plan, option: str, value: str):
    assert plan_told("run", "--plan", *asked, option, value) == usual


def test_what_does_not_fit_is_refused_in_the_same_words(asked: tuple[str, ...]):
    refused = [
        CliRunner().invoke(app, [*door, *asked, "--vram", "1MiB", "--speech-mode", "offload"])
        for door in (["run", "--plan"], ["plan"])
    ]
    assert {done.exit_code for done in refused} == {4}
    assert len({done.stderr.splitlines()[-1] for done in refused}) == 1


def test_a_plan_is_for_the_prompt_that_a_dry_run_counts(asked: tuple[str, ...]):
    counted = CliRunner().invoke(app, ["run", "--dry-run", *asked, "--fps", "1", "-p", "Who speaks?"])
    planned = plan_told("plan", *asked, "--fps", "1", "-p", "Who speaks?")
    assert json.loads(counted.stdout)["prompt_tokens"] == planned.prompt_tokens
