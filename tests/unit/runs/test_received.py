"""A run that somebody has sent is data: no command executes what it names, writes where it says, or waits for what it holds."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from digitdist import checkpoint
from digitdist.checkpoint import Checkpoint
from digitdist.config import DataConfig, dump_config, load_config, read_stored_config
from digitdist.data import DATA_SETS, Splits
from digitdist.errors import UserError
from digitdist.evaluate import Evaluation, save_predictions
from digitdist.models import build_model
from digitdist.report.record import read_record
from digitdist.runs import load_run, mark_run, origin

MNIST = DATA_SETS["mnist"]
EXECUTING = ("evaluate", "export", "predict")
HARMLESS = ("report", "verify")
EVIL = {
    "a command": "model: {target: os.system, args: {command: touch executed}}",
    "a process": "model: {target: subprocess.Popen, args: {args: [touch, executed]}}",
    "code": 'model: {target: builtins.exec, args: {source: \'open("executed", "w")\'}}',
    "a module": "model: {target: evil.Net}",
    "a module of data": "data: {target: evil.Data, args: {file: executed}}",
    "both": "{model: {target: evil.Net}, data: {target: evil.Data}}",
    "a tag": "model: !!python/object/apply:os.system [touch executed]",
}
MODULE = """
open("executed", "w").close()
from torch import nn
class Net(nn.Linear):
    def __init__(self): super().__init__(784, 10)
    def forward(self, images): return super().forward(images.flatten(1))
class Factory:
    def __call__(self): raise SystemExit("called")
