from __future__ import annotations

import inspect

import pytest

from lowvram.device import DTYPES
from lowvram.errors import OptionError
from lowvram.flags import Draw, Machine, Memory, Question, Sight, Target
from lowvram.offload.budget import Budget
from lowvram.options import MODES, Limits, MediaParams, SamplingParams
from lowvram.quant.matmul import BACKENDS, BORROWED, BY_NAME
from lowvram.speech_flags import Sound


def test_nothing_typed_means_the_defaults_of_the_options():
    assert Question().sampling(Draw()) == SamplingParams() == Question().sampling()
    assert Sight().params() == MediaParams()
    assert (Memory().limits(), Memory().budget(), Target().card()) == (Limits(), Budget(), None)


def test_a_question_and_a_draw_make_one_way_to_answer():
    drawn = Question(max_tokens=7).sampling(Draw(temperature=0.5, top_k=3, top_p=0.9, seed=4))
    assert drawn == SamplingParams(max_tokens=7, temperature=0.5, top_k=3, top_p=0.9, seed=4)


def test_a_cut_is_in_seconds_or_as_players_show_it():
    seen = Sight(start="30", end="1:30").params()
    assert (seen.start_s, seen.end_s) == (30, 90)


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
