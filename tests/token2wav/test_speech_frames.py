"""Codes to the frames a solver starts from: noise, positions, and codes that the DiT does not know."""

import copy

import pytest
import torch
from small_models import conditioning_of, noise_of, relative, small_dit, some_codes, streamed, whole_decode

from lowvram.token2wav.carry import Carry
from lowvram.token2wav.dit import WavefrontDiT
from lowvram.token2wav.frames import NULL_CODE, Noise, Rotary
from lowvram.token2wav.ode import time_grid

TIMES = time_grid(5)


def decoded(codes, dit=None, size=None):
    dit = dit or small_dit()
    return streamed(WavefrontDiT(dit, conditioning_of(dit, TIMES), seed=7), codes, size)


@pytest.mark.parametrize("size", [1, 13, 61, None])
def test_the_noise_is_torchs_whatever_the_arrivals(size) -> None:
    dit = copy.deepcopy(small_dit(torch.float32))
    torch.nn.init.zeros_(dit.proj_out.weight)
    torch.nn.init.zeros_(dit.proj_out.bias)
    assert torch.equal(decoded(some_codes(61), dit, size).mT, noise_of(7, 122))


def test_noise_that_is_taken_back_is_drawn_again() -> None:
    carry = Carry()
    noise, rows = Noise(7, 80, carry), torch.empty(1, 24, 1)
    noise.draw(rows)
    snapshot = carry.snapshot()
    drawn = noise.draw(rows)
    carry.restore(snapshot)
    assert torch.equal(noise.draw(rows), drawn)


@pytest.mark.parametrize("stranger", [-1, 8194, 8296])
def test_a_code_outside_the_table_keeps_its_place_and_is_reported(stranger, caplog) -> None:
    codes = some_codes(30)
    codes[17] = stranger
    mel = decoded(codes)
    codes[17] = NULL_CODE
    assert torch.equal(mel, decoded(codes))
    assert f"codec id {stranger} is outside the table of 8194" in caplog.text


def test_the_last_row_of_the_table_is_a_code_like_others() -> None:
    codes = [*some_codes(13), 8193]
    assert relative(decoded(codes), whole_decode(small_dit(), codes, TIMES)) <= 1e-12


def test_the_rotary_phase_is_still_right_after_an_hour() -> None:
    dit, hour = small_dit(torch.float32), 360_000
    rotary = Rotary(dit, Carry())
    rotary.draw(torch.empty(1, hour, 0))
    cos = rotary.draw(torch.empty(1, 24, 0))[:, : dit.rotary_embed.inv_freq.numel()]
    angle = torch.arange(hour, hour + 24, dtype=torch.float64)[:, None] * dit.rotary_embed.inv_freq.double()
    assert (cos - angle.cos()).abs().max() < 1e-6
