"""Exported files: what they hold, that they run without this package, and that only what predicts as the run does is kept."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from helpers.launching import QUIET, python
from helpers.runs import result
from helpers.stored_runs import made

import digitdist
from digitdist import checkpoint, data, export
from digitdist.checkpoint import weights_sha256
from digitdist.config import load_config
from digitdist.data import Splits
from digitdist.errors import EXIT_USER_ERROR, UserError
from digitdist.export import formats, parity
from digitdist.export.__main__ import main
from digitdist.models import MODELS

pytestmark = pytest.mark.slow  # exporters take seconds each

COMMAND = ("-m", "digitdist.export")
FILES = {"onnx": "model.onnx", "torch": "model.pt2", "safetensors": "model.safetensors"}
READ_MNIST = """
def counted(classify):
    import numpy as np
    raw = "data/MNIST/raw/t10k-"
    images = np.fromfile(raw + "images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.fromfile(raw + "labels-idx1-ubyte", np.uint8, offset=8)
    for count in (1, 7):
        assert classify(images[:count]).shape == (count, 10)
    given = classify(images)
    assert given.dtype == np.float32 and abs(given.sum(1) - 1).max() < 1e-5
    return int((given.argmax(1) == labels).sum())
"""
WITH_ONNXRUNTIME = f"""
import sys, onnxruntime
{READ_MNIST}
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(counted(lambda images: session.run(["probabilities"], {{"images": images}})[0]))
assert not {{"digitdist", "torch"}} & set(sys.modules)
"""
WITH_TORCH = f"""
import sys, torch
sys.modules["digitdist"] = None  # to import it would be an error
{READ_MNIST}
model = torch.export.load(sys.argv[1]).module()
print(counted(lambda images: model(torch.from_numpy(images)).numpy()))
assert not [name for name in sys.modules if name.startswith("digitdist.")]
"""

MNIST = data.DATA_SETS["mnist"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """A folder to launch in, with the run ``a``."""
    place = tmp_path_factory.mktemp("trained")
    (place / "data").symlink_to(mnist_root)
    done = python("-m", "digitdist.train", *QUIET, "train.max_steps=20", "run.name=a", cwd=place)
    assert done.code == 0, done.err
    return place


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the run ``a``, not exported yet, from where it was launched."""
    monkeypatch.chdir(trained)
    shutil.rmtree("runs/a/export", ignore_errors=True)
    return Path("runs/a")


@pytest.fixture
def few(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short test set, for what does not hang on its length."""
    short = Splits(splits.train, splits.validation, splits.test.subset(torch.arange(1010)), splits.info)
    monkeypatch.setattr(parity, "load_splits", lambda *_: short)


def call(*arguments: object) -> None:
    """The command in this process."""
    before, sys.argv = sys.argv, ["export", *map(str, arguments)]
    try:
        main()
    finally:
        sys.argv = before


def metadata_of(file: Path) -> dict[str, str]:
    """The metadata of a file, all as text."""
    if file.suffix == ".onnx":
        import onnx

        return {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    if file.suffix == ".pt2":
        extra = {"metadata.json": ""}
        torch.export.load(file, extra_files=extra)
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in json.loads(extra["metadata.json"]).items()}
    with safetensors.safe_open(file, "pt") as opened:
        return opened.metadata()


def assert_says_where_it_is_from(file: Path, run: Path) -> None:
    reported, final = metadata_of(file), result(run)
    assert json.loads(reported["classes"]) == list("0123456789")
    assert (reported["run"], reported["step"], reported["data_set"]) == ("a", "20", "mnist")
    assert reported["weights_sha256"] == final["weights_sha256"]
    assert (reported["test_correct"], reported["test_total"]) == (str(final["test_correct"]), "10000")
    assert float(reported["test_accuracy"]) == final["test_accuracy"]
    assert reported["digitdist_version"] == digitdist.__version__
    assert str(Path(digitdist.__file__).parent).encode() not in file.read_bytes(), "no path of this machine"


def test_the_example_of_the_help_writes_an_onnx_file_that_needs_onnxruntime_alone(
    here: Path, trained: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        call("--help")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "example: python -m digitdist.export runs/quick --format onnx"
    done = python(*last.replace("runs/quick", "runs/a").split()[2:], cwd=trained)
    assert (done.code, done.err) == (0, "")
    correct = result(here)["test_correct"]
    first, second, third = done.out.splitlines()
    assert first.startswith(f"runs/a at step 20, mnist test: {correct:,}/10,000 correct")
    assert second.startswith("runs/a/export/model.onnx: the same prediction on all 10,000 images, largest difference")
    assert third == f"predictions.npz, in fp32 on cpu: {correct:,} correct, the same prediction on all 10,000 images"
    assert [path.name for path in (here / "export").iterdir()] == ["model.onnx"]
    assert_says_where_it_is_from(here / "export/model.onnx", here)
    alone = python("-c", WITH_ONNXRUNTIME, "runs/a/export/model.onnx", cwd=trained)
    assert alone.out == f"{correct}\n", alone.err


def test_a_pt2_file_needs_torch_alone_and_predicts_what_the_run_saved(
    here: Path, trained: Path, splits: Splits, capfd: pytest.CaptureFixture[str]
):
    call("a", "--format", "torch", "--output", "new folder/here.pt2", "data.root=data")
    assert capfd.readouterr().err == ""
    file = trained / "new folder/here.pt2"
    assert_says_where_it_is_from(file, here)
    given = torch.export.load(file).module()(splits.test.images).numpy()
    saved = np.load(here / "predictions.npz")
    assert np.array_equal(given.argmax(1), saved["prediction"])
    assert np.allclose(given.max(1), saved["probability"], atol=1e-5)
    alone = python("-c", WITH_TORCH, str(file), cwd=trained)
    assert alone.out == f"{result(here)['test_correct']}\n", alone.err


def test_safetensors_hold_the_weights_of_the_checkpoint_and_what_normalises(here: Path):
    call("--format", "safetensors", "a")
    file = here / "export/model.safetensors"
    assert_says_where_it_is_from(file, here)
    assert weights_sha256(safetensors.torch.load_file(file)) == result(here)["weights_sha256"]
    reported, pixels = metadata_of(file), torch.arange(784, dtype=torch.int32).remainder(256).to(torch.uint8).view(1, 28, 28)
    by_hand = (pixels.float() - float(reported["pixel_mean"])) / float(reported["pixel_std"])
    assert torch.allclose(by_hand.unsqueeze(1), data.normalise(pixels, data.DATA_SETS["mnist"]))


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize(
    "network", ["model.name=cnn_batchnorm", "model.target=helpers.networks.Tied"], ids=["batchnorm", "user"]
)
@pytest.mark.usefixtures("few")
def test_other_models_export_with_any_number_of_images(form: str, network: str, tmp_path: Path):
    run, weights = made(tmp_path / "m", network)
    call(run, "--format", form)
    file = run / "export" / FILES[form]
    assert metadata_of(file)["weights_sha256"] == weights_sha256(weights)
    classify = export.FORMATS[form].read(file, load_config([str(run / "config.yaml")]), data.DATA_SETS["mnist"])
    with torch.no_grad():
        for count in (1, 7, 0):
            assert classify(torch.zeros(count, 28, 28, dtype=torch.uint8)).shape == (count, 10)


@pytest.mark.parametrize("network", [*(f"model.name={name}" for name in MODELS), "model.target=helpers.networks.Tied"])
@pytest.mark.usefixtures("few")
def test_an_onnx_file_passes_the_full_check_and_takes_no_image_one_and_257(network: str, tmp_path: Path, splits: Splits):
    import onnx
    import onnxruntime

    run, _ = made(tmp_path / "m", network)
    call(run, "--format", "onnx")
    file = run / "export/model.onnx"
    onnx.checker.check_model(file, full_check=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    images = splits.test.images[:257].numpy()
    wanted = digitdist.load(run).probabilities(images)
    for count in (0, 1, 257):
        (found,) = session.run(None, {"images": images[:count]})
        assert (found.dtype, found.shape) == (np.float32, (count, 10))
        assert np.allclose(found, wanted[:count], atol=1e-5)


@pytest.mark.usefixtures("few")
def test_of_a_run_with_a_moving_average_that_is_exported(tmp_path: Path):
    run, average = made(tmp_path / "m", "optim.ema=0.9", ema=True)
    call(run, "--format", "safetensors")
    assert weights_sha256(safetensors.torch.load_file(run / "export/model.safetensors")) == weights_sha256(average)


@pytest.mark.usefixtures("few")
def test_a_run_from_another_machine_exports(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = (here / "config.yaml").read_text()
    shutil.copytree(here, tmp_path / "copied")
    (tmp_path / "a file").touch()
    elsewhere = settings.replace("  dir: runs", f"  dir: {tmp_path}/a file/runs").replace("resume: auto", "resume: /not/here")
    assert elsewhere.count(str(tmp_path)) == elsewhere.count("/not/here") == 1
    (tmp_path / "copied/config.yaml").write_text(elsewhere)
    monkeypatch.chdir(tmp_path)
    call("copied", "--format", "safetensors", f"data.root={tmp_path / 'unpacked'}")
    assert metadata_of(tmp_path / "copied/export/model.safetensors")["run"] == "copied"


@pytest.mark.parametrize("form", FILES)
@pytest.mark.usefixtures("few")
def test_a_file_that_predicts_otherwise_is_not_kept(form: str, here: Path, monkeypatch: pytest.MonkeyPatch):
    suffix, write, read = export.FORMATS[form]

    def wrong(classifier: formats.Classifier, metadata: formats.Metadata) -> bytes:
        with torch.no_grad():
            classifier.network.linear2.bias.add_(torch.arange(10.0))
        return write(classifier, metadata)

    monkeypatch.setitem(export.FORMATS, form, formats.Format(suffix, wrong, read))
    with pytest.raises(RuntimeError, match=r"predicts [\d,]+ of 1,010 test images differently"):
        call("a", "--format", form)
    assert list((here / "export").iterdir()) == []


@pytest.mark.usefixtures("few")
def test_a_failure_leaves_an_older_file_as_it_was(here: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    call("a", "--format", "safetensors")
    before = (here / "export/model.safetensors").read_bytes()
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match=r"model\.safetensors: No space left on device; make room"):
        call("a", "--format", "safetensors")
    assert {path.name: path.read_bytes() for path in (here / "export").iterdir()} == {"model.safetensors": before}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_a_model_that_no_graph_can_hold_is_refused_and_the_way_out_named(form: str, tmp_path: Path):
    run, _ = made(tmp_path / "m", "model.target=helpers.networks.Moody")
    with pytest.raises(UserError, match=r"--format safetensors takes any model.*data-dependent"):
        call(run, "--format", form)
    assert list((run / "export").iterdir()) == []
    call(run, "--format", "safetensors")


@pytest.mark.usefixtures("few")
def test_an_operation_that_onnx_does_not_know_is_named(tmp_path: Path):
    run, _ = made(tmp_path / "m", "model.target=helpers.networks.Bessel")
    with pytest.raises(UserError, match=r"--format torch may: .*bessel_j0"):
        call(run, "--format", "onnx")
    assert list((run / "export").iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_onnx_the_extra_is_named(missing: str, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"{missing}.*pip install 'digitdist\[export\]'"):
        call("a", "--format", "onnx")


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["a"], "required: --format"),
        (["a", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["b", "--format", "torch"], "no run of that folder or name"),
        (["a", "--format", "torch", "--checkpoint", "7"], "step-000000007"),
        (["a", "--format", "torch", "--checkpoint", "best"], "no best checkpoint"),
        (["a", "--format", "torch", "--output", "runs"], "--output runs: is a folder"),
        (["a", "--format", "torch", "--output", "runs/a/config.yaml/x"], "give a file in a folder"),
        (["a", "--format", "torch", "data.rot=x"], "did you mean 'data.root'"),
        (["a", "--format", "torch", "model.name=cnn_batchnorm"], "does not fit the model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("few", "here")
def test_a_mistake_is_reported_with_what_is_allowed(arguments: list[str], reported: str):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert reported in str(error.value)


def test_a_mistake_is_one_line_and_exit_code_2(trained: Path):
    done = python(*COMMAND, "a", "--format", "torch", "--checkpoint", "x", cwd=trained)
    assert (done.code, done.out) == (EXIT_USER_ERROR, "")
    assert done.errors == done.err.splitlines() == ["error: --checkpoint x is not allowed; it takes last, best or a step"]


def test_several_processes_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="one process"):
        call("a", "--format", "torch")
