from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_hub import hub as hub  # a fixture
from test_hub import open_in_process

from lowvram.errors import CheckpointError, InfeasibleBudgetError, OptionError, UnsupportedQuantError
from lowvram.offload.budget import GIB, Budget
from lowvram.offload.plan import Turn
from lowvram.options import Limits, SamplingParams
from lowvram.planning import find_headers, plan_without_loading
from lowvram.runtime import OmniRuntime
from lowvram.shapes import ORIGIN
from lowvram.workload import count_turn, read_stand_ins

FIND = """
import json, sys
from lowvram.planning import find_headers
from lowvram.errors import CheckpointError
try:
    found = find_headers(sys.argv[1], sys.argv[2] or None)
    print(json.dumps({"origin": found.origin, "tensors": len(found.tensors), "folder": found.folder is not None}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""

SEVEN_B = "Qwen/Qwen2.5-Omni-7B-AWQ"


def find(home: Path, model: str, revision: str = "", **environment: str) -> dict[str, object]:
    return open_in_process(home, model, revision=revision, script=FIND, **environment)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_is_the_one_that_opening_the_model_gives(demo: Path, dtype: str):
    asked = [{"role": "user", "content": "hello"}]
    with OmniRuntime.open(demo, device="cpu", dtype=dtype) as omni:
        opened = omni.plan(asked, speech=None)
        limits, budget = omni.limits, omni.budget
    turn = count_turn(find_headers(demo), asked, sampling=SamplingParams()).turn
    assert plan_without_loading(demo, turn, budget, limits, device="cpu", dtype=dtype) == opened


def test_auto_is_what_the_checkpoint_is_stored_in(demo: Path):
    turn = Turn(prompt_tokens=100, text_tokens=10)

    def plan(dtype: str) -> object:
        return plan_without_loading(demo, turn, Budget(), Limits(), device="cpu", dtype=dtype)

    assert plan("auto") == plan("float16") != plan("float32")


def test_a_quantization_that_cannot_be_opened_is_not_planned(demo: Path):
    found = find_headers(demo)
    eight_bits = {**found.config, "quantization_config": {"quant_method": "awq", "bits": 8}}
    with pytest.raises(UnsupportedQuantError):
        plan_without_loading(
            replace(found, config=eight_bits), Turn(prompt_tokens=1, text_tokens=1), Budget(), Limits()
        )


def test_an_unknown_dtype_is_refused(demo: Path):
    with pytest.raises(OptionError, match="dtype 'int8' is unknown"):
        plan_without_loading(demo, Turn(prompt_tokens=1, text_tokens=1), Budget(), Limits(), dtype="int8")


def test_a_model_that_is_not_here_is_planned_by_its_shipped_shape(tmp_path: Path):
    found = find(tmp_path, SEVEN_B, HF_HUB_OFFLINE="1")
    assert found == {"origin": ORIGIN, "tensors": 2840, "folder": False}


def test_a_revision_is_not_taken_from_the_shipped_shapes(tmp_path: Path):
    assert "HF_HUB_OFFLINE is set" in find(tmp_path, SEVEN_B, "v2", HF_HUB_OFFLINE="1")["error"]


def test_an_unknown_model_is_read_from_the_hub_until_it_is_in_the_cache(hub, tmp_path):
    first = find(tmp_path, "owner/omni", HF_ENDPOINT=hub.url)
    assert first["origin"] == f"headers read from {hub.url}"
    assert hub.sent_bytes["model.safetensors"] <= 100_001
    open_in_process(tmp_path, "owner/omni", HF_ENDPOINT=hub.url)
    assert find(tmp_path, "owner/omni", HF_HUB_OFFLINE="1") == {
        "origin": "the headers in the hub's cache",
        "tensors": 1,
        "folder": True,
    }


def test_a_cache_that_lost_its_weights_does_not_count(hub, tmp_path):
    open_in_process(tmp_path, "owner/omni", HF_ENDPOINT=hub.url)
    lost = next(tmp_path.rglob("model.safetensors"))
    lost.resolve().unlink()
    lost.unlink(missing_ok=True)
    assert find(tmp_path, "owner/omni", HF_ENDPOINT=hub.url)["origin"] == f"headers read from {hub.url}"


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(CheckpointError, match="there is no folder"):
        find_headers("./nowhere")


def test_a_minute_of_video_on_an_8_gib_card_has_a_plan_and_on_a_1_gib_card_the_way_out(tmp_path: Path):
    headers = find_headers(SEVEN_B)
    turn = count_turn(headers, stand_ins=read_stand_ins(video_s=60)).turn
    plan = plan_without_loading(headers, turn, Budget(8 * GIB), Limits())
    assert plan.peak_bytes <= 8 * GIB
    with pytest.raises(InfeasibleBudgetError, match="mallest budget"):
        plan_without_loading(headers, turn, Budget(GIB), Limits())


def test_planning_loads_no_torch(demo: Path):
    code = f"""
import sys
from lowvram.offload.budget import Budget
from lowvram.options import Limits, SpeechParams
from lowvram.planning import find_headers, plan_without_loading
from lowvram.workload import count_turn, read_stand_ins
headers = find_headers({str(demo)!r})
turn = count_turn(headers, stand_ins=read_stand_ins(video_s=15), speech=SpeechParams()).turn
plan_without_loading(headers, turn, Budget.of("8GiB"), Limits())
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
