"""The tests of GPUs where there is none: they are collected, rehearsed on simulated ones, and hidden from all others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import simulated_device
from helpers.claims import Tried, table
from helpers.launching import ROOT, Outcome, python

README = ROOT / "tests/gpu/README.md"
LINE = re.compile(r"(holds|fails|not tried) +(.+)")
SEES = """
import json, os, sys, pytest
from pathlib import Path
from helpers import on_device
from helpers.launching import HIDING, run

@pytest.mark.parametrize("marker", ["none", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_it(marker):
    here = Path(__file__).parent
    plain = run([sys.executable, "-m", "says"], here, {}, 50)
    launched = {"a launch": plain, "a launch on GPUs": on_device.launch("says", cwd=here)}
    seen = {name: json.loads(done.out) for name, done in launched.items()}
    seen["the tests"] = [os.environ.get(variable) for variable in HIDING]
    (here / f"{marker}.json").write_text(json.dumps(seen))
"""
SAYS = "import json, os; from helpers.launching import HIDING; print(json.dumps([os.environ.get(name) for name in HIDING]))"


def run_suite(device: str, timeout: float) -> Outcome:
    arguments = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu")
    return python(*arguments, cwd=ROOT, env={"DIGITDIST_TEST_DEVICE": device}, timeout=timeout)


def claims(done: Outcome) -> dict[str, str]:
    """The outcome of each claim, in the table that ends a run."""
    return {found[2]: found[1] for line in done.out.splitlines() if (found := LINE.fullmatch(line))}


def documented() -> dict[str, str]:
    """The claims of the README, and what a dry run says of each."""
    rows = [line.strip("| ").split(" | ") for line in README.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: row[2] for row in rows if row[1] in ("1", "2")}


@pytest.mark.slow
def test_without_a_gpu_nothing_is_tried_and_the_table_says_why():
    done = run_suite("", timeout=100)
    assert done.code == 0, done.out
    assert claims(done) == dict.fromkeys(documented(), "not tried")
    assert done.out.count("(no GPU is here)") == len(documented())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(simulated_device.unsupported()), reason=simulated_device.unsupported())
def test_a_dry_run_holds_what_the_readme_says():
    done = run_suite("simulated", timeout=800)
    assert done.code == 0, done.out
    assert "a dry run on 2 simulated GPUs" in done.out
    assert claims(done) == documented()
    assert set(documented().values()) == {"holds", "not tried"}


@pytest.mark.slow
@pytest.mark.parametrize("marker", ["none", "gpu"])
def test_only_a_run_that_asks_for_the_tests_of_gpus_sees_one(tmp_path: Path, marker: str):
    (tmp_path / "test_sees.py").write_text(SEES)
    (tmp_path / "says.py").write_text(SAYS)
    shown = {"CUDA_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "0,1", "ZE_AFFINITY_MASK": "0,1"}
    settings = ("-c", str(ROOT / "pyproject.toml"), "-p", "conftest", "-p", "no:cacheprovider")
    selected = () if marker == "none" else ("-m", marker)
    env = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"} | shown
    done = python("-m", "pytest", *settings, *selected, str(tmp_path), cwd=tmp_path, env=env)
    assert done.code == 0, done.out
    (file,) = tmp_path.glob("*.json")
    seen = json.loads(file.read_text())
    hidden, visible = ["", "", "999"], list(shown.values())
    assert file.stem == marker
    assert seen["the tests"] == (visible if marker == "gpu" else hidden)
    assert seen["a launch"] == hidden
    assert seen["a launch on GPUs"] == visible


def test_a_claim_holds_only_if_no_test_of_it_fails():
    tests = [
        Tried("first", "a", "holds", numbers=["0.97"]),
        Tried("first", "b", "not tried", "needs 2 GPUs"),
        Tried("second", "c", "holds"),
        Tried("second", "d", "fails"),
        Tried("third", "e", "not tried", "needs 2 GPUs"),
        Tried("third", "f", "not tried", "needs CUDA"),
    ]
    assert table(tests) == [
        "holds      first",
        "           (in 1 of 2 tests; not tried: needs 2 GPUs)",
        "           0.97",
        "fails      second",
        "           (d)",
        "not tried  third",
        "           (needs 2 GPUs; needs CUDA)",
        "",
        "3 claims: 1 hold, 1 fail, 1 were not tried",
    ]
