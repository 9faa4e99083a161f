"""`digitdist.load`: what it takes, what it gives, and that nothing that came with weights is executed."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.launching import python
from helpers.stored_runs import made_folder, made_run
from PIL import Image
from torch import nn

import digitdist
from digitdist.data import DATA_SETS, Splits
from digitdist.errors import UserError
from digitdist.predict import predict
from digitdist.runs import load_run

MNIST = DATA_SETS["mnist"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_run(tmp_path / "runs/a", "model.name=cnn_batchnorm")


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    return made_folder(run, tmp_path / "passed-on")


def network_of(run: Path) -> nn.Module:
    stored = load_run(str(run), [])
    return stored.model(stored.checkpoint("last")).eval()


def test_a_run_and_the_folder_made_of_it_predict_as_the_network_does(run: Path, folder: Path, splits: Splits):
    images = splits.test.images[:300]
    wanted = predict(network_of(run), images[:125], MNIST).numpy()
    for source in (run, str(folder)):
        model = digitdist.load(source)
        found = model.probabilities(images)
        assert (found.dtype, found.shape) == (np.float32, (300, 10))
        assert found[:125].tobytes() == wanted.tobytes()
        predicted = model.predict(images)
        assert (predicted.dtype, predicted.shape) == (np.int64, (300,))
        assert np.array_equal(predicted, found.argmax(1))
        assert model.classes == tuple("0123456789")
    assert digitdist.load(run).card is None
    assert digitdist.load(folder).card == "# A card\n"


def test_a_run_is_found_by_its_name(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run.parents[1])
    assert digitdist.load("a").classes == MNIST.classes
    for step in ("5", 5):
        assert digitdist.load("a", checkpoint=step).classes == MNIST.classes


def test_one_image_may_be_had_in_any_form(run: Path, splits: Splits, tmp_path: Path):
    model, image = digitdist.load(run), splits.test.images[3]
    wanted = model.probabilities(image[None])
    Image.fromarray(image.numpy()).save(tmp_path / "digit.png")
    forms = [
        image,
        image.numpy(),
        image[None].numpy(),
        Image.fromarray(image.numpy()),
        [Image.fromarray(255 - image.numpy())],
        tmp_path / "digit.png",
        str(tmp_path / "digit.png"),
        [image],
    ]
    for form in forms:
        assert model.probabilities(form).tobytes() == wanted.tobytes(), type(form)
    mixed = model.probabilities([tmp_path / "digit.png", image.numpy(), Image.fromarray(image.numpy()), splits.test.images[:2]])
    assert np.allclose(mixed[:3], wanted, atol=1e-6)
    assert len(mixed) == 5
    assert model.probabilities([]).shape == model.probabilities(splits.test.images[:0]).shape == (0, 10)
    assert model.predict([]).shape == (0,)
    assert model.predict(part for part in (image, image)).shape == (2,)
    backwards = np.ascontiguousarray(image.numpy()[::-1])[::-1]
    assert model.probabilities(backwards).tobytes() == wanted.tobytes(), "an array that goes backwards in memory"
    fixed = image.numpy().copy()
    fixed.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.probabilities(fixed).tobytes() == wanted.tobytes(), "an array that must not be written to"


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.zeros((2, 28, 28), np.float32), "images of float32 and shape (2, 28, 28) are not allowed; give uint8 [n, 28, 28]"),
        (np.zeros((27, 28), np.uint8), "images of uint8 and shape (27, 28) are not allowed"),
        (torch.zeros(3, 1, 28, 28, dtype=torch.uint8), "shape (3, 1, 28, 28) are not allowed"),
        ("gone.png", "gone.png: it cannot be read: No such file or directory"),
        (Image.new("L", (40, 40)), "a PIL image: "),
        (Image.new("L", (0, 0)), "a PIL image of 0×0 pixels is not allowed, since it is empty; give one with pixels"),
        ([7], "an image of type int is not allowed; give a uint8 array, a PIL image, a file's name, or a list of these"),
        (None, "an image of type NoneType is not allowed; give"),
        (3, "an image of type int is not allowed; give"),
        (b"\x89PNG", "an image of type bytes is not allowed; give"),
        (io.BytesIO(b"x"), "an image of type BytesIO is not allowed; give"),
        ({"a.png": 1}, "an image of type dict is not allowed; give"),
        (".", ".: there is no image file in this folder"),
    ],
)
def test_what_is_no_image_is_told_in_a_line(run: Path, images: object, reason: str):
    with pytest.raises(UserError) as told:
        digitdist.load(run).predict(images)
    assert reason in str(told.value)
    assert "\n" not in str(told.value)


def test_the_generators_of_the_program_stay_as_they_are(run: Path, folder: Path):
    for source in (run, folder):
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        wanted = torch.rand(1), random.random(), np.random.rand()
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        digitdist.load(source)
        assert (torch.rand(1), random.random(), np.random.rand()) == wanted


def test_a_folder_says_how_to_normalise_in_the_names_that_others_use(folder: Path):
    preprocessor, config = (json.loads((folder / name).read_text()) for name in ("preprocessor_config.json", "config.json"))
    assert preprocessor["image_mean"] == [0.1307]
    assert preprocessor["image_std"] == [0.3081]
    assert preprocessor["size"] == {"height": 28, "width": 28}
    assert config["id2label"]["7"] == "7"
    assert config["model"] == {"name": "cnn_batchnorm", "target": None, "args": {}}


def test_code_that_a_folder_or_a_run_names_is_executed_with_trust_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sentnet.py").write_text(
        "import pathlib, torch\n"
        f"pathlib.Path({str(tmp_path / 'executed')!r}).touch()\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self): super().__init__(784, 10)\n"
        "    def forward(self, images): return super().forward(images.flatten(1))\n"
        "def function(): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = made_run(tmp_path / "runs/a", "model.target=sentnet.Net")
    folder = made_folder(run, tmp_path / "sent")
    (run / ".origin").unlink()  # as if somebody else had made it
    del sys.modules["sentnet"]
    (tmp_path / "executed").unlink()
    for source in (folder, run):
        with pytest.raises(UserError, match=r"would execute\s+model.target=sentnet.Net"):
            digitdist.load(source)
    assert not (tmp_path / "executed").exists()
    for source in (folder, run):
        assert digitdist.load(source, trust=True).probabilities(np.zeros((2, 28, 28), np.uint8)).shape == (2, 10)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["target"] = "sentnet.function"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"must be a subclass of torch.nn.Module"):
        digitdist.load(folder, trust=True)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\x00", b"[" * 100_000, b"null", None])
def test_a_damaged_folder_is_an_error_in_one_line(folder: Path, file: str, content: bytes | None):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(UserError) as told:
        digitdist.load(folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "model", {"name": "cnn", "target": 7, "args": {}}),
        ("config.json", "model", {"name": "nothing", "target": None, "args": {}}),
        ("config.json", "model", {"name": "cnn_batchnorm", "target": None, "args": {"width": "wide"}}),
        ("config.json", "model", {"name": "cnn", "target": None, "args": {}}),  # whose weights these are not
        ("config.json", "id2label", {"0": "a", "2": "b"}),
        ("config.json", "id2label", {str(number): 7 for number in range(10)}),
        ("preprocessor_config.json", "image_std", [0]),
        ("preprocessor_config.json", "image_mean", 0.5),
        ("preprocessor_config.json", "size", {"height": 10**9, "width": 28}),
        ("preprocessor_config.json", "digitdist_image", "download"),
    ],
)
def test_a_folder_that_somebody_has_changed_is_an_error_in_one_line(folder: Path, file: str, key: str, value: object):
    changed = json.loads((folder / file).read_text()) | {key: value}
    (folder / file).write_text(json.dumps(changed))
    with pytest.raises(UserError) as told:
        digitdist.load(folder)
    assert "\n" not in str(told.value)


def test_a_link_in_a_folder_is_not_followed(folder: Path, tmp_path: Path):
    (folder / "README.md").unlink()
    (tmp_path / "secret").write_text("mine")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"README\.md: is a link"):
        digitdist.load(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensor: torch.full_like(tensor, torch.nan), "holds NaN or infinity"),
        (lambda tensor: torch.full_like(tensor, torch.inf), "holds NaN or infinity"),
        (lambda tensor: tensor.double() + 1e300, "holds NaN or infinity"),
        (lambda tensor: tensor.to(torch.complex64), "is complex, and the network's is not"),
    ],
    ids=["nan", "inf", "overflow", "complex"],
)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_weights_that_are_not_finite_or_not_real_are_damage(
    folder: Path, change: Callable[[torch.Tensor], torch.Tensor], reason: str
):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(iter(dict(network_of(folder.parent / "runs/a").named_parameters())))
    safetensors.torch.save_file(tensors | {name: change(tensors[name])}, folder / "model.safetensors")
    with pytest.raises(UserError) as told:
        digitdist.load(folder)
    assert str(told.value) == f"{folder} is damaged: {name} {reason}; export a good checkpoint"


def test_a_folder_without_a_card_loads(folder: Path):
    (folder / "README.md").unlink()
    model = digitdist.load(folder)
    assert model.card is None
    assert model.predict(np.zeros((2, 28, 28), np.uint8)).shape == (2,)


def test_of_a_study_or_a_grid_it_is_said_what_to_name_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("alpha/seed-0", "alpha/seed-1", "grid/lr/seed-0"):
        made_run(Path("runs") / name)
    with pytest.raises(UserError, match="a study of 2 runs, not a run; name one of them, such as runs/alpha/seed-0"):
        digitdist.load("alpha")
    with pytest.raises(UserError, match="a grid of 1 studies; name one of them, such as runs/grid/lr"):
        digitdist.load("grid")
    assert digitdist.load("alpha/seed-1").classes == MNIST.classes


@pytest.mark.parametrize("place", ["runs/alpha", "alpha"])
def test_a_name_that_begins_with_a_folders_is_not_asked_of_the_hub(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # to import it would be an error
    Path(place).mkdir(parents=True)
    with pytest.raises(UserError) as told:
        digitdist.load("alpha/seed-9")
    wanted = f"alpha/seed-9: no model there, and the Hub is not asked for what would be in the folder {place}; give a run,"
    assert str(told.value).startswith(wanted)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("source", ["no such thing", "gone/", "a/b/c", "/gone", "~nobody/x", "", "x" * 5000])
def test_what_is_no_model_is_told_in_a_line_and_not_asked_of_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # to import it would be an error
    with pytest.raises(UserError, match="no model there; give a run"):
        digitdist.load(source)


def test_to_import_the_package_imports_nothing_slow(tmp_path: Path):
    code = "import sys, digitdist; digitdist.load; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "PIL", "huggingface_hub", "yaml"} & set(modules)


@pytest.mark.slow
def test_the_lines_of_the_readme_work_as_they_stand(place: Path, splits: Splits):
    """In a program of its own, with the run and the files that they name."""
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    start = readme.index("    import digitdist\n")
    lines = [line[4:] for line in readme[start:].splitlines()[: readme[start:].splitlines().index("")]]
    assert len(lines) == 5
    made_run(place / "runs/quick")
    for name in ("one.png", "two.png"):
        Image.fromarray(splits.test.images[0].numpy()).save(place / name)
    done = python("-c", "\n".join(["images = __import__('numpy').zeros((3, 28, 28), 'uint8')", *lines]), cwd=place)
    assert (done.code, done.err) == (0, "")
