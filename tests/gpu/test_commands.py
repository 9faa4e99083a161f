"""One GPU: the other commands give of a run that was trained there what they give on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import on_device
from helpers.launching import ROOT, Outcome, python
from helpers.on_device import FEW, FP32, SIMULATED
from helpers.predictions import assert_close
from helpers.runs import result
from PIL import Image

from digitdist.data import Splits

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
ROUNDING = 0.01  # of a probability: TF32 has ten bits of a fraction


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """A folder with a run that was trained on the GPU, named a."""
    place = tmp_path_factory.mktemp("trained")
    (place / "data").symlink_to(mnist_root)
    on_device.train({"a": (*FEW, FP32, "model.name=convnet", "train.max_steps=60")}, place)
    return place


def on_cpu(module: str, *arguments: str, cwd: Path) -> Outcome:
    done = python("-m", module, *arguments, cwd=cwd, env={"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"})
    assert done.code == 0, done.err
    return done


@pytest.mark.claim("evaluate counts what the training has counted, and on the CPU the same but for rounding")
def test_evaluate_gives_the_same_count_on_gpu_and_cpu(trained: Path):
    here = on_device.launch("digitdist.evaluate", "a", "--json", cwd=trained)
    assert here.code == 0, here.err
    assert json.loads(here.out)["correct"] == result(trained / "runs/a")["test_correct"]
    on_cpu("helpers.predictions_worker", "runs/a", "cpu.npz", cwd=trained)
    assert_close(trained / "cpu.npz", trained / "runs/a/predictions.npz", ROUNDING)


@pytest.mark.claim("predict and export give of a run that was trained on a GPU the probabilities that were counted there")
@pytest.mark.parametrize("form", ["torch"] if SIMULATED else ["torch", "onnx", "safetensors"])
def test_a_model_file_gives_the_probabilities_of_the_gpu(trained: Path, splits: Splits, form: str):
    done = on_device.launch("digitdist.export", "a", "--format", form, cwd=trained)
    assert done.code == 0, done.err
    assert "the same prediction on all 200 images" in done.out
    if form == "torch":
        images = splits.test.read(torch.arange(200)).images
        classify = torch.export.load(trained / "runs/a/export/model.pt2").module()
        found = torch.cat([classify(part) for part in images.split(50)]).max(1)
        counted = np.load(trained / "runs/a/predictions.npz")
        rows = {name: counted[name] for name in ("index", "label")}
        np.savez(trained / "file.npz", prediction=found.indices, probability=found.values.detach(), **rows)
        assert_close(trained / "file.npz", trained / "runs/a/predictions.npz", ROUNDING)


@pytest.mark.claim("predict and export give of a run that was trained on a GPU the probabilities that were counted there")
def test_predict_gives_the_probabilities_of_the_gpu(trained: Path, splits: Splits):
    counted = np.load(trained / "runs/a/predictions.npz")
    images = splits.test.read(torch.arange(20)).images
    names = [f"{number:02}.png" for number in range(20)]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image.numpy()).save(trained / name)
    done = on_device.launch("digitdist.predict", "a", *names, "--json", cwd=trained)
    assert done.code == 0, done.err
    said = [json.loads(line) for line in done.out.splitlines()]
    assert [line["file"] for line in said] == names
    rows = {name: counted[name][:20] for name in ("index", "label")}
    columns = {"prediction": [line["digit"] for line in said], "probability": [line["probability"] for line in said]}
    np.savez(trained / "said.npz", **columns, **rows)
    np.savez(trained / "first.npz", **{name: counted[name][:20] for name in (*rows, *columns)})
    assert_close(trained / "said.npz", trained / "first.npz", ROUNDING)
