"""What is worked out once per utterance, and which weights each half of the work reads."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from scarce_memory import NoRoom, PassingBlock
from small_models import conditioning_of, small_dit, some_codes, some_speaker, streamed
from torch import nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniDiTConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavDiTModel

from lowvram.errors import CheckpointError
from lowvram.options import SpeechParams
from lowvram.token2wav.conditioning import KEPT_BYTES, Conditioning, Conditionings, Setting, Speaker, condition, prepare
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


def test_a_conditioning_waits_on_the_host_and_no_weight_with_it() -> None:
    block = PassingBlock(copy.deepcopy(small_dit()), is_read_once)
    made = condition(block, some_speaker(), SpeechParams(steps=5))
    assert (block.uses, block.left_behind) == (1, 0)
    assert torch.equal(made.modulations, conditioning_of(small_dit(), TIMES).modulations)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_an_applications_default_dtype_cuts_no_frame_off_a_voice(
    default_dtype: Callable[[torch.dtype], None], dtype: torch.dtype
) -> None:
    """In bfloat16 301 is 300."""
    speaker = replace(some_speaker(), ref_mel=torch.randn(1, 301, 80, generator=torch.Generator().manual_seed(0)))
    expected = conditioning_of(small_dit(), TIMES, speaker=speaker).speaker_vectors
    default_dtype(dtype)
    assert torch.equal(conditioning_of(small_dit(), TIMES, speaker=speaker).speaker_vectors, expected)


def test_conditioning_that_ran_out_of_memory_is_tried_again() -> None:
    def again(step, undo=lambda: None):
        with pytest.raises(torch.OutOfMemoryError), NoRoom(40):
            step()
        return step()

    made = condition(nullcontext(small_dit()), some_speaker(), SpeechParams(steps=5), attempt=again)
    assert torch.equal(made.out_modulations, conditioning_of(small_dit(), TIMES).out_modulations)


@pytest.mark.parametrize(
    ("cond", "ref_mel"), [((1, 16), (1, 30, 80)), ((192,), (1, 30, 80)), ((1, 192), (1, 30, 128)), ((1, 192), (30, 80))]
)
def test_a_voice_of_another_model_is_refused(cond, ref_mel) -> None:
    speaker = Speaker(torch.zeros(cond), torch.zeros(ref_mel))
    with pytest.raises(CheckpointError, match=r"\[1, 192\] and \[1, T, 80\]"):
        condition(nullcontext(small_dit()), speaker, SpeechParams())


@pytest.mark.parametrize("change", [{"steps": 5}, {"solver": "ab2"}, {"guidance": 0.0}])
def test_another_solver_is_another_setting(change) -> None:
    assert Setting.of("Chelsie", SpeechParams(**change)) != Setting.of("Chelsie", SpeechParams())


def test_mode_and_precision_seed_and_chunk_share_a_setting() -> None:
    other = SpeechParams(mode="offload", dtype="float16", seed=3, chunk_s=0.24)
    assert Setting.of("Chelsie", other) == Setting.of("Chelsie", SpeechParams())


def of_bytes(n_bytes: int) -> Conditioning:
    """A conditioning of that size; nobody will hear it."""
    nothing = torch.empty(0, device="meta")
    return Conditioning((), 0.5, nothing, nothing, torch.empty(n_bytes, dtype=torch.uint8, device="meta"), nothing)


VOICES = [Setting.of(str(voice), SpeechParams()) for voice in range(4)]


def test_the_oldest_conditioning_makes_room_for_a_new_one() -> None:
    kept = Conditionings()
    for setting in VOICES:
        kept.keep(setting, of_bytes(KEPT_BYTES // 3))
    assert [setting in kept for setting in VOICES] == [False, True, True, True]
    assert kept.n_bytes <= KEPT_BYTES


def test_a_conditioning_too_large_to_keep_serves_its_turn_and_goes_with_it() -> None:
    kept = Conditionings()
    kept.keep(VOICES[0], of_bytes(100))
    kept.keep(VOICES[1], of_bytes(KEPT_BYTES + 1))
    assert (VOICES[0] in kept, VOICES[1] in kept) == (False, True)
    kept.settle()
    assert kept.n_bytes == 0


def test_what_is_small_enough_stays_when_its_turn_is_over() -> None:
    kept = Conditionings()
    kept.keep(VOICES[0], of_bytes(KEPT_BYTES))
    kept.settle()
    assert VOICES[0] in kept


def test_all_of_a_conditioning_moves_to_another_device() -> None:
    moved = conditioning_of(small_dit(), TIMES).to(torch.device("meta"))
    tensors = [part for part in vars(moved).values() if isinstance(part, torch.Tensor)]
    assert len(tensors) == 4 and all(tensor.is_meta for tensor in tensors)
