"""The walls of the house, read from the source: who may import whom, and what must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowvram

PACKAGE = Path(lowvram.__file__).parent
EXAMPLES = Path(__file__).parent.parent / "examples"
MODULES = {
    ".".join(["lowvram", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
STAGES = ("encoders", "thinker", "talker", "token2wav.stream")
SUBPACKAGES = ("offload", "quant", "token2wav")
LIGHT = ("errors", "options", "events", "checkpoint", "offload.budget", "offload.activations", "offload.footprint",
         "offload.plan", "offload.cards", "offload.expect", "shapes", "remote_headers", "planning", "workload",
         "preprocess.frames", "preprocess.counts", "preprocess.messages", "preprocess.chat",
         "preprocess.plain_tokenizer", "quant.scheme", "quantize.options", "token2wav.windows", "token2wav.ode",
         "forecast", "cli")  # fmt: skip
LIBRARY_ROOMS = ("model", "preprocess.prompt", "kv_cache", "attention", "demo.weights")
CUDA_ROOMS = ("offload.transfer", "offload.streams", "offload.meter", "quant.nvrtc", "device", "graphs")


def imports(path: Path, *, top_level: bool) -> set[str]:
    """Absolute dotted names that a file imports, in functions too unless `top_level`; TYPE_CHECKING left out."""
    module = ".".join(["lowvram", *path.relative_to(PACKAGE).with_suffix("").parts])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found.update([origin, *(f"{origin}.{alias.name}" for alias in node.names)])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def reaches(found: set[str], target: str) -> bool:
    return any(name == target or name.startswith(f"{target}.") for name in found)


@pytest.mark.parametrize("stage", STAGES)
def test_stages_never_import_stages(stage: str):
    found = imports(MODULES[f"lowvram.{stage}"], top_level=False)
    assert not [other for other in STAGES if other != stage and reaches(found, f"lowvram.{other}")]


@pytest.mark.parametrize("package", SUBPACKAGES)
def test_subpackages_never_import_one_another(package: str):
    for module, path in MODULES.items():
        if reaches({module}, f"lowvram.{package}"):
            found = imports(path, top_level=False)
            assert not [o for o in SUBPACKAGES if o != package and reaches(found, f"lowvram.{o}")], module


def test_the_modelling_library_is_imported_in_few_rooms():
    users = {
        m.removeprefix("lowvram.") for m, p in MODULES.items() if reaches(imports(p, top_level=False), "transformers")
    }
    assert users <= {*LIBRARY_ROOMS, "opening"}


def test_cuda_is_named_in_few_rooms():
    users = {m.removeprefix("lowvram.") for m, p in MODULES.items() if "torch.cuda" in p.read_text(encoding="utf-8")}
    assert users <= {*CUDA_ROOMS, "cli"}


def test_terminals_are_the_command_lines_business():
    for library, rooms in (
        ("typer", {"lowvram.cli", "lowvram.flags", "lowvram.flag_groups"}),
        ("rich", {"lowvram.terminal"}),
    ):
        assert {m for m, p in MODULES.items() if reaches(imports(p, top_level=False), library)} <= rooms


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_neither_torch_nor_transformers(module: str):
    heavy = "{'torch', 'transformers', 'huggingface_hub'}"
    code = f"import sys, lowvram.{module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_imports_have_no_cycles():
    edges = {m: {n for n in imports(p, top_level=True) if n in MODULES and n != m} for m, p in MODULES.items()}

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        for target in edges[module]:
            walk(target, (*path, module))

    for module in edges:
        walk(module, ())


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_use_public_names_alone(example: Path):
    nodes = list(ast.walk(ast.parse(example.read_text(encoding="utf-8"))))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = {
        f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    ours = {name for name in modules | named if reaches({name}, "lowvram")}
    assert ours <= {f"lowvram.{name}" for name in lowvram.__all__}
