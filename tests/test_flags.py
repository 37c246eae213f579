from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from lowvram.device import DTYPES
from lowvram.errors import OptionError
from lowvram.flags import Draw, Machine, Memory, Question, Sight, Sound, Target, Voice, spread
from lowvram.offload.budget import Budget
from lowvram.options import MODES, Limits, MediaParams, SamplingParams, SpeechParams
from lowvram.quant.matmul import BACKENDS, BORROWED, BY_NAME


@dataclass(frozen=True)
class Pair:
    left: Annotated[int, typer.Option("--left")] = 1
    right: Annotated[int, typer.Option("-r", "--right")] = 2


Lone = Annotated[bool, typer.Option("--lone")]


def test_a_command_of_groups_takes_every_flag_by_itself():
    taken: list[object] = []

    @spread
    def command(ctx: typer.Context, pair: Pair, lone: Lone = False) -> None:
        """What it does."""
        taken.extend((type(ctx).__name__, pair, lone))

    assert list(inspect.signature(command).parameters) == ["ctx", "left", "right", "lone"]
    app = typer.Typer()
    app.command()(command)
    assert "What it does." in CliRunner().invoke(app, ["--help"]).output
    assert CliRunner().invoke(app, ["-r", "5", "--lone"]).exit_code == 0
    assert taken == ["Context", Pair(1, 5), True]


def test_nothing_typed_means_the_defaults_of_the_options():
    assert Question().sampling(Draw()) == SamplingParams() == Question().sampling()
    assert Sound().params(Voice()) == SpeechParams() == Sound().params()
    assert Sight().params() == MediaParams()
    assert (Memory().limits(), Memory().budget(), Target().card()) == (Limits(), Budget(), None)


def test_a_question_and_a_draw_make_one_way_to_answer():
    drawn = Question(max_tokens=7).sampling(Draw(temperature=0.5, top_k=3, top_p=0.9, seed=4))
    assert drawn == SamplingParams(max_tokens=7, temperature=0.5, top_k=3, top_p=0.9, seed=4)


def test_without_speech_there_is_none_but_what_is_wrong_is_refused_all_the_same():
    assert Sound(no_speech=True).params() is None
    with pytest.raises(OptionError, match="steps is 1"):
        Sound(no_speech=True, steps=1).params()


@pytest.mark.parametrize(("seconds", "codes"), [(1.0, 50), (0.02, 1), (2.39, 120), (82.0, 4100)])
def test_seconds_of_speech_are_50_codes_each(seconds: float, codes: int):
    assert Sound(max_seconds=seconds).params().sampling.max_tokens == codes


@pytest.mark.parametrize("seconds", [0.0, 0.01, -1.0, float("inf"), float("nan")])
def test_speech_that_is_no_code_long_is_refused(seconds: float):
    with pytest.raises(OptionError, match=r"max_seconds is .* s, but speech lasts at least 0\.02 s"):
        Sound(max_seconds=seconds).params()


@pytest.mark.parametrize(
    ("voice", "named", "mode"),
    [
        (Voice(), None, "exact"),
        (Voice(output="reply.wav"), None, "exact"),
        (Voice(play=True), None, "balanced"),
        (Voice(play=True, output="reply.wav"), None, "exact"),
        (Voice(play=True), "exact", "exact"),
        (Voice(), "low-latency", "low-latency"),
    ],
)
def test_a_mode_is_exact_unless_named_or_only_played(voice: Voice, named: str | None, mode: str):
    assert Sound(speech_mode=named).params(voice).mode == mode


def test_few_pixels_and_frames_make_the_usual_least_give_way():
    seen = Sight(max_pixels=5000, max_frames=2).params()
    assert (seen.max_pixels, seen.min_pixels, seen.image_max_pixels, seen.image_min_pixels) == (5000, 5000, 5000, 3136)
    assert (seen.max_frames, seen.min_frames) == (2, 2)


def test_memory_is_named_in_sizes_and_auto_is_no_limit_of_ones_own():
    assert Memory(vram="8GiB", ram="12GiB").budget() == Budget(8 * 2**30, 12 * 2**30)
    assert Memory(vram="auto").budget() == Budget()
    assert Memory(kv="int8", prefill_chunk=16).limits() == Limits(kv="int8", prefill_chunk_tokens=16)


@pytest.mark.parametrize(
    ("group", "flag", "names"),
    [
        (Sound, "speech_mode", MODES),
        (Memory, "dtype", ("auto", *DTYPES)),
        (Machine, "kernel", [backend.name for backend in (*BACKENDS, *BY_NAME, *BORROWED)]),
    ],
)
def test_help_names_what_there_is_to_choose_from(group: type, flag: str, names: tuple[str, ...]):
    help_text = inspect.signature(group, eval_str=True).parameters[flag].annotation.__metadata__[0].help
    assert [name for name in names if name not in help_text] == []


@pytest.mark.parametrize(("device", "place"), [("cuda", "cuda"), ("cuda:1", "cuda"), ("cpu", "cpu")])
def test_a_plan_is_for_a_kind_of_device(device: str, place: str):
    assert Target(device=device).place() == place


@pytest.mark.parametrize("device", ["tpu", "auto", "cuda:", "cuda:x", ""])
def test_a_device_that_nobody_plans_for_is_refused(device: str):
    with pytest.raises(OptionError, match="is none to plan for"):
        Target(device=device).place()


def test_a_card_is_found_by_name():
    assert Target(gpu="RTX 4070").card().vram_gib == 12
