"""The house: files import only from those above them, and what is slow to import is imported only where it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import digitdist

FILES = [
    *("config", "models", "checkpoint", "tracking", "runtime", "data", "optim", "sync", "evaluate", "train"),
    *("report", "predict", "export", "bench"),
]
PACKAGE = Path(digitdist.__file__).parent
SOURCES = sorted(PACKAGE.glob("*.py"))


def imported(source: Path) -> set[str]:
    """The files of the package that `source` imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "digitdist":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("digitdist."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("digitdist.")}
    return names


def test_the_house_has_no_other_files():
    assert {source.stem for source in SOURCES} - {"__init__"} <= set(FILES)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_file_imports_only_from_those_above_it(source: Path):
    above = [] if source.stem == "__init__" else FILES[: FILES.index(source.stem)]
    assert imported(source) <= set(above)


def test_the_walk_over_imports_sees_every_form(tmp_path: Path):
    source = tmp_path / "x.py"
    source.write_text(
        "import digitdist.sync\nfrom digitdist import data, models as m\ndef f():\n  from digitdist.config import load"
    )
    assert imported(source) == {"sync", "data", "models", "config"}


def test_slow_imports_wait_until_they_are_used():
    code = "import sys; import digitdist.train, digitdist.report; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torchvision", "wandb", "matplotlib", "torch._dynamo"} & set(modules)
