"""Voices of a checkpoint: loaded without running code, and named where they are not of their shape."""

from __future__ import annotations

import pytest
import torch

from lowvram.errors import CheckpointError
from lowvram.voices import load_speakers


def voice(**changes: object) -> dict[str, object]:
    return {"bos_token": 5, "cond": torch.zeros(1, 192), "ref_mel": torch.zeros(1, 30, 80), **changes}


def test_voices_load(tmp_path):
    torch.save({"Chelsie": voice()}, tmp_path / "spk_dict.pt")
    voices = load_speakers(tmp_path / "spk_dict.pt")
    assert voices["Chelsie"]["bos_token"] == 5
    assert voices["Chelsie"]["ref_mel"].shape == (1, 30, 80)


@pytest.mark.parametrize(
    ("voices", "fault"),
    [
        ({}, "holds no voices"),
        ([voice()], "holds no voices"),
        ({"A": 1}, "voice A without"),
        ({"A": {"cond": torch.zeros(1, 1)}}, "voice A without"),
        ({"A": voice(bos_token="x")}, "bos_token"),
        ({"A": voice(cond=torch.zeros(192))}, "cond is not one finite float tensor of 2 dimensions"),
        ({"A": voice(cond=torch.full((1, 192), torch.nan))}, "cond"),
        ({"A": voice(ref_mel=torch.zeros(1, 0, 80))}, "ref_mel"),
        ({"A": voice(ref_mel=torch.zeros(2, 30, 80))}, "ref_mel"),
        ({"A": voice(ref_mel=torch.zeros(1, 30, 80, dtype=torch.int32))}, "ref_mel"),
        ({"A": voice(ref_mel=[1.0])}, "ref_mel"),
    ],
)
def test_a_voice_of_another_shape_is_named(tmp_path, voices, fault):
    torch.save(voices, tmp_path / "spk_dict.pt")
    with pytest.raises(CheckpointError, match=rf"spk_dict\.pt .*{fault}"):
        load_speakers(tmp_path / "spk_dict.pt")


def test_missing_voices_say_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"spk_dict\.pt is missing, so this checkpoint has no voices"):
        load_speakers(tmp_path / "spk_dict.pt")


class Trap:
    def __reduce__(self):
        return print, ("code from a checkpoint has run",)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "code"])
def test_a_damaged_or_hostile_voices_file_is_refused(tmp_path, damage, capsys):
    path = tmp_path / "spk_dict.pt"
    torch.save({"A": Trap()} if damage == "code" else {"A": voice()}, path)
    if damage != "code":
        path.write_bytes({"empty": b"", "text": b"not found", "cut": path.read_bytes()[:700]}[damage])
    with pytest.raises(CheckpointError, match="does not hold voices that can be loaded safely"):
        load_speakers(path)
    assert capsys.readouterr().out == ""
