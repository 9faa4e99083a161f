"""One GPU: the other commands give of a run that was trained there what they give on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import on_device
from helpers.on_device import SIMULATED, Trainings
from helpers.predictions import assert_close
from helpers.runs import result
from PIL import Image

from digitdist.data import Splits

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
FORMATS = ["torch"] if SIMULATED else ["torch", "onnx", "safetensors"]
ROUNDING = 0.02  # of a probability: TF32 has ten bits of a fraction


@pytest.fixture(scope="module")
def said(trainings: Trainings, splits: Splits) -> tuple[Path, dict[str, str]]:
    """The folder of a run that was trained on the GPU, and what each command has printed about it."""
    trainings.found("for commands")
    place = trainings.place
    for number, image in enumerate(splits.test.read(torch.arange(20)).images):
        Image.fromarray(image.numpy()).save(place / f"{number:02}.png")
    beside = {"predict": ["digitdist.predict", "trained", *(f"{number:02}.png" for number in range(20)), "--json"]}
    beside |= {form: ["digitdist.export", "trained", "--format", form] for form in FORMATS}
    on_gpu = {"evaluate": ["digitdist.evaluate", "trained", "--json"]}
    on_cpu = {"predictions": ["helpers.predictions_worker", "runs/trained", "runs/trained/cpu.npz"]}
    if SIMULATED:  # which torch.export does not take
        on_cpu = beside | on_cpu
    else:
        on_gpu = beside | on_gpu
    return place / "runs/trained", on_device.commands(on_gpu, place) | on_device.commands(on_cpu, place, on_cpu=True)


def predicted(file: Path, prediction: object, probability: object, counted: Path) -> Path:
    """Predictions of a run's first test images as a file like that of the run."""
    rows = {name: np.load(counted)[name][: len(np.asarray(prediction))] for name in ("index", "label")}
    np.savez(file, prediction=np.asarray(prediction), probability=np.asarray(probability), **rows)
    return file


@pytest.mark.claim("evaluate counts what the training has counted, and on the CPU the same but for rounding")
def test_evaluate_gives_the_same_count_on_gpu_and_cpu(said: tuple[Path, dict[str, str]]):
    run, printed = said
    assert json.loads(printed["evaluate"])["correct"] == result(run)["test_correct"]
    assert_close(run / "cpu.npz", run / "predictions.npz", ROUNDING)


@pytest.mark.claim("predict and export give of a run that was trained on a GPU the probabilities that were counted there")
@pytest.mark.parametrize("form", FORMATS)
def test_an_exported_model_predicts_every_image_as_the_run_does(said: tuple[Path, dict[str, str]], form: str):
    assert "the same prediction on all 200 images" in said[1][form]


@pytest.mark.claim("predict and export give of a run that was trained on a GPU the probabilities that were counted there")
def test_a_model_file_gives_the_probabilities_of_the_gpu(said: tuple[Path, dict[str, str]], splits: Splits):
    counted = said[0] / "predictions.npz"
    classify = torch.export.load(said[0] / "export/model.pt2").module()
    images = splits.test.read(torch.arange(200)).images
    found = torch.cat([classify(part).detach() for part in images.split(50)]).max(1)
    assert_close(predicted(said[0] / "file.npz", found.indices, found.values, counted), counted, ROUNDING)


@pytest.mark.claim("predict and export give of a run that was trained on a GPU the probabilities that were counted there")
def test_predict_gives_the_probabilities_of_the_gpu(said: tuple[Path, dict[str, str]]):
    counted, lines = said[0] / "predictions.npz", [json.loads(line) for line in said[1]["predict"].splitlines()]
    assert [line["file"] for line in lines] == [f"{number:02}.png" for number in range(20)]
    here = predicted(said[0] / "here.npz", [line["digit"] for line in lines], [line["probability"] for line in lines], counted)
    first = {name: np.load(counted)[name][:20] for name in ("prediction", "probability")}
    assert_close(here, predicted(said[0] / "first.npz", *first.values(), counted), ROUNDING)
