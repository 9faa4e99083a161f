"""Several runs as one ensemble, as a person asks for it: the same count and bits however, and wherever, it is computed."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from helpers.launching import Outcome, accelerate, python, torchrun
from helpers.stored_runs import MNIST, made

from digitdist.data import Splits
from digitdist.errors import EXIT_USER_ERROR
from digitdist.evaluate import mcnemar, wilson_interval
from digitdist.evaluate.members import open_member
from digitdist.runs import load_run

EVALUATE = ("-m", "digitdist.evaluate")
COMMON = ("train.threads=1", "data.eval_batch_size=384")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """A folder with runs that differ in seed, network, precision, mode and normalisation; two of them are a study."""
    place = tmp_path_factory.mktemp("trained")
    (place / "data").symlink_to(mnist_root)
    made(place / "runs/a", *COMMON, "seed=1", "model.name=cnn_batchnorm", precision="bf16")
    made(place / "runs/b", *COMMON, "seed=2", "sync.mode=exact", info=dataclasses.replace(MNIST, mean=(0.2,)))
    for seed in (3, 4):
        run, _ = made(place / f"runs/s/seed-{seed}", *COMMON, f"seed={seed}", "data.validation=100")
        (run / "result.json").write_text("{}")
    return place


def found(done: Outcome) -> dict:
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.slow
def test_the_count_is_one_made_by_hand_from_the_members_probabilities_on_any_world_size(
    trained: Path, accelerator: Accelerator, splits: Splits, monkeypatch: pytest.MonkeyPatch
):
    whole = found(python(*EVALUATE, "b", "s", "a", "--json", cwd=trained))
    names = ["runs/b", "runs/s/seed-3", "runs/s/seed-4", "runs/a"]
    monkeypatch.chdir(trained)
    members = [open_member(load_run(name, []), "last", chosen=False) for name in names]
    scores = [member.score(accelerator, splits.test, member.layout(splits.test)) for member in members]
    mean = np.mean([np.exp(each.log_probability.double().numpy()) for each in scores], 0)
    label = splits.test.labels.numpy()
    right = [each.log_probability.numpy().argmax(1) == label for each in scores] + [mean.argmax(1) == label]
    assert [run["correct"] for run in whole["runs"]] + [whole["correct"]] == [int(each.sum()) for each in right]
    assert [run["run"] for run in whole["runs"]] == names
    assert [run["precision"] for run in whole["runs"]] == ["fp32", "fp32", "fp32", "bf16"]
    assert whole["total"] == 10_000
    assert whole["interval"] == list(wilson_interval(whole["correct"], 10_000))
    assert whole["loss"] == pytest.approx(-np.log(mean[np.arange(10_000), label]).mean(), rel=1e-6)
    best = max(range(4), key=lambda number: right[number].sum())
    only = [int((right[4] & ~right[best]).sum()), int((right[best] & ~right[4]).sum())]
    assert whole["best_is_of"] == "test"
    assert (whole["best"], [whole["only_ensemble"], whole["only_best"]]) == (names[best], only)
    assert whole["p_value"] == mcnemar(*only)

    launch = ("--multi_gpu", "--num_processes")
    assert found(accelerate(*launch, "2", *EVALUATE, "b", "s", "a", "--json", cwd=trained)) == whole
    other_order = found(torchrun(3, *EVALUATE, "a", "s/seed-4", "runs/b", "s/seed-3", "--json", cwd=trained))
    assert {run["run"]: run for run in other_order.pop("runs")} == {run["run"]: run for run in whole.pop("runs")}
    assert other_order == whole


@pytest.mark.slow
def test_a_member_has_the_count_and_the_loss_that_it_has_alone_and_the_text_says_all_of_it(trained: Path):
    whole = python(*EVALUATE, "a", "b", cwd=trained)
    assert whole.code == 0, whole.err
    first, second, ensemble, beside, classes = whole.out.splitlines()
    for name, line in (("a", first), ("b", second)):
        alone = python(*EVALUATE, name, cwd=trained)
        assert alone.out.splitlines()[0] == line
    assert first.endswith("in bf16 on cpu")
    assert second.endswith("in fp32 on cpu")
    assert ensemble.startswith("ensemble of these 2 runs, mnist test: ")
    assert "/10,000 correct = " in ensemble
    assert "(95 % interval " in ensemble
    assert re.match(
        r"beside runs/[ab], the best of them on these same images, which favours it: .*, p .* \(McNemar\); ", beside
    )
    assert classes.startswith("of each class: 0 ")


@pytest.mark.slow
def test_runs_that_cannot_be_averaged_are_one_line_of_all_ranks_together(trained: Path):
    done = torchrun(2, *EVALUATE, "s", "--split", "validation", cwd=trained)
    (line,) = done.errors
    assert line.startswith(
        "error: --split validation is not possible: runs/s/seed-3 (data.validation=100 by seed 3) and runs/s/seed-4"
    )
    alone = python(*EVALUATE, "s", "--split", "validation", cwd=trained)
    assert (alone.code, alone.out, alone.err) == (EXIT_USER_ERROR, "", f"{line}\n")
