from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import lowvram

PUBLIC = [
    "AudioChunk",
    "Budget",
    "Finished",
    "Limits",
    "LowVRAMError",
    "MediaParams",
    "OmniRuntime",
    "Plan",
    "Progress",
    "SamplingParams",
    "SpeechParams",
    "TextDelta",
    "__version__",
    "plan_memory",
]


def test_the_public_names_are_these():
    assert lowvram.__all__ == PUBLIC
    assert dir(lowvram) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there(name: str):
    assert getattr(lowvram, name).__doc__


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Qwen'"):
        _ = lowvram.Qwen


def test_the_version_is_the_projects():
    assert lowvram.__version__ == importlib.metadata.version("lowvram")


def test_importing_the_package_loads_no_dependency():
    code = "import sys; before = set(sys.modules); import lowvram; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names
    assert foreign == {"lowvram"}
