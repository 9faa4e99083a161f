"""The commands on a run agree with it, say in which precision, and need nothing that only its training needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.launching import CLEAN, QUIET, ROOT, python
from helpers.runs import result
from PIL import Image

from digitdist.data import Splits

pytestmark = pytest.mark.timeout(400)
ENV = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
TRAIN = (
    "-m",
    "digitdist.train",
    *QUIET,
    "data.target=helpers.data_sets.FewDigits",
    "train.max_steps=3",
    "train.precision=bf16",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path, splits: Splits) -> Path:
    """A folder with a run in bf16 on a data set of one's own, and a picture."""
    place = tmp_path_factory.mktemp("place")
    (place / "data").symlink_to(mnist_root)
    Image.fromarray(splits.test.images[0].numpy()).save(place / "digit.png")
    done = python(*TRAIN, "run.name=with a space", cwd=place, env=ENV)
    assert done.code == 0, done.err
    assert "next: python -m digitdist.evaluate 'runs/with a space'" in done.out
    (place / "runs/with a space").rename(place / "runs/a")  # it is known to be made here all the same
    return place


@pytest.mark.slow
def test_evaluate_export_and_predict_agree_with_the_run_and_say_in_what_precision(trained: Path):
    saved, final = np.load(trained / "runs/a/predictions.npz"), result(trained / "runs/a")
    evaluated = python("-m", "digitdist.evaluate", "a", cwd=trained, env=ENV)
    assert evaluated.code == 0, evaluated.err
    first, second, _ = evaluated.out.splitlines()
    assert f"{final['test_correct']}/200 correct" in first
    assert first.endswith("in bf16 on cpu")
    assert second == f"predictions.npz, in bf16 on cpu: {final['test_correct']} correct, the same prediction on all 200 images"

    exported = python("-m", "digitdist.export", "a", "--format", "torch", cwd=trained, env=ENV)
    assert exported.code == 0, exported.err
    first, second, third = exported.out.splitlines()
    assert first.endswith("%, in fp32")
    assert "the same prediction on all 200 images" in second
    assert third.startswith(f"predictions.npz, in bf16 on cpu: {final['test_correct']} correct, the same prediction on ")

    predicted = python("-m", "digitdist.predict", "a", "digit.png", "--json", cwd=trained, env=ENV)
    assert predicted.code == 0, predicted.err
    assert predicted.err == "probabilities are computed in bf16; the run was trained in bf16\n"
    first_image = json.loads(predicted.out)
    assert first_image["digit"] == saved["prediction"][0]
    assert first_image["probability"] == pytest.approx(saved["probability"][0], abs=0.01), "bf16 has 8 bits"


@pytest.mark.slow
def test_evaluate_needs_neither_the_compiler_nor_the_precision_of_the_training(trained: Path):
    shutil.copytree(trained / "runs/a", trained / "runs/b")
    config = (trained / "runs/b/config.yaml").read_text().replace("compile: none", "compile: max-autotune")
    (trained / "runs/b/config.yaml").write_text(config.replace("batch_norm: false", "batch_norm: true"))
    env = ENV | {"CXX": "/no/compiler", "CC": "/no/compiler"}
    done = python("-m", "digitdist.evaluate", "b", "--json", cwd=trained, env=env)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["correct"], found["precision"]) == (result(trained / "runs/a")["test_correct"], "bf16")
    other = python("-m", "digitdist.evaluate", "b", "--json", "train.precision=fp32", cwd=trained, env=env)
    assert json.loads(other.out)["precision"] == "fp32"


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_fault_and_costs_no_file(trained: Path):
    shutil.copytree(trained / "runs/a", trained / "runs/c")
    commands = {
        ("evaluate", "c"): None,
        ("predict", "c", "digit.png"): None,
        ("checkpoint", "verify", "c"): None,
        ("report", "a", "c"): "comparison.html",
        ("export", "c", "--format", "safetensors"): "runs/c/export/model.safetensors",
        ("data", "--plot", "samples.png"): "samples.png",
    }
    for (name, *arguments), product in commands.items():
        process = subprocess.Popen(
            [sys.executable, "-m", f"digitdist.{name}", *arguments],
            cwd=trained,
            env=CLEAN | ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(timeout=100) == 0, (name, errors)
        assert "Traceback" not in errors
        assert "BrokenPipeError" not in errors
        assert product is None or (trained / product).is_file(), name
