"""Runs that are named together: told from what else a command line holds, and refused where they share too little."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers.stored_runs import MNIST, made

from digitdist.data import DATA_SETS
from digitdist.errors import UserError
from digitdist.runs import check_held_out, count_runs, load_runs, split_overrides

FOLDER = ("data.name=folder", "data.root=pictures")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def folders(*names: str) -> list[str]:
    return [str(run.folder) for run in load_runs(names, [])]


def test_key_value_is_told_from_runs_by_its_equals_sign_before_any_slash():
    arguments = ["lr=0.1", "b", "data.root=/x/y", "runs/g/optim.lr=0.1", "./lr=1", "trust=true"]
    assert split_overrides(arguments) == (
        ["lr=0.1", "b", "runs/g/optim.lr=0.1", "./lr=1"],
        ["data.root=/x/y", "trust=true"],
    )


def test_the_runs_before_images_are_those_of_a_runs_folder_or_name_and_what_lies_here_comes_first():
    for name in ("a", "b", "digits", "s/seed-0", "s/seed-1"):
        made(Path("runs") / name)
    Path("runs/s/seed-0/result.json").touch()
    Path("digits").mkdir()
    Path("b.png").touch()
    assert count_runs(["a", "b", "b.png", "a"], []) == 2
    assert count_runs(["a", "digits"], []) == 1, "a folder here is no run"
    assert count_runs(["a", "runs/digits", "s", "runs/s", "x.png"], []) == 4
    assert count_runs(["a", "b"], []) == 2
    assert count_runs(["misspelt", "-"], []) == 1, "the first is a run's, whatever it is"
    assert count_runs(["a", "seed-0"], ["run.dir=runs/s"]) == 2
    assert count_runs(["a", "x" * 5000], []) == 1, "longer than a name can be"


def test_a_study_is_all_of_its_finished_runs_and_others_are_said_to_be_left_out(capsys: pytest.CaptureFixture[str]):
    for seed in range(4):
        run, _ = made(Path(f"runs/s/seed-{seed}"), f"seed={seed}")
        if seed != 2:
            (run / "result.json").touch()
    made(Path("runs/a"))
    finished = [f"runs/s/seed-{seed}" for seed in (0, 1, 3)]
    assert folders("s") == folders("runs/s") == finished
    assert folders("a", "s") == ["runs/a", *finished]
    told = capsys.readouterr()
    note = "1 of its runs are not finished, and left out"
    assert (told.out, told.err.splitlines()) == ("", [f"note: s: {note}", f"note: runs/s: {note}", f"note: s: {note}"])
    assert folders("s/seed-0") == ["runs/s/seed-0"]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="runs/s/seed-1 is given twice, and would count double; give each run once"):
        load_runs(["s", "runs/../runs/s/seed-1"], [])


def test_networks_seeds_and_normalisation_may_differ():
    made(Path("runs/a"), "seed=1")
    made(Path("runs/b"), "model.name=convnet", "train.precision=bf16", "sync.mode=exact")
    made(Path("runs/c"), info=dataclasses.replace(MNIST, mean=(0.5,)))
    assert len(load_runs(["a", "b", "c"], [])) == 3


@pytest.mark.parametrize(
    ("other", "overrides", "message"),
    [
        (DATA_SETS["kmnist"], ["data.name=kmnist"], "the data set is mnist and kmnist"),
        (dataclasses.replace(MNIST, height=32), [], r"the shape of an image is \(1, 28, 28\) and \(1, 32, 28\)"),
        (dataclasses.replace(MNIST, classes=("a", "b")), [], r"the list of classes is \('0', .* and \('a', 'b'\)"),
        (MNIST, ["data.name=qmnist"], "data.name is mnist and qmnist"),
        (dataclasses.replace(MNIST, image="resize"), [], "data.image is mnist and resize"),
    ],
)
def test_what_the_runs_of_an_ensemble_must_share_is_named_in_one_line(other, overrides: list[str], message: str):
    made(Path("runs/a"))
    made(Path("runs/b"), *overrides, info=other)
    with pytest.raises(UserError, match=f"runs/a and runs/b cannot be averaged: {message}; give runs of one data set") as error:
        load_runs(["a", "b"], [])
    assert len(error.value.mistakes) == len(str(error.value).splitlines()) == 1


def test_two_folders_of_one_name_are_two_data_sets_but_where_the_command_line_names_one():
    digits = dataclasses.replace(MNIST, name="pictures")
    made(Path("runs/a"), *FOLDER, info=digits)
    made(Path("runs/b"), "data.name=folder", "data.root=elsewhere/pictures", info=digits)
    with pytest.raises(UserError, match=r"cannot be averaged: data\.root is .*/pictures and .*/elsewhere/pictures; give"):
        load_runs(["a", "b"], [])
    assert len(load_runs(["a", "b"], ["data.root=pictures"])) == 2
    assert len(load_runs(["a", "b"], [], needs_data=False)) == 2, "to predict pictures"


def test_a_folder_that_has_the_name_of_a_data_set_is_another():
    made(Path("runs/a"))
    made(Path("runs/b"), "data.name=folder", "data.root=mnist")
    with pytest.raises(UserError, match=r"cannot be averaged: data\.name is mnist and folder; give"):
        load_runs(["a", "b"], [])


def test_held_out_images_must_be_the_same_for_all():
    for name, *overrides in (
        ("a", "seed=1"),
        ("b", "seed=2"),
        ("c", "seed=1", "data.validation=9"),
        ("d", "data.validation=9"),
        ("e", "seed=5", "data.validation=9", "data.validation_seed=1"),
    ):
        made(Path("runs") / name, *overrides)
    a, b, c, d, e = load_runs(["a", "b", "c", "d", "e"], [])
    for split in ("test", "train", "validation"):
        check_held_out([a, b], split)
    check_held_out([a, b, c, d], "test")
    with pytest.raises(UserError, match=r"--split train is not possible: runs/a \(data.validation=0\) and runs/c \(data.val"):
        check_held_out([a, c], "train")
    with pytest.raises(
        UserError, match=r"runs/c \(data.validation=9 by seed 1\) and runs/d \(data.validation=9 by seed 0\) hold out"
    ):
        check_held_out([c, d], "validation")
    for split in ("train", "validation"):
        check_held_out([c, e], split)


def test_a_received_run_stays_data_beside_runs_of_ones_own():
    made(Path("runs/a"))
    theirs, _ = made(Path("theirs"))
    (theirs / "config.yaml").write_text("model: {target: os.system, args: {command: touch executed}}")
    for names in (["a", "theirs"], ["theirs", "a"]):
        with pytest.raises(UserError, match=r"theirs, which no training of yours .* would execute model\.target=os\.system"):
            load_runs(names, [])
    theirs.joinpath("config.yaml").write_text("data: {root: /proc/elsewhere}")
    assert [run.made_here for run in load_runs(["a", "theirs"], [])] == [True, False]
