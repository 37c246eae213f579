from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lowvram.cli import app
from lowvram.events import Event, Progress
from lowvram.listeners import Listener
from lowvram.quantize import LAYERS, Deviations, LayerReport, PartReport, QuantizeOptions, QuantizeReport
from lowvram.quantize.options import Agreement
from lowvram.quantize_command import STOPPED, follow_run, report_text

SMALL = ("--group-size", "32", "--samples", "2", "--sample-tokens", "16", "--device", "cpu")
REPORT = QuantizeReport(
    model="some/model",
    options=QuantizeOptions(),
    deviations=(),
    calibration_tokens=65536,
    held_out_tokens=8192,
    layers=(LayerReport(0, 0.01, 0.004),),
    rounded=Agreement(0.08, 0.91),
    quantized=Agreement(0.03, 0.95),
    head_alone=None,
    parts=(),
    weights_bytes=2**30,
)


PART = PartReport("talker", 8, 168, (), 2 * 2**30, 2**30, 3e-5)


class Said(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stages: list[str] = []

    def show(self, event: Event) -> None:
        assert isinstance(event, Progress)
        self.stages.append(event.stage)

    def say(self, line: str) -> None:
        self.lines.append(line)


def quantize(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lowvram.demo import TINY, build_demo

    folder = tmp_path_factory.mktemp("demo-16-bit")
    build_demo(folder, size=TINY, quantized=False, dtype="float16")
    return folder


def test_the_command_quantizes_and_prints_what_it_cost(source: Path, tmp_path: Path):
    done = quantize(source, tmp_path / "new", *SMALL, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told == json.loads((tmp_path / "new" / "quantize_report.json").read_text())
    assert told["options"]["group_size"] == 32 and len(told["layers"]) == 2
    assert "layer 1 of 2: error" in done.stderr
    again = quantize(source, tmp_path / "new", *SMALL)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "neither empty nor an unfinished run" in again.stderr


def test_the_command_takes_other_widths_and_parts_and_says_first_how_that_deviates(source: Path, tmp_path: Path):
    done = quantize(source, tmp_path / "new", *SMALL, "--bits", "8", "--also", "lm_head, encoders", "--also-bits", "4")
    assert done.exit_code == 0, done.output
    said = [line for line in done.stderr.splitlines() if line.startswith("unlike the published recipe, ")]
    assert [line.split()[4].rstrip(":") for line in said[:3]] == ["thinker", "encoders", "lm_head"]
    assert "lm_head     4        1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--group-size", "48"), "--group-size is 48 (one of: 32, 64, 128)"),
        (("--samples", "0"), "--samples is 0, but must be at least 1"),
        (("--sample-tokens", "-1"), "--sample-tokens is -1, but must be at least 1"),
        (("--bits", "6"), "--bits is 6 (one of: 4, 8)"),
        (("--also", "talker,ears"), "--also names 'ears' (any of: talker, encoders, lm_head)"),
        (("--also-bits", "4"), "--also-bits is 4, but also names nothing"),
    ],
)
def test_options_are_refused_by_their_names(source: Path, tmp_path: Path, arguments: tuple[str, ...], complaint: str):
    done = quantize(source, tmp_path / "new", *arguments)
    assert (done.exit_code, complaint in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "new").exists()


def events(layers: int) -> Iterator[Progress | LayerReport | QuantizeReport]:
    """A run whose first layer had been done before."""
    for layer in range(layers):
        if layer:
            yield Progress(f"layer {layer + 1} of {layers}", 1, 2, "tokens")
        yield Progress(LAYERS, layer + 1, layers, "layers")
        yield LayerReport(layer, 0.01, 0.004)
    yield REPORT


def test_each_layer_says_how_long_the_others_will_take():
    said, seconds = Said(), iter((100.0, 160.0, 220.0, 280.0))
    assert follow_run(events(4), said, clock=lambda: next(seconds)) == REPORT
    assert [line.rpartition("; ")[2] for line in said.lines] == [
        "done before",
        "about 2 min left",
        "about 60 s left",
        "what is left is to compare next words",
    ]
    assert said.lines[1].startswith("layer 2 of 4: error 4.00e-03, rounded to nearest 1.00e-02; ")
    assert said.stages == ["layer 2 of 4", "layer 3 of 4", "layer 4 of 4"]


def test_a_stopped_run_says_that_it_can_go_on():
    def stopped() -> Iterator[Progress]:
        yield Progress("copy", 1, 2, "bytes")
        raise KeyboardInterrupt

    said = Said()
    with pytest.raises(KeyboardInterrupt):
        follow_run(stopped(), said)
    assert said.lines == [STOPPED]


def test_deviations_and_parts_are_said_as_they_come():
    said = Said()
    follow_run(iter([Deviations(("one thing", "another")), PART, REPORT]), said)
    assert said.lines == [
        "unlike the published recipe, one thing",
        "unlike the published recipe, another",
        "talker: 168 linears in 8 bits, 2.00 GiB -> 1.00 GiB, error 3.00e-05",
    ]


def test_the_table_tells_of_parts_and_of_the_head():
    report = replace(
        REPORT,
        options=QuantizeOptions(bits=8, also=("talker",)),
        deviations=("one thing",),
        head_alone=Agreement(0.002, 0.99),
        parts=(PART,),
    )
    text = report_text(report)
    assert text.startswith("some/model: 8 bits, groups of 128, 1.00 GiB\nunlike the published recipe, one thing\n")
    assert "of that by the output head alone: KL 2.00e-03, same 99.00%" in text
    assert text.endswith("talker     8      168    2.00 GiB    1.00 GiB   3.00e-05")


def test_a_table_of_the_published_recipe_has_nothing_of_the_kind():
    assert not [word for word in ("unlike", "alone", "part") if word in report_text(REPORT)]


def test_the_table_says_where_there_was_less_to_calibrate_on_than_asked_for():
    assert "calibrated on 500 tokens of the 65,536 asked for" in report_text(replace(REPORT, calibration_tokens=500))


def test_the_table_names_conditions_and_both_ways():
    text = report_text(REPORT)
    assert "some/model: 4 bits, groups of 128, 1.00 GiB" in text
    assert "calibrated on 65,536 tokens, measured on 8,192 others" in text
    assert "1.00e-02      4.00e-03" in text
    assert "91.00%        95.00%" in text
