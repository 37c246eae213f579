from __future__ import annotations

import pytest

from lowvram.errors import BudgetError, BudgetExceededError, LowVRAMError, OptionError
from lowvram.exit_codes import exit_codes, told_and_forgotten
from lowvram.offload.budget import GIB
from lowvram.offload.profile import DEVICE_ALLOCATOR, PLANNED, MemoryProfile


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OptionError("x"), 2),
        (BudgetError("x"), 4),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
    ],
)
def test_an_error_ends_the_program_with_its_own_code(error: BaseException, code: int):
    with pytest.raises(SystemExit) as end, exit_codes():
        raise error
    assert end.value.code == code


def test_what_is_wrong_is_one_sentence_and_where_it_came_from_only_if_asked(capsys: pytest.CaptureFixture[str]):
    for verbose in (False, True):
        with pytest.raises(SystemExit), exit_codes(verbose):
            raise OptionError("fps is 0", hint="give more")
    brief, _, long = capsys.readouterr().err.partition("\n")
    assert brief == "error: fps is 0 (give more)"
    assert long.startswith("Traceback") and long.endswith(f"\n{brief}\n")


def test_a_device_that_ran_out_is_told_with_what_each_phase_held(capsys: pytest.CaptureFixture[str]):
    profile = MemoryProfile({PLANNED: {"think": 5 * GIB}, DEVICE_ALLOCATOR: {"think": 6 * GIB}})
    with pytest.raises(SystemExit), exit_codes():
        raise BudgetExceededError("the device ran out", profile=profile)
    head, row, sentence = capsys.readouterr().err.splitlines()
    assert head.split("  ")[0] == "phase" and row.split() == ["think", "5.00", "GiB", "6.00", "GiB"]
    assert sentence == "error: the device ran out"


def test_a_mistake_of_ours_is_not_made_to_look_like_the_users():
    with pytest.raises(AssertionError), exit_codes():
        raise AssertionError("broken arithmetic")


def test_a_turn_that_fails_is_told_and_the_program_goes_on(capsys: pytest.CaptureFixture[str]):
    with told_and_forgotten():
        raise LowVRAMError("no space")
    assert capsys.readouterr().err == "error: no space\n"