make = Factory()
"""


class Place:
    """A folder to work in, which has a run that somebody has sent, `theirs`, and a file of one's own, `mine`."""

    def __init__(self, folder: Path, splits: Splits):
        self.folder, self.theirs, self.mine = folder, folder / "theirs", folder / "mine"
        self.theirs.mkdir()
        self.mine.write_text("mine")
        (folder / "evil.py").write_text(MODULE)
        Image.fromarray(splits.test.images[0].numpy()).save(folder / "digit.png")
        config = load_config((), ["data.root=/proc/elsewhere"])
        (self.theirs / "config.yaml").write_bytes(dump_config(config))
        (self.theirs / "data_set.json").write_text(MNIST.to_json())
        weights = build_model(config.model, 0, MNIST).state_dict()
        checkpoint.write(self.theirs / "checkpoints", Checkpoint({"model": weights}, {"step": 5, "best": None}), keep=1)
        label = splits.test.labels[:50].numpy()
        half = np.full(50, 0.5)
        save_predictions(
            Evaluation(np.arange(50), label, (label + 1) % 10, half, half, num_classes=10), self.theirs / "predictions.npz"
        )
        (self.theirs / "result.json").write_text(json.dumps(RESULT))
        (self.theirs / "metrics.jsonl").write_text(json.dumps({"step": 5, "epoch": 0.1, "time": 1.0, "train/loss": 2.0}) + "\n")
        start = {"step": 0, "world_size": 1, "wandb_id": "abcd1234"}
        (self.theirs / "environment.json").write_text(json.dumps({"starts": [start]}))

    def outside(self) -> dict[str, object]:
        """What lies outside of the run's folder."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in self.folder.rglob("*")
            if self.theirs not in (path, *path.parents) and not path.is_relative_to(self.folder / "__pycache__")
        }

    def call(self, command: str, *options: str) -> None:
        """A command on that run, in this process."""
        arguments = {"export": ["--format", "safetensors"], "predict": ["digit.png"]}.get(command, [])
        before, sys.argv = sys.argv, [command, *(["verify"] if command == "verify" else []), "theirs", *arguments, *options]
        module = "digitdist.checkpoint" if command == "verify" else f"digitdist.{command}.__main__"
        try:
            code: object = importlib.import_module(module).main()
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv = before
        assert not code


RESULT: dict[str, object] = {
    **dict.fromkeys(("test_correct", "test_loss", "train_seconds", "images_per_second", "epochs"), 0),
    **dict.fromkeys(("test_total", "steps", "world_size"), 50),
    **dict.fromkeys(("device", "precision", "weights_sha256"), "cpu"),
}


@pytest.fixture
def place(tmp_path: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return Place(tmp_path, splits)


@pytest.mark.parametrize("command", EXECUTING)
@pytest.mark.parametrize("kind", EVIL)
def test_nothing_that_a_received_run_names_is_executed_and_one_line_says_what_would_be(place: Place, kind: str, command: str):
    (place.theirs / "config.yaml").write_text(EVIL[kind])
    before = place.outside()
    if (kind, command) == ("a module of data", "predict"):  # which needs no data
        place.call(command)
    else:
        with pytest.raises(UserError) as error:
            place.call(command)
        text = str(error.value)
        named = ("os.system", "subprocess.Popen", "builtins.exec", "evil.Net", "evil.Data")
        names = [name for name in named if name in EVIL[kind]]
        assert kind == "a tag" or any(f"target={name}" in text for name in names), text
        assert kind == "a tag" or "trust=true" in text or "data.args yourself" in text
        assert len(text.splitlines()) == len(error.value.mistakes) <= 2
    assert place.outside() == before
    assert "evil" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize("command", HARMLESS)
@pytest.mark.parametrize("kind", EVIL)
def test_report_and_verify_execute_nothing_and_write_nothing_elsewhere(place: Place, kind: str, command: str):
    (place.theirs / "config.yaml").write_text(EVIL[kind])
    before = place.outside()
    place.call(command)
    assert place.outside() == before
    assert "evil" not in sys.modules


@pytest.mark.parametrize("target", ["os.system", "evil.make", "evil.nn", "collections.OrderedDict", "torch.nn.functional.relu"])
def test_even_a_run_that_is_trusted_is_no_way_to_call_what_is_no_network(place: Place, target: str):
    (place.theirs / "config.yaml").write_text(f"model: {{target: {target}, args: {{command: touch called}}}}")
    with pytest.raises(UserError, match=r"must be a subclass of torch\.nn\.Module"):
        place.call("predict", "trust=true")
    assert not (place.folder / "called").exists()


def test_a_network_of_a_run_that_is_trusted_is_executed_and_said(place: Place, capsys: pytest.CaptureFixture[str]):
    (place.theirs / "config.yaml").write_text(EVIL["a module"])
    weights = nn.Linear(784, 10).state_dict()
    checkpoint.write(place.theirs / "checkpoints", Checkpoint({"model": weights}, {"step": 7, "best": None}), keep=1)
    place.call("predict", "trust=true")
    out, err = capsys.readouterr()
    assert out.startswith("digit.png: ")
    assert len(err.splitlines()) == 1
    assert "model.target=evil.Net with model.args={}" in err
    with pytest.raises(UserError, match="trust=yes is not allowed; trust takes true or false"):
        place.call("predict", "trust=yes")


def test_what_the_command_line_names_is_this_users_word(place: Place):
    (place.theirs / "config.yaml").write_text(
        "{model: {target: evil.Net}, data: {target: evil.Data, args: {file: x}, root: there}}"
    )
    run = load_run("theirs", ["model.target=mine.Net", "data.target=mine.Data", "data.args.path=here", "data.root=data"])
    assert (run.config.model.target, run.config.data.target) == ("mine.Net", "mine.Data")
    assert run.config.data.args == {"path": "here"}
    assert run.config.data.root == "data"
    assert not run.made_here


@pytest.mark.slow
def test_no_variable_of_the_environment_gets_into_what_is_made_of_a_received_run(
    place: Place, splits: Splits, monkeypatch: pytest.MonkeyPatch
):
    roots: list[str] = []

    def few(data: DataConfig, seed: int) -> Splits:
        roots.append(data.root)
        return Splits(splits.train, splits.validation, splits.test.subset(torch.arange(50)), splits.info)

    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setattr("digitdist.export.parity.load_splits", few)
    config = (place.theirs / "config.yaml").read_text().replace("project: digitdist", "project: ${oc.env:SECRET}")
    (place.theirs / "config.yaml").write_text(config)
    place.call("report")
    place.call("export")
    made = b"".join(path.read_bytes() for path in place.theirs.rglob("*") if path.is_file())
    assert b"hunter2" not in made
    assert b"${oc.env:SECRET}" in (place.theirs / "report.html").read_bytes()
    assert (place.theirs / "export/model.safetensors").is_file()
    assert roots == ["data"], "the default, not the run's /proc/elsewhere"


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["FIFO", "socket", "folder", "link", "a link to a device", "huge"])
def test_only_plain_files_of_a_received_run_are_read(place: Place, kind: str):
    names = ("metrics.jsonl", "result.json", "predictions.npz", "environment.json", "data_set.json", ".origin")
    manifest = next((place.theirs / "checkpoints").glob("step-*")) / "manifest.json"
    for path in [*(place.theirs / name for name in names), manifest]:
        path.unlink(missing_ok=True)
        replace_by(kind, path, place.mine)
    if kind == "FIFO":
        place.call("report")
    notes = read_record(place.theirs).notes
    assert all(any(note.startswith(f"{name} is damaged and left out") for note in notes) for name in names[:5]), notes
    with pytest.raises(UserError, match=r"data_set\.json is damaged"):
        place.call("predict")
    before = place.outside()
    sys.argv = ["checkpoint", "verify", "theirs"]
    with pytest.raises(SystemExit, match="1"):
        checkpoint.main()
    assert place.outside() == before


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["FIFO", "socket", "link", "a link to a device", "huge"])
def test_a_configuration_that_is_no_plain_file_is_not_waited_for(place: Place, kind: str):
    (place.theirs / "config.yaml").unlink()
    replace_by(kind, place.theirs / "config.yaml", place.mine)
    for command in EXECUTING:
        with pytest.raises(UserError, match=r"config\.yaml"):
            place.call(command)
    assert not read_record(place.theirs).config


def replace_by(kind: str, path: Path, mine: Path) -> None:
    match kind:
        case "FIFO":
            os.mkfifo(path)
        case "socket":
            here = os.getcwd()
            os.chdir(path.parent)  # an address has at most 108 bytes
            socket.socket(socket.AF_UNIX).bind(path.name)
            os.chdir(here)
        case "folder":
            path.mkdir()
        case "huge":
            with path.open("wb") as file:
                file.truncate(2**40)
        case _:
            path.symlink_to(mine if kind == "link" else "/dev/zero")


@pytest.mark.slow
def test_no_link_in_a_received_run_is_written_through(place: Place, splits: Splits, monkeypatch: pytest.MonkeyPatch):
    names = (".report.html.tmp", "report.html", "plots/curves.png", "plots/.curves.png.tmp", "export/model.safetensors")
    for name in (*names, "export/.model.safetensors.tmp"):
        (place.theirs / name).parent.mkdir(exist_ok=True)
        (place.theirs / name).symlink_to(place.mine)
    short = Splits(splits.train, splits.validation, splits.test.subset(torch.arange(50)), splits.info)
    monkeypatch.setattr("digitdist.export.parity.load_splits", lambda *_: short)
    place.call("report")
    place.call("export")
    assert place.mine.read_text() == "mine"
    assert not any((place.theirs / name).is_symlink() for name in names if not name.endswith(".tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "command"), [("plots", "report"), ("export", "export")])
def test_a_folder_of_a_received_run_that_is_a_link_is_not_written_into(place: Place, name: str, command: str):
    (place.folder / "elsewhere").mkdir()
    (place.theirs / name).symlink_to(place.folder / "elsewhere")
    with pytest.raises(UserError, match="is a link out of the run's folder"):
        place.call(command)
    assert not [*(place.folder / "elsewhere").iterdir()]


def test_predictions_that_unpack_to_more_than_is_allowed_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("digitdist.evaluate.result.MAX_UNPACKED", 3 * 2**20)
    with zipfile.ZipFile(place.theirs / "predictions.npz", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in ("index", "label", "prediction", "probability"):
            packed.writestr(f"{name}.npy", bytes(2**20))
    assert (place.theirs / "predictions.npz").stat().st_size < 2**14
    (note,) = read_record(place.theirs).notes
    assert "it holds more than 3 MiB" in note


def test_a_run_that_this_user_has_made_is_known_wherever_it_lies_and_by_what_it_would_execute(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    (place.theirs / "config.yaml").write_text("{model: {target: evil.Net}, data: {root: digits, name: folder}}")
    mark_run(place.theirs)
    moved = place.theirs.rename(place.folder / "moved")
    run = load_run("moved", [])
    assert (run.made_here, run.config.data.root) == (True, "digits")
    secret = Path(os.environ["XDG_STATE_HOME"]) / "digitdist/secret"
    assert (secret.stat().st_mode & 0o777, secret.stat().st_size) == (0o600, 32)

    (moved / "config.yaml").write_text("{model: {target: evil.Net, args: {x: 1}}, data: {root: digits, name: folder}}")
    with pytest.raises(UserError, match=r"would execute model\.target=evil\.Net"):
        load_run("moved", [])
    (moved / "config.yaml").write_text("{model: {target: evil.Net}, data: {root: digits, name: folder}}")
    monkeypatch.setenv("XDG_STATE_HOME", str(place.folder / "another user"))
    with pytest.raises(UserError, match=r"would execute model\.target=evil\.Net"):
        load_run("moved", [])
    assert not (place.folder / "another user").exists()
    assert load_run("moved", ["trust=true"]).config.data.root == "data", "trust is about the network alone"


@pytest.mark.parametrize("secret", [b"", b"short", None])
def test_a_mark_under_a_damaged_secret_is_none(place: Place, monkeypatch: pytest.MonkeyPatch, secret: bytes | None):
    state = place.folder / "state/digitdist"
    monkeypatch.setenv("XDG_STATE_HOME", str(state.parent))
    config, _ = read_stored_config(place.theirs / "config.yaml")
    (place.theirs / ".origin").write_text(origin._mark(secret or b"", config))
    if secret is not None:
        state.mkdir(parents=True)
        (state / "secret").write_bytes(secret)
    assert not origin.made_here(place.theirs, config)
    mark_run(place.theirs)
    assert origin.made_here(place.theirs, config)


def test_where_the_state_folder_cannot_be_written_that_is_said_and_the_run_asked_for(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_STATE_HOME", str(place.mine))
    (place.theirs / "config.yaml").write_text("model: {target: evil.Net}")
    mark_run(place.theirs)
    assert "trust=true" in capsys.readouterr().out
    with pytest.raises(UserError, match="trust=true"):
        load_run("theirs", [])
    (place.theirs / "config.yaml").write_text("seed: 1")
    mark_run(place.theirs)
    assert capsys.readouterr().out == "", "such a run needs no mark"


@pytest.mark.parametrize(
    ("state", "configured", "trained", "on_cpu"),
    [
        ("bf16", "auto", "bf16", "bf16"),
        ("fp16", "auto", "fp16", "fp32"),
        (None, "fp16", "fp16", "fp32"),
        (None, "auto", "fp32", "fp32"),
        (["x"], "no", "fp32", "fp32"),
    ],
)
def test_what_is_computed_with_a_run_is_in_its_precision_where_the_device_has_it(
    place: Place, state: object, configured: str, trained: str, on_cpu: str
):
    (place.theirs / "config.yaml").write_text(f"train: {{precision: {configured}}}")
    run, stored = load_run("theirs", []), Checkpoint({}, {"step": 5, "precision": state})
    assert (run.trained_precision(stored), run.precision(stored, "cpu")) == (trained, on_cpu)
