"""``--format card``: a folder for the Hugging Face Hub, what its card says, and what is sent."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers.hub_server import COMMIT, TOKEN, HubServer
from helpers.launching import QUIET, accelerate, python
from helpers.runs import result
from helpers.stored_runs import made, made_run
from huggingface_hub import ModelCard

import digitdist
from digitdist.config import load_config
from digitdist.data import DataSetInfo, Splits
from digitdist.errors import EXIT_USER_ERROR, UserError
from digitdist.evaluate import wilson_interval
from digitdist.export import card, card_folder
from digitdist.export.__main__ import main
from digitdist.loading import CARD_FILES
from digitdist.runs import StoredRun, load_run
from digitdist.runs.attempts import write_attempts

FILES = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.fixture
def few(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> Splits:
    """A short test set, for what does not hang on its length."""
    short = Splits(splits.train, splits.validation, splits.test.subset(torch.arange(200)), splits.info)
    monkeypatch.setattr(card_folder, "load_splits", lambda *_: short)
    return short


@pytest.fixture
def run(few: Splits, tmp_path: Path) -> Path:
    """A run of random weights."""
    return made_run(tmp_path / "runs/a", "model.name=cnn_batchnorm")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A stand-in for the Hub, and a token for it."""
    server = HubServer()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


def call(*arguments: object) -> None:
    """The command in this process."""
    before, sys.argv = sys.argv, ["export", *map(str, arguments), "--format", "card"]
    try:
        main()
    finally:
        sys.argv = before


def command_in(text: str) -> list[str]:
    """The command line that a card gives."""
    (line,) = re.findall(r"^    (accelerate launch .*)$", text, re.MULTILINE)
    return shlex.split(line)


def test_the_metadata_are_the_hubs_and_hold_the_count_with_its_interval(run: Path, few: Splits):
    call(run)
    folder = run / "export/card"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    told = ModelCard.load(folder / "README.md")
    correct = int((digitdist.load(folder).predict(few.test.images) == few.test.labels.numpy()).sum())
    assert (told.data.license, told.data.library_name, told.data.datasets) == ("mit", "digitdist", ["ylecun/mnist"])
    assert (told.data.model_name, told.data.pipeline_tag, told.data.metrics) == ("a", "image-classification", ["accuracy"])
    (accuracy,) = told.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_split) == ("accuracy", correct / 200, "test")
    assert accuracy.metric_args == {"correct": correct, "total": 200, "interval_95": [*wilson_interval(correct, 200)]}
    assert huggingface_hub.metadata_load(folder / "README.md")["model-index"][0]["name"] == "a"
    for heading in ("Use", "Accuracy", "Calibration", "Confusion", "How it was trained", "What it must not be used for"):
        assert f"\n## {heading}\n" in told.text


def test_the_tables_of_a_card_are_those_of_the_predictions(run: Path, few: Splits):
    call(run)
    model = digitdist.load(run / "export/card")
    predicted, labels = model.predict(few.test.images), few.test.labels.numpy()
    matrix = model.card[model.card.index("All of them") :].split("\n\n")[1].splitlines()[2:]
    rows = [
        [int(cell.replace(",", "") or 0) for cell in row.split(" | ")[1:]] for row in (r.removesuffix(" |") for r in matrix)
    ]
    assert rows == [[int(((labels == a) & (predicted == b)).sum()) for b in range(10)] for a in range(10)]
    pairs = model.card[model.card.index("## Confusion") :].split("\n\n")[1].splitlines()[2:]
    assert len(pairs) == 10
    for pair in pairs:
        label, other, count = (int(cell) for cell in pair.strip("| ").split(" | "))
        assert label != other
        assert rows[label][other] == count
    bins = model.card[model.card.index("## Calibration") :].split("\n\n")[2].splitlines()[2:]
    assert sum(int(row.split(" | ")[1]) for row in bins) == 200


def card_of(run: Path) -> str:
    """The text of a run's card, with made up results."""
    loaded = load_run(str(run), [])
    stored, predicted = loaded.checkpoint("last"), np.zeros(5, np.int64)
    told = card.Evaluation(np.arange(5), predicted, predicted, np.ones(5), np.zeros(5), num_classes=loaded.info.num_classes)
    return card.card_text(loaded, stored, loaded.model(stored), told, "mit")


def attempt(**values: object) -> dict[str, object]:
    told = {"device": "cpu", "device_name": "Old [CPU]", "torch": "9.8.7", "digitdist": "0.0.9", "threads": 1}
    return {"step": 0, "world_size": 1, "wandb_id": "x"} | told | values


