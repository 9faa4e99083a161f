"""The house: rooms and files import one way, files and functions are short, and what is slow to import waits."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import digitdist

ROOMS = [  # a room may import only from those above it
    "process_start",
    *("errors", "files", "world", "config", "checkpoint", "model_state", "distributed", "data", "models", "optim"),
    *(
        "model_parts",
        "model_checks",
        "runs",
        "sync",
        "evaluate",
        "predict",
        "loading",
        "export",
        "train",
        "report",
        "bench",
        "__main__",
    ),
]
PACKAGE = Path(digitdist.__file__).parent
SOURCES = {
    ".".join(("digitdist", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 50


def imported(name: str, file: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it, other than for type annotations."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "digitdist":
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in SOURCES}
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "digitdist"}
    return found - {"digitdist", name}


def room(module: str) -> str:
    return module.split(".")[1]


def test_the_house_has_no_other_rooms():
    assert {room(module) for module in SOURCES if module != "digitdist"} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(SOURCES.keys() - {"digitdist"}))
def test_a_room_imports_only_from_the_doors_of_rooms_above_it(module: str):
    for other in imported(module, SOURCES[module]):
        if room(other) != room(module):
            assert ROOMS.index(room(other)) < ROOMS.index(room(module)), f"{module} imports {other}"
            assert other == f"digitdist.{room(other)}", f"{module} imports {other} past the door of its room"


def test_inside_a_room_files_import_one_way():
    edges = {module: {o for o in imported(module, file) if o in SOURCES} for module, file in SOURCES.items()}
    for module, others in edges.items():
        inner = {other for other in others if module != "digitdist" and room(other) == room(module)}
        assert f"digitdist.{room(module)}" not in inner if module.count(".") > 1 else True, f"{module} imports its own door"
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module not in finished:
            for other in edges[module]:
                visit(other, (*path, module))
            finished.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("module", SOURCES)
def test_files_and_functions_are_short(module: str):
    text = SOURCES[module].read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{module}.{node.name}"


@pytest.mark.parametrize("module", [module for module, file in SOURCES.items() if file.name != "__main__.py"])
def test_every_module_and_every_public_name_says_what_it_is(module: str):
    tree = ast.parse(SOURCES[module].read_text())
    assert ast.get_docstring(tree), module
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    short = {n.name for n in functions if isinstance(n, ast.FunctionDef) and n.end_lineno and n.end_lineno - n.lineno < 4}
    assert not [n.name for n in functions if not ast.get_docstring(n) and n.name not in short]


@pytest.mark.parametrize("name", [name for name in ROOMS if (PACKAGE / name).is_dir()])
def test_each_package_says_at_its_door_what_may_be_touched(name: str):
    doc = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text())) or ""
    assert 2 <= len([line for line in doc.splitlines() if line]) <= 3


def test_the_walk_over_imports_sees_every_form(tmp_path: Path):
    file = tmp_path / "x.py"
    file.write_text(
        "import digitdist.sync\nfrom digitdist import models as m\ndef f():\n  from digitdist.data.order import Order"
    )
    assert imported("digitdist.x", file) == {"digitdist.sync", "digitdist.models", "digitdist.data.order"}


def test_slow_imports_wait_until_they_are_used():
    code = "import sys; import digitdist.train, digitdist.report; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torchvision", "wandb", "matplotlib", "torch._dynamo", "torch.distributed.tensor"} & set(modules)
