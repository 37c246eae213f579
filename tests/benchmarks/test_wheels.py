from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import wheels

ROOT = Path(__file__).parents[2]


def test_all_that_the_package_depends_on_is_looked_for():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert dependencies
    assert set(re.findall(r'"([\w-]+)', dependencies[1])) | {"pytest", "tokenizers"} == set(wheels.NEEDED.values())


def test_here_nothing_that_is_needed_is_missing():
    assert wheels.missing()["needed"] == []


def test_a_python_without_any_of_them_names_them_all():
    bare = subprocess.run([sys.executable, "-IS", wheels.__file__], capture_output=True, text=True)
    assert bare.returncode == 1
    assert bare.stderr.splitlines()[0] == f"needed, and not here: {', '.join(wheels.NEEDED.values())}"