def test_a_card_tells_what_trained_the_weights_and_its_command_asks_for_as_many_threads(run: Path):
    assert not re.search(r"threads [0-9]|by torch|train\.threads", card_of(run)), "an attempt that has left no record"
    write_attempts(run, [attempt(threads=3), attempt(step=5, threads=7)])  # the second has gone on from these weights
    text = card_of(run)
    body = text.replace("\\", "").replace("\n", " ")
    assert "on 1 process, threads 3 a process, on cpu (Old [CPU]), by torch 9.8.7, with seed 0." in body
    assert "by digitdist 0.0.9" in body
    assert "Earlier attempts" not in body
    assert "train.threads=3" in command_in(text)
    write_attempts(run, [attempt(threads=2), attempt(step=3, threads=4)])
    assert "Earlier attempts of the training ran on something else" in card_of(run)
    assert "train.threads=4" in command_in(card_of(run))


@pytest.mark.parametrize("threads", [None, "2", 0, 10**9, True])
def test_where_no_attempt_tells_the_threads_those_of_the_configuration_count(threads: object, tmp_path: Path):
    run = made_run(tmp_path / "runs/a", "train.threads=2")
    write_attempts(run, [attempt(threads=threads, device=7, torch=None)])
    assert "train.threads=2" in command_in(card_of(run))
    assert "by torch" not in card_of(run)


def test_a_run_of_a_study_is_called_by_the_study_and_its_seed(tmp_path: Path):
    text = card_of(made_run(tmp_path / "runs/alpha/seed-0"))
    assert "\n# alpha seed\\-0\n" in text
    assert "name: alpha seed-0\n" in text
    assert "\n# seed\\-copy\n" in card_of(made_run(tmp_path / "runs/alpha/seed-copy"))


def test_digits_are_named_where_the_classes_are_digits_alone(run: Path, tmp_path: Path):
    colours = DataSetInfo("folder", (0.5,), (0.5,), ("red", "green", "blue"))
    other = card_of(made(tmp_path / "runs/b", info=colours)[0])
    assert not re.search(r"digit\b|digits|writers", other)
    assert "It takes one object a picture" in other
    for word in ("- digits\n", '"digit.png"', "one digit a picture", "Of other writers"):
        assert word in card_of(run)


@pytest.mark.usefixtures("few")
def test_the_printed_line_loads_the_folder_also_where_it_needs_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = made_run(tmp_path / "runs/a", "model.target=helpers.networks.Tied")
    call(run)
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("to load it: ")
    assert eval(line).classes == DataSetInfo("", (), ()).classes
    assert 'digitdist.load("FOLDER or USER/NAME", trust=True)' in digitdist.load(run / "export/card", trust=True).card


def test_weights_that_are_not_finite_are_not_exported(run: Path, monkeypatch: pytest.MonkeyPatch):
    as_it_is = StoredRun.model

    def spoilt(*arguments: object) -> torch.nn.Module:
        network = as_it_is(*arguments)
        next(network.parameters()).data.view(-1)[0] = torch.nan
        return network

    monkeypatch.setattr(StoredRun, "model", spoilt)
    with pytest.raises(UserError, match=rf"{run} is damaged: \S+ holds NaN or infinity; export a good checkpoint"):
        call(run)


@pytest.mark.usefixtures("few")
def test_a_card_is_written_anew_and_other_files_are_left_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "new/card"
    call(run, "--output", folder)
    before = (folder / "config.json").read_bytes()
    (folder / "config.json").write_text("{}")
    call(run, "--output", folder, "--license", "apache-2.0")
    assert (folder / "config.json").read_bytes() == before
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"
    assert f"digitdist.load({str(folder)!r})" in capsys.readouterr().out
    (folder / "mine.txt").touch()
    with pytest.raises(UserError, match=r"holds other files than a card's \(mine.txt\)"):
        call(run, "--output", folder)
    assert [path.name for path in folder.parent.iterdir()] == ["card"]


def test_a_folder_that_predicts_otherwise_is_not_kept(run: Path, monkeypatch: pytest.MonkeyPatch):
    as_it_is = card_folder.card_content

    def wrong(*arguments: object) -> dict[str, bytes]:
        content = as_it_is(*arguments)
        preprocessor = json.loads(content["preprocessor_config.json"]) | {"image_mean": [0.9]}
        return content | {"preprocessor_config.json": json.dumps(preprocessor).encode()}

    monkeypatch.setattr(card_folder, "card_content", wrong)
    with pytest.raises(RuntimeError, match="test images differently"):
        call(run)
    assert [*(run / "export").iterdir()] == []


