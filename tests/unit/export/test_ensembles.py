"""Several runs as one file: it gives the mean of their probabilities, and is kept only if it predicts what that does."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.stored_runs import MNIST, made

from digitdist import export
from digitdist.data import Splits
from digitdist.errors import UserError
from digitdist.export import formats
from digitdist.export.__main__ import main
from digitdist.export.parity import describe
from digitdist.predict.ensembles import open_ensemble
from digitdist.runs import load_runs

pytestmark = pytest.mark.slow  # exporters take seconds each

NUM_TEST = 1010
RUNS = ("a", "b", "c")


@pytest.fixture
def place(tmp_path: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with runs that differ in network and normalisation, and a short test set."""
    monkeypatch.chdir(tmp_path)
    made(Path("runs/a"), "seed=1")
    made(Path("runs/b"), "seed=2", "model.name=convnet", "optim.ema=0.9", ema=True)
    made(Path("runs/c"), "seed=3", info=dataclasses.replace(MNIST, mean=(0.2,)))
    short = Splits(splits.train, splits.validation, splits.test.subset(torch.arange(NUM_TEST)), splits.info)
    monkeypatch.setattr("digitdist.export.ensembles.load_splits", lambda *_: short)
    return tmp_path


def call(*arguments: str) -> None:
    before, sys.argv = sys.argv, ["export", *arguments]
    try:
        main()
    finally:
        sys.argv = before


def given(file: Path, images: torch.Tensor) -> np.ndarray:
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(images).numpy()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"images": images.numpy()})[0]


def metadata_of(file: Path) -> dict:
    if file.suffix == ".pt2":
        extra = {"metadata.json": ""}
        torch.export.load(file, extra_files=extra)
        return json.loads(extra["metadata.json"])
    read = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
    return {name: json.loads(read[name]) for name in ("test_correct", "test_total", "classes", "members")}


@pytest.mark.parametrize(("form", "name"), [("onnx", "ensemble.onnx"), ("torch", "ensemble.pt2")])
def test_one_file_gives_the_mean_of_the_runs_probabilities_and_tells_of_each(
    form: str, name: str, place: Path, splits: Splits, capsys: pytest.CaptureFixture[str]
):
    call(*RUNS, "--format", form)
    *each, whole, kept = capsys.readouterr().out.splitlines()
    assert [line.split(" at step 5, mnist test: ")[0] for line in each] == ["runs/a", "runs/b", "runs/c"]
    assert sorted(path.name for path in place.iterdir()) == [name, "runs"]
    assert not [*Path("runs").rglob("export")]

    images, labels = splits.test.images[:NUM_TEST], splits.test.labels[:NUM_TEST]
    expected = open_ensemble(load_runs(RUNS, [], needs_data=False), "last")(images)
    found = given(Path(name), images)
    assert np.allclose(found, expected, atol=1e-6)
    assert np.array_equal(found.argmax(1), expected.argmax(1))
    correct = int((expected.argmax(1) == labels).sum())
    assert whole.startswith(f"ensemble of these 3 runs, mnist test: {correct:,}/1,010 correct = ")
    assert kept.startswith(f"{name}: the same prediction on all 1,010 images, largest difference of a probability ")
    for count in (0, 1, 7):
        assert given(Path(name), images[:count]).shape == (count, 10)

    told = metadata_of(Path(name))
    assert (told["test_correct"], told["test_total"], told["classes"]) == (correct, NUM_TEST, list("0123456789"))
    assert [member["run"] for member in told["members"]] == list(RUNS)
    assert [member["pixel_mean"] for member in told["members"]] == pytest.approx([33.3285, 33.3285, 51])
    assert len({member["weights_sha256"] for member in told["members"]}) == 3


def test_a_file_that_predicts_otherwise_than_the_mean_is_not_kept(place: Path, monkeypatch: pytest.MonkeyPatch):
    suffix, write, read = export.FORMATS["torch"]

    def wrong(classifier: formats.AnyClassifier, metadata: formats.Metadata) -> bytes:
        assert isinstance(classifier, formats.EnsembleClassifier)
        return write(classifier.members[0], metadata)

    monkeypatch.setitem(export.FORMATS, "torch", formats.Format(suffix, wrong, read))
    with pytest.raises(RuntimeError, match=r"predicts [\d,]+ of 1,010 test images differently"):
        call(*RUNS, "--format", "torch")
    assert [path.name for path in place.iterdir()] == ["runs"]


@pytest.mark.usefixtures("place")
def test_a_member_that_no_graph_can_hold_is_named_with_what_can_be_done(capfd: pytest.CaptureFixture[str]):
    made(Path("runs/d"), "model.target=helpers.networks.Moody")
    advice = "the model of runs/d cannot be traced; --format safetensors takes any model, of one run at a time: "
    for form in ("onnx", "torch"):
        with pytest.raises(UserError) as error:
            call("a", "d", "--format", form)
        assert str(error.value).startswith(advice)
        assert len(str(error.value)) <= len(advice) + 300
    assert capfd.readouterr() == ("", "")


def test_runs_of_two_studies_are_told_apart(tmp_path: Path):
    runs = [made(tmp_path / "runs" / study / "seed-0")[0] for study in ("alpha", "beta")]
    loaded = load_runs([str(run) for run in runs], [], needs_data=False)
    told = [describe(run, run.checkpoint("last"), run.model(run.checkpoint("last")), 1, 2)["run"] for run in loaded]
    assert told == ["alpha seed-0", "beta seed-0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--format", "safetensors"], "--format safetensors is of one run alone; export each by itself, or"),
        (["a", "d", "--format", "onnx"], "d: no run of that folder or name"),
        (["a", "b", "--format", "torch", "--checkpoint", "7"], "step-000000007"),
        (["a", "b", "--format", "torch", "--output", "runs"], "--output runs: is a folder"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_reported_with_what_is_allowed(place: Path, arguments: list[str], message: str):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert message in str(error.value)
    assert [path.name for path in place.iterdir()] == ["runs"]
