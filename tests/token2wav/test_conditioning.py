"""What is worked out once per utterance, and which weights each half of the work reads."""

import copy

import pytest
import torch
from scarce_memory import PassingBlock
from small_models import conditioning_of, small_dit, some_codes, some_speaker, streamed
from torch import nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniDiTConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavDiTModel

from lowvram.token2wav.conditioning import prepare
from lowvram.token2wav.dit import SystolicDiT, WavefrontDiT
from lowvram.token2wav.ode import solver_stages, time_grid

TIMES = time_grid(5)


def is_read_once(name: str) -> bool:
    """The parameters of `Qwen2_5OmniToken2WavDiTModel` that stepping does not read."""
    return name.startswith(("time_embed.", "input_embed.spk_encoder.", "norm_out.")) or ".attn_norm." in name


def is_read_again(name: str) -> bool:
    return name.startswith(("text_embed.", "input_embed.proj.", "proj_out.")) or any(
        part in name for part in (".attn.", ".ff.")
    )


def bytes_of(dit: nn.Module) -> int:
    return sum(weight.nbytes for name, weight in dit.named_parameters() if is_read_once(name))


def test_every_weight_belongs_to_one_half() -> None:
    for name, _ in small_dit().named_parameters():
        assert is_read_once(name) != is_read_again(name), name


@pytest.mark.parametrize("way", [WavefrontDiT, SystolicDiT])
def test_the_halves_need_never_be_together(way) -> None:
    dit, codes = copy.deepcopy(small_dit()), some_codes(61)
    once, again = PassingBlock(dit, is_read_once), PassingBlock(dit, is_read_again)
    with once:
        conditioning = conditioning_of(dit, TIMES)
    with again:
        mel = streamed(way(dit, conditioning, seed=7), codes, 12)
    assert (once.left_behind, again.left_behind) == (0, 0)
    assert torch.equal(mel, streamed(way(small_dit(), conditioning_of(small_dit(), TIMES), seed=7), codes, 12))


def test_at_the_published_size_4_9_mb_replace_575_mb() -> None:
    with torch.device("meta"):
        dit = Qwen2_5OmniToken2WavDiTModel(Qwen2_5OmniDiTConfig()).eval()
    conditioning = prepare(dit, some_speaker(), solver_stages("euler", time_grid(10)), guidance=0.5)
    assert conditioning.n_bytes == pytest.approx(4.9e6, rel=0.01)
    assert bytes_of(dit) == pytest.approx(575e6, rel=0.01)


@pytest.mark.parametrize(("guidance", "branches"), [(0.0, 1), (9e-6, 1), (1e-5, 2), (0.5, 2)])
def test_guidance_too_small_to_hear_leaves_the_null_branch_out_as_in_the_reference(guidance, branches) -> None:
    assert len(conditioning_of(small_dit(), TIMES, guidance=guidance).speaker_vectors) == branches


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(AssertionError, match="dropout"):
        conditioning_of(copy.deepcopy(small_dit()).train(), TIMES)