EVIL = "a|b`](http://evil) <img src=x> *_~#\x1b[1m\u2028 {{ 7*7 }} @you www.evil.com"


def test_what_a_received_run_holds_is_escaped(tmp_path: Path, few: Splits, monkeypatch: pytest.MonkeyPatch):
    run = made_run(tmp_path / "runs/[x](y) `z`", "train.epochs=3")
    info = DataSetInfo(EVIL, (0.1307,), (0.3081,), (EVIL, *"123456789"))
    (run / "data_set.json").write_text(info.to_json())
    (run / ".origin").unlink()
    call(run)
    told = ModelCard.load(run / "export/card/README.md")
    (accuracy,) = told.data.eval_results
    assert "a|b`](http://evil) <img src=x>" in accuracy.dataset_name
    assert told.data.model_name == "[x](y) `z`"
    body = told.text.replace("\\\\", "")
    prose = "\n".join(line for line in body.splitlines() if not line.startswith("    "))
    for sign in ("](", "<", "`z", "|b", "{{", "@you", "www.", "*_", "\x1b", "\u2028"):
        place = prose.find(sign)
        while place >= 0:
            assert prose[place - 1] == "\\", (sign, prose[place - 20 : place + 20])
            place = prose.find(sign, place + 1)
    assert digitdist.load(run / "export/card").classes == info.classes


def test_a_run_that_began_elsewhere_or_on_several_processes_says_so(run: Path):
    loaded = load_run(str(run), [])
    stored = loaded.checkpoint("last")
    predicted = np.zeros(5, np.int64)
    told = card.Evaluation(np.arange(5), predicted, predicted, np.ones(5), np.zeros(5), num_classes=10)
    stored.state.update({"world_size": 3, "config": {"checkpoint.resume": "/a/folder"}})
    text = card.card_text(loaded, stored, loaded.model(stored), told, "mit")
    assert "began from a checkpoint of another run" in text
    assert command_in(text)[:6] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "3", "-m"]
    assert "No test image is taken for another class." in text
    for world_size in (-1, 10**9, "7", None):
        stored.state["world_size"] = world_size
        assert command_in(card.card_text(loaded, stored, loaded.model(stored), told, "mit"))[2] == "-m"


def test_the_command_of_a_card_is_one_line_that_a_shell_takes_as_it_is_meant(run: Path):
    loaded = load_run(str(run), [])
    stored = loaded.checkpoint("last")
    meant = ("model.name=convnet", "model.args={note: '$(touch x); `y` | <b> ## ~', channels: [8, 16]}", "train.patience=3")
    config = load_config((), [*meant, "data.validation=9", "train.epochs=7", "tracking.notes=mine", "run.name=b"])
    told = command_in(f"    {card._command(dataclasses.replace(loaded, config=config), stored, None)}\n")
    assert told[:4] == ["accelerate", "launch", "-m", "digitdist.train"]
    again = load_config((), told[4:])
    wanted = load_config((), [*meant, "data.validation=9", "train.epochs=7", "train.max_steps=5", "train.precision=fp32"])
    assert again == wanted


def test_a_card_is_sent_whole_in_one_commit_and_private_unless_it_is_asked_for_otherwise(
    run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
):
    call(run, "--push", "me/digits")
    repository = hub.repositories["me/digits"]
    assert repository.private
    assert repository.commits == 1
    assert repository.files == {name: (run / "export/card" / name).read_bytes() for name in FILES}
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/me/digits: sent, private"
    call(run, "--push", "me/digits", "--license", "apache-2.0")
    assert b"license: apache-2.0" in repository.files["README.md"]
    call(run, "--push", "me/open", "--public")
    assert not hub.repositories["me/open"].private
    hub.requests.clear()
    for name, public, advice in (("me/open", (), "add --public"), ("me/digits", ("--public",), "leave --public out")):
        with pytest.raises(UserError, match=f"that repository is (public|private); {advice}"):
            call(run, "--push", name, *public)
    assert not [request for request in hub.requests if "commit" in request]


