from __future__ import annotations

from pathlib import Path

import pytest

from digitdist.config import load_config
from digitdist.errors import UserError
from digitdist.study.grid import check_held_out, combinations, split_values


def test_a_grid_is_every_combination_each_in_a_folder_of_its_name():
    found = combinations(["optim.lr=0.001,0.002", "model.name=cnn,convnet"], Path("runs/g"))
    assert {folder.name: arguments for folder, arguments in found.items()} == {
        f"optim.lr={rate},model.name={model}": [f"optim.lr={rate}", f"model.name={model}"]
        for rate in ("0.001", "0.002")
        for model in ("cnn", "convnet")
    }
    assert {folder.parent for folder in found} == {Path("runs/g")}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", ["1", "2"]),
        ("[1, 2],[3]", ["[1, 2]", "[3]"]),
        ("{a: [1,2], b: 3},{}", ["{a: [1,2], b: 3}", "{}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("1,", ["1", ""]),
    ],
)
def test_values_are_parted_at_commas_outside_brackets_and_quotes(text: str, values: list[str]):
    assert split_values(text) == values


def test_values_that_no_folder_is_named_by_are_told_apart_all_the_same():
    found = combinations(["model.args={stem: 1},{stem: 2},{stem:  2}"], Path("g"))
    assert len({folder.name for folder in found}) == 3
    assert all("/" not in folder.name and " " not in folder.name for folder in found)
    long = combinations(["model.target=a" + "b" * 300 + ",a" + "b" * 301], Path("g"))
    assert len(long) == 2
    assert all(len(folder.name) < 140 for folder in long)


@pytest.mark.parametrize(
    ("axes", "why"),
    [
        (["1,2"], "is not key=value,value"),
        (["optim.lr=1,"], "is not key=value,value"),
        (["optim.lr=1,2", "optim.lr=3,4"], "optim.lr twice"),
        (["data.root=a,b"], r"--grid data\.root is not allowed: its combinations hold out other images"),
        (["data.args.kind=a,b"], r"--grid data\.args\.kind is not allowed: its combinations hold out other images"),
        (["data.validation_seed=1,2"], r"--grid data\.validation_seed is not allowed: its combinations hold out other images"),
        (["run.dir=a,b"], r"--grid run\.dir is not allowed: it does not alter the result"),
    ],
)
def test_what_is_no_axis_is_refused(axes: list[str], why: str):
    with pytest.raises(UserError, match=why):
        combinations(axes, Path("g"))


def test_nothing_is_chosen_by_test_images():
    with pytest.raises(UserError, match=r"data\.validation=0 holds none out; set for example data\.validation=5000"):
        check_held_out(load_config())
    check_held_out(load_config((), ["data.validation=1"]))
