"""Downloads from a small hub of our own on this machine, in processes that see only the environment we give them."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

COMMIT = "c0ffee" + "0" * 34
HEADER = json.dumps({"thinker.a": {"dtype": "F16", "shape": [500, 100], "data_offsets": [0, 100_000]}}).encode()
FILES = {
    "config.json": b'{"model_type": "qwen2_5_omni"}',
    "tokenizer.json": b"{}",
    "model.safetensors": len(HEADER).to_bytes(8, "little") + HEADER + bytes(100_000),
    "spk_dict.pt": b"voices",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
    "original/weights.safetensors": b"another layout",
}

OPEN = """
import json, sys
from lowvram.checkpoint import open_checkpoint
from lowvram.errors import CheckpointError
progress = []
try:
    opened = open_checkpoint(sys.argv[1], revision=sys.argv[2] or None, on_progress=lambda *step: progress.append(step))
    files = sorted(str(path.relative_to(opened.folder)) for path in opened.folder.rglob("*"))
    print(json.dumps({"files": files, "progress": progress, "tensors": list(opened.tensors)}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""

GIVE_UP = """
import json, sys
from lowvram.checkpoint import open_checkpoint
from lowvram.errors import LowVRAMError
def give_up(done, total):
    raise LowVRAMError("that is enough")
try:
    open_checkpoint(sys.argv[1], on_progress=give_up)
except LowVRAMError as error:
    print(json.dumps({"error": str(error)}))
"""

DESCRIBE = """
import json, sys
from lowvram.planning import find_description
folder, config = find_description(sys.argv[1])
print(json.dumps({"files": sorted(path.name for path in folder.iterdir()), "config": config}))
"""


PLAN = """
import json, sys
from lowvram.errors import CheckpointError
from lowvram.planning import find_headers
try:
    find_headers(sys.argv[1])
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


@dataclass
class FakeHub:
    """The few answers of a hub that a download asks for, what was asked, and how many bytes of each file were sent."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    asked: list[str] = field(default_factory=list)
    sent_bytes: Counter[str] = field(default_factory=Counter)
    claimed_bytes: int | None = None
    page: bytes | None = None
    status: int = 200

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        self.asked.append(path)
        if self.page is not None or self.status != 200:
            return self.status, {}, self.page or b""
        if "/owner/gated" in path:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if "/owner/omni" not in path:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if path.startswith("/api/models/owner/omni/revision/") and not path.endswith(("/main", COMMIT)):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if path.startswith(f"/api/models/owner/omni/tree/{COMMIT}"):
            return 200, {}, json.dumps([self._listed(*file) for file in self.files.items()]).encode()
        if path.startswith("/api/models/owner/omni"):
            return 200, {}, json.dumps({"id": "owner/omni", "sha": COMMIT, "siblings": []}).encode()
        name = path.rpartition("/resolve/")[2].partition("/")[2]
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        content = self.files[name]
        etag = hashlib.sha1(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(self._size(content))}, content

    def _size(self, content: bytes) -> int:
        return self.claimed_bytes or len(content)

    def _listed(self, path: str, content: bytes) -> dict[str, object]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = fake.answer(self.path)
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and status == 200:
                status, body = 206, body[int(asked[1]) : int(asked[2]) + 1]
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                fake.sent_bytes[self.path.rpartition("/")[2]] += len(body)
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield fake
        server.shutdown()


def open_in_process(
    home: Path, model: str, *, revision: str = "", script: str = OPEN, **environment: str
) -> dict[str, object]:
    """What a fresh process makes of `model`, given to `script`; its standard error must stay empty."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "HOME") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", script, model, revision],
        env={
            **kept,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_a_download_fetches_what_is_needed_reports_it_and_then_serves_offline(hub, tmp_path):
    first = open_in_process(tmp_path, "owner/omni", HF_ENDPOINT=hub.url)
    assert first["files"] == ["config.json", "model.safetensors", "spk_dict.pt", "tokenizer.json"]
    assert first["tensors"] == ["thinker.a"]
    total_bytes = sum(len(FILES[name]) for name in first["files"])
    done = [step[0] for step in first["progress"]]
    assert done == sorted(done)
    assert first["progress"][-1] == [total_bytes, total_bytes]

    again = open_in_process(tmp_path, "owner/omni", HF_HUB_OFFLINE="1")
    assert (again["files"], again["progress"]) == (first["files"], [])


def test_what_tells_of_a_model_is_fetched_without_its_weights(hub, tmp_path):
    told = open_in_process(tmp_path, "owner/omni", script=DESCRIBE, HF_ENDPOINT=hub.url)
    assert told == {"files": ["config.json", "spk_dict.pt", "tokenizer.json"], "config": {"model_type": "qwen2_5_omni"}}
    assert hub.sent_bytes["model.safetensors"] == 0


def test_a_file_that_is_lost_is_all_that_is_fetched_again(hub, tmp_path):
    open_in_process(tmp_path, "owner/omni", HF_ENDPOINT=hub.url)
    lost = next(tmp_path.rglob("model.safetensors"))
    lost.resolve().unlink()
    lost.unlink(missing_ok=True)
    again = open_in_process(tmp_path, "owner/omni", HF_ENDPOINT=hub.url)
    assert again["progress"][-1] == [len(FILES["model.safetensors"])] * 2


def test_a_model_that_the_hub_does_not_have_is_named(hub, tmp_path):
    answer = open_in_process(tmp_path, "owner/typo", HF_ENDPOINT=hub.url)
    assert answer["error"].startswith(f"{hub.url} has no model owner/typo (check the spelling")


def test_a_gated_model_says_where_to_ask(hub, tmp_path):
    answer = open_in_process(tmp_path, "owner/gated", HF_ENDPOINT=hub.url)
    assert answer["error"] == f"owner/gated is gated (accept its terms at {hub.url}/owner/gated and set HF_TOKEN)"


def test_an_unknown_revision_is_named(hub, tmp_path):
    answer = open_in_process(tmp_path, "owner/omni", revision="v9", HF_ENDPOINT=hub.url)
    assert answer["error"] == "owner/omni has no revision v9 (leave it out for the newest)"


def test_a_full_disk_is_noticed_before_anything_is_fetched(hub, tmp_path):
    hub.claimed_bytes = 10**18
    answer = open_in_process(tmp_path, "owner/omni", HF_ENDPOINT=hub.url)
    assert re.match(r"owner/omni needs 4000000000\.0 GB more, but .* has [\d.]+ GB free", answer["error"])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_listener_can_end_a_download_which_goes_on_another_time(hub, tmp_path):
    ended = open_in_process(tmp_path, "owner/omni", script=GIVE_UP, HF_ENDPOINT=hub.url)
    assert ended == {"error": "that is enough"}
    assert open_in_process(tmp_path, "owner/omni", HF_ENDPOINT=hub.url)["tensors"] == ["thinker.a"]


def test_a_download_that_ends_early_is_named(hub, tmp_path):
    hub.claimed_bytes = 10**6
    answer = open_in_process(tmp_path, "owner/omni", HF_ENDPOINT=hub.url)
    assert re.match(r"downloading owner/omni failed: .*\(try again: what has arrived is kept\)", answer["error"])


def test_offline_without_a_copy_says_both(tmp_path):
    answer = open_in_process(tmp_path, "owner/omni", HF_HUB_OFFLINE="1")
    assert re.match(r"owner/omni is not complete in .*, and HF_HUB_OFFLINE is set \(connect once", answer["error"])


def test_a_hub_that_cannot_be_reached_is_named(tmp_path):
    answer = open_in_process(tmp_path, "owner/omni", HF_ENDPOINT="http://127.0.0.1:9")
    reason = r"http://127\.0\.0\.1:9 cannot be reached: .*refused"
    assert re.match(rf"owner/omni is not complete in .*, and {reason}", answer["error"])


@pytest.mark.parametrize("script", [OPEN, PLAN])
def test_a_hub_that_answers_as_a_web_page_does_is_named(hub, tmp_path, script):
    hub.page = b"<html>Please log in.</html>"
    answer = open_in_process(tmp_path, "owner/omni", HF_ENDPOINT=hub.url, script=script)
    assert answer["error"].startswith(f"{hub.url} does not answer as a hub does about owner/omni (a network that wants")


def test_a_hub_that_wants_no_more_requests_is_quoted(hub, tmp_path):
    hub.status = 429
    answer = open_in_process(tmp_path, "owner/omni", HF_ENDPOINT=hub.url)
    assert f"and {hub.url} cannot be reached: 429 Too Many Requests" in answer["error"]


def test_a_name_that_no_hub_takes_is_refused(tmp_path):
    answer = open_in_process(tmp_path, "my model", HF_HUB_OFFLINE="1")
    assert answer["error"].startswith("'my model' is neither a folder nor a hub id such as")