@pytest.mark.parametrize(
    ("arguments", "environment", "reason"),
    [
        (["--push", "me/digits"], {"HF_TOKEN": ""}, "needs a token that may write there: run hf auth login, or set HF_TOKEN"),
        (["--push", "me/digits"], {"HF_TOKEN": "other"}, "not sent (Client error '401 Unauthorized'"),
        (["--push", "forbidden/digits"], {}, "You don't have the rights to create a model under this namespace"),
        (["--push", "digits"], {}, "--push digits is not allowed: it takes USER/NAME"),
        (["--push", "a/b/c"], {}, "--push a/b/c is not allowed"),
        (["--push", "a/.."], {}, "--push a/.. is not allowed"),
        (["--public"], {}, "--public needs --push USER/NAME"),
        (["--license", "my own"], {}, "--license my own is not allowed; it takes an identifier of the Hub's, such as mit"),
        (["--output", "/proc/nowhere/x"], {}, "/proc/nowhere/x: No such file or directory; give another folder by --output"),
        (["--output", "FILE"], {}, "is a link or a file; give a new folder by --output"),
    ],
)
def test_what_cannot_be_is_told_in_one_line_and_nothing_is_sent(
    run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str], reason: str
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as told:
        call(run, *(str(run / "config.yaml") if argument == "FILE" else argument for argument in arguments))
    assert reason in str(told.value)
    assert "\n" not in str(told.value)
    assert not hub.repositories


def test_without_a_network_the_folder_stays(run: Path, hub: HubServer):
    hub.close()
    with pytest.raises(UserError, match=r"--push me/digits: not sent \(.*\); the folder .*/export/card is there: try again"):
        call(run, "--push", "me/digits")
    assert sorted(path.name for path in (run / "export/card").iterdir()) == FILES == sorted(CARD_FILES)


@pytest.mark.parametrize("arguments", [("--push", "me/digits"), ("--license", "apache-2.0")])
def test_what_a_card_alone_has_is_refused_with_other_formats(run: Path, arguments: tuple[str, ...]):
    done = python("-m", "digitdist.export", str(run), "--format", "torch", *arguments, cwd=run.parent)
    assert done.code == EXIT_USER_ERROR
    assert done.errors == ["error: --push and --license need --format card"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [("model.name=cnn",), ("model.name=convnet", "optim.ema=0.5", "train.precision=bf16")])
def test_a_copy_elsewhere_predicts_every_test_image_as_the_run_did_and_the_cards_command_trains_it_again(
    place: Path, tmp_path_factory: pytest.TempPathFactory, splits: Splits, options: tuple[str, ...]
):
    own = (*options, "train.max_steps=12", "seed=3", "optim.lr=0.002", "model.args={}")
    done = python("-m", "digitdist.train", *QUIET, *own, "train.threads=1", "run.name=a", cwd=place)
    assert done.code == 0, done.err
    done = python("-m", "digitdist.export", "a", "--format", "card", cwd=place)
    assert (done.code, done.err) == (0, "")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(place / "runs/a/export/card", elsewhere)
    model, saved = digitdist.load(elsewhere), np.load(place / "runs/a/predictions.npz")
    found = model.probabilities(splits.test.images)
    assert np.array_equal(found.argmax(1), saved["prediction"])
    assert np.allclose(found.max(1), saved["probability"], atol=1e-6 if "cnn" in options[0] else 0.02)

    launch = command_in(model.card)[2:]
    again = accelerate(*launch, *QUIET, "run.name=again", cwd=place)
    assert again.code == 0, again.err
    weights = result(place / "runs/again")["weights_sha256"]
    assert weights == result(place / "runs/a")["weights_sha256"]
    assert weights in model.card


@pytest.mark.slow
def test_what_one_has_sent_another_loads(place: Path, hub: HubServer, tmp_path: Path):
    made_run(place / "runs/a")
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "cache")}
    sent = python("-m", "digitdist.export", "a", "--format", "card", "--push", "me/digits", cwd=place, env=env)
    assert sent.code == 0, sent.err
    code = "import digitdist, numpy; m = digitdist.load('me/digits'); print(m.predict(numpy.zeros((3, 28, 28), 'uint8')).shape)"
    loaded = python("-c", code, cwd=tmp_path, env=env)
    assert (loaded.code, loaded.out) == (0, "(3,)\n"), loaded.err
    resolved = [request for request in hub.requests if "/resolve/" in request]
    assert len(resolved) >= 4
    assert all(f"/resolve/{COMMIT}/" in request for request in resolved)  # not "main", which may move
    gone = python("-c", "import digitdist; digitdist.load('me/gone')", cwd=tmp_path, env=env)
    assert gone.err.splitlines()[-1].startswith(
        "digitdist.errors.UserError: me/gone: nothing of that name is here, and the Hub"
    )
