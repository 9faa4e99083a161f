"""Pictures predicted by several runs: the mean of what each gives."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.stored_runs import MNIST, made
from PIL import Image

from digitdist.data import DATA_SETS, Splits
from digitdist.errors import UserError
from digitdist.predict.__main__ import main


@pytest.fixture
def place(tmp_path: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with three runs and some pictures."""
    monkeypatch.chdir(tmp_path)
    made(Path("runs/a"), "seed=1")
    made(Path("runs/b"), "seed=2", "model.name=convnet", precision="bf16")
    made(Path("runs/s/seed-3"), "seed=3", info=dataclasses.replace(MNIST, mean=(0.2,)))
    Path("runs/s/seed-3/result.json").touch()
    Path("photos").mkdir()
    for index in range(4):
        Image.fromarray(splits.test.images[index].numpy()).save(f"photos/{index}.png")
    return tmp_path


def call(*arguments: str) -> None:
    before, sys.argv = sys.argv, ["predict", *arguments]
    try:
        main()
    finally:
        sys.argv = before


def probabilities(capsys: pytest.CaptureFixture[str], *arguments: str) -> np.ndarray:
    """What the command gives each class of each picture, float64 [n, 10]."""
    call(*arguments, "--json", "--top", "10")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return np.array(
        [[{top["digit"]: top["probability"] for top in line["top"]}[digit] for digit in range(10)] for line in lines]
    )


def test_each_probability_is_the_mean_of_those_of_the_runs_in_any_order(place: Path, capsys: pytest.CaptureFixture[str]):
    each = [probabilities(capsys, name, "photos") for name in ("a", "b", "s")]
    assert not np.array_equal(each[0], each[1])
    by_hand = np.mean(each, 0).astype(np.float32)
    for names in (["a", "b", "s"], ["s", "a", "runs/b"], [str(place / "runs/b"), "s/seed-3", "a"]):
        assert np.array_equal(probabilities(capsys, *names, "photos"), by_hand)


def test_which_runs_are_averaged_and_in_what_precision_is_said_beside_the_predictions(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    call("a", "s", "b", "photos/0.png")
    out, err = capsys.readouterr()
    assert out.startswith("photos/0.png: ")
    assert len(out.splitlines()) == 1
    assert err == "averaged over 3 runs: runs/a, runs/s/seed-3, runs/b; computed in fp32, bf16, trained in fp32, bf16\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "no IMAGE is given; give a file, a folder, or - for stdin"),
        (["a", "c", "photos"], "c: neither a file nor a run of that folder or name; runs come first, then images"),
        (["c", "a", "photos"], "c: no run of that folder or name"),
        (["a", "runs/a", "photos"], "runs/a is given twice"),
        (["a", "k", "photos"], "runs/a and runs/k cannot be averaged: the data set is mnist and kmnist"),
        (["a", "b", "photos", "--top", "11"], "--top 11 is not allowed; it takes 1 to 10"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_told_before_a_picture_is_read(place: Path, arguments: list[str], message: str):
    made(Path("runs/k"), info=DATA_SETS["kmnist"])
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert str(error.value).startswith(message)
    assert len(error.value.mistakes) == 1


def test_a_folder_of_pictures_that_has_the_name_of_a_run_is_pictures(place: Path, capsys: pytest.CaptureFixture[str]):
    Path("photos").rename("b")
    call("a", "b")
    assert capsys.readouterr().out.count("b/") == 4
