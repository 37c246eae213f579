"""Headers without weights, from the small hub of `test_hub`, in processes that see only the environment given here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_hub import COMMIT, FILES, FakeHub, open_in_process
from test_hub import hub as hub  # a fixture

FETCH = """
import json, sys
from lowvram.remote_headers import cached_folder, fetch_headers, is_complete
from lowvram.errors import CheckpointError
model, revision = sys.argv[1], sys.argv[2] or None
try:
    headers = fetch_headers(model, revision)
    folder = cached_folder(model, revision)
    print(json.dumps({
        "tensors": {name: [tensor.dtype, *tensor.shape] for name, tensor in headers.tensors.items()},
        "config": headers.config,
        "origin": headers.origin,
        "files": sorted(path.name for path in folder.iterdir()),
        "complete": is_complete(folder),
        "torch": "torch" in sys.modules,
    }))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


def fetch(home: Path, model: str = "owner/omni", revision: str = "", **environment: str) -> dict[str, object]:
    return open_in_process(home, model, revision=revision, script=FETCH, **environment)


def weights(name: str, shape: list[int], padding: int = 0, dtype: str = "F16") -> bytes:
    """A safetensors file of one tensor of zeros, its header `padding` bytes longer than it need be."""
    n_bytes = 2 * shape[0] * shape[1]
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, n_bytes]}}).encode()
    header += b" " * padding
    return len(header).to_bytes(8, "little") + header + bytes(n_bytes)


@pytest.fixture
def shards(hub: FakeHub) -> FakeHub:
    """The hub with a model in two files of 1 MB, the second with a header that the first request cannot hold."""
    del hub.files["model.safetensors"]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    hub.files[first] = weights("thinker.a", [500, 1000])
    hub.files[second] = weights("thinker.b", [1000, 500], padding=150_000)
    index = {"weight_map": {"thinker.a": first, "thinker.b": second}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    return hub


def test_headers_of_a_model_in_one_file_are_read_without_its_weights(hub, tmp_path):
    hub.files["model.safetensors"] = weights("thinker.a", [500, 4000])
    fetched = fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert fetched["tensors"] == {"thinker.a": ["F16", 500, 4000]}
    assert fetched["config"] == json.loads(FILES["config.json"])
    assert fetched["origin"] == f"headers read from {hub.url}"
    assert hub.sent_bytes["model.safetensors"] <= 100_001


def test_headers_of_all_shards_are_read_however_long_they_are(shards, tmp_path):
    fetched = fetch(tmp_path, HF_ENDPOINT=shards.url)
    assert fetched["tensors"] == {"thinker.a": ["F16", 500, 1000], "thinker.b": ["F16", 1000, 500]}
    assert sum(sent for name, sent in shards.sent_bytes.items() if name.startswith("model-")) < 400_000


def test_nothing_but_config_and_index_is_downloaded_and_torch_stays_away(shards, tmp_path):
    fetched = fetch(tmp_path, HF_ENDPOINT=shards.url)
    assert fetched["files"] == ["config.json", "model.safetensors.index.json"]
    assert (fetched["complete"], fetched["torch"]) == (False, False)


def test_all_is_read_of_the_state_that_the_config_is_of(shards, tmp_path):
    fetch(tmp_path, HF_ENDPOINT=shards.url)
    read = [path for path in shards.asked if "model-0000" in path]
    assert read and all(f"/resolve/{COMMIT}/" in path for path in read)


def test_a_model_that_the_hub_does_not_have_is_named(hub, tmp_path):
    answer = fetch(tmp_path, "owner/typo", HF_ENDPOINT=hub.url)
    assert answer["error"].startswith(f"{hub.url} has no model owner/typo (check the spelling")


def test_a_gated_model_says_where_to_ask(hub, tmp_path):
    answer = fetch(tmp_path, "owner/gated", HF_ENDPOINT=hub.url)
    assert answer["error"] == f"owner/gated is gated (accept its terms at {hub.url}/owner/gated and set HF_TOKEN)"


def test_a_model_without_safetensors_is_not_a_whole_checkpoint(hub, tmp_path):
    del hub.files["model.safetensors"]
    answer = fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert answer["error"] == (
        f"owner/omni is not a whole checkpoint: {hub.url} lacks one of its 1 weights files (it needs model.safetensors)"
    )


def test_a_repository_without_a_config_is_named(shards, tmp_path):
    del shards.files["config.json"]
    answer = fetch(tmp_path, HF_ENDPOINT=shards.url)
    assert re.match(r".*config\.json is missing", answer["error"])


def test_another_kind_of_model_is_refused(hub, tmp_path):
    hub.files["config.json"] = b'{"model_type": "qwen2_vl"}'
    answer = fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert answer["error"].startswith("owner/omni is a model of type 'qwen2_vl', not 'qwen2_5_omni'")
    assert not hub.sent_bytes["model.safetensors"]


def test_a_file_that_is_no_safetensors_is_named(hub, tmp_path):
    hub.files["model.safetensors"] = b"<html>" * 100
    answer = fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert answer["error"].startswith("model.safetensors of owner/omni does not begin with a safetensors header")


def test_a_type_that_this_build_does_not_know_is_named(hub, tmp_path):
    hub.files["model.safetensors"] = weights("thinker.a", [1, 8], dtype="F4")
    answer = fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert answer["error"].startswith("model.safetensors of owner/omni stores tensor thinker.a as F4, a type")


def test_offline_says_so(tmp_path):
    answer = fetch(tmp_path, HF_HUB_OFFLINE="1")
    assert re.match(r"owner/omni is not complete in .*, and HF_HUB_OFFLINE is set \(connect once", answer["error"])


def test_a_hub_that_cannot_be_reached_is_named(tmp_path):
    answer = fetch(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert re.match(r"owner/omni is not complete in .*, and http://127\.0\.0\.1:9 cannot be reached", answer["error"])


def test_a_name_that_no_hub_takes_is_refused(tmp_path):
    answer = fetch(tmp_path, "my model", HF_HUB_OFFLINE="1")
    assert answer["error"].startswith("'my model' is neither a folder nor a hub id such as")
