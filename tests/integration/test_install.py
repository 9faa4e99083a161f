"""The package as a wheel, installed outside the checkout: each command's own example works there as it is typed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.launching import BIN, QUIET, ROOT, Outcome, python, run
from PIL import Image, ImageDraw

import digitdist
from digitdist.__main__ import COMMANDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, made from a copy of the files that git knows."""
    place = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, files):
        (place / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / "source" / name, follow_symlinks=False)
    made = run([str(BIN / "pip"), "wheel", "-q", "--no-deps", "-w", str(place), "./source"], cwd=place, env=None, timeout=200)
    assert made.code == 0, made.err
    (wheel,) = place.glob("*.whl")
    assert wheel.name.startswith(f"digitdist-{digitdist.__version__}-")
    pip = ["install", "-q", "--no-deps", "--target", str(place / "site"), str(wheel)]
    assert run([str(BIN / "pip"), *pip], cwd=place, env=None, timeout=100).code == 0
    return place / "site"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """A folder with what the examples name: pictures, and soon the runs `quick` and `other`."""
    place = tmp_path_factory.mktemp("place")
    (place / "data").symlink_to(mnist_root)
    (place / "photos").mkdir()
    for file in (place / "digit.png", place / "photos/one.png"):
        picture = Image.new("L", (100, 100), 255)
        ImageDraw.Draw(picture).line([(50, 15), (50, 85)], fill=0, width=8)
        picture.save(file)
    return place


def installed(site: Path, place: Path, *command: str) -> Outcome:
    """A command line with the installed package and its scripts."""
    env = {"PYTHONPATH": str(site), "PATH": f"{site}/bin:{BIN}:{os.environ['PATH']}"}
    return run(list(command), cwd=place, env=env, timeout=250)


def example(site: Path, place: Path, name: str) -> list[str]:
    shown = installed(site, place, "digitdist", name, "--help")
    assert shown.code == 0, shown.err
    return re.search(r"^example: (.*)$", shown.out, re.MULTILINE)[1].split()


def test_the_installed_package_is_the_one_that_runs(site: Path, place: Path):
    done = installed(site, place, "python", "-c", "import digitdist; print(digitdist.__file__)")
    assert done.out.startswith(str(site))


def test_every_example_of_the_help_works(site: Path, place: Path):
    """In the order in which a person would type them. `test_bench` runs that of bench, which takes minutes,
    `test_demo` that of demo, which ends when it is told to."""
    extra = {"train": [*QUIET, "train.max_steps=60"]}
    for name in ("train", *(name for name in COMMANDS if name != "train")):
        command = example(site, place, name)
        assert command[:2] in (["accelerate", "launch"], ["python", "-m"])
        if name in ("bench", "demo"):
            continue
        done = installed(site, place, *command, *extra.get(name, []))
        assert done.code == 0, (name, done.err)
        assert done.out, name
        if name == "train":
            shutil.copytree(place / "runs/quick", place / "runs/other")


def test_one_entry_point_has_every_command(site: Path, place: Path):
    shown = installed(site, place, "digitdist", "--help")
    assert shown.code == 0
    assert all(re.search(rf"^  {name} ", shown.out, re.MULTILINE) for name in COMMANDS)
    unknown = installed(site, place, "digitdist", "fly")
    assert (unknown.code, unknown.errors) == (2, [f"error: there is no command 'fly'; there are {', '.join(COMMANDS)}"])


def test_the_shipped_configurations_are_found_by_name(site: Path, place: Path):
    done = installed(site, place, "digitdist", "train", "--config", "quack")
    assert done.code == 2
    assert "or one of best, default, fast, quick, sharp" in done.errors[0]


def test_the_fingerprint_of_the_code_covers_subpackages(tmp_path: Path):
    shutil.copytree(Path(digitdist.__file__).parent, tmp_path / "digitdist", symlinks=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    code = "from digitdist.train.setup import code_sha256; print(code_sha256())"

    def fingerprint() -> str:
        return python("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}).out

    before = fingerprint()
    with (tmp_path / "digitdist/sync/tree.py").open("a") as file:
        file.write("# edited\n")
    assert len({before, fingerprint()}) == 2
