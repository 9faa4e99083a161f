"""What of a checkpoint is taken over, and what starts fresh, in this process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from accelerate import Accelerator
from helpers.made_up_runs import make_run
from helpers.resume_worker import CHANGED, NOT_TRIED
from helpers.runs import events, result
from helpers.short_runs import train

from digitdist import checkpoint
from digitdist.checkpoint import Checkpoint
from digitdist.config import KEYS
from digitdist.errors import UserError

ALLOWED = "checkpoint.allow_change=true"
COMMON = ("data.batch_size=20", "train.log_every=1", "train.epochs=2")  # of 4 steps each


def files(folder: Path) -> dict[str, str]:
    """The hash of each file of a run but for its lock."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ((), ("optim.name=sgd", "optim.lr=0.01"), ["the stored state of the optimizer does not fit optim.name=sgd"]),
        (("optim.name=sgd",), ("optim.name=adamw",), ["the stored state of the optimizer does not fit optim.name=adamw"]),
        (("optim.name=sgd",), ("optim.name=sgd", "optim.momentum=0"), ["the stored state of the optimizer does not fit"]),
        ((), ("optim.name=adamw",), []),
        ((), ("optim.ema=0.9",), ["no moving average is stored; that of optim.ema=0.9 starts from these weights"]),
        (("optim.ema=0.9",), (), ["the stored moving average is dropped"]),
        ((), ("data.focus=2",), ["no losses of these images are stored"]),
        (("sync.mode=local",), (), ["what sync.mode=local keeps of its ranks is dropped"]),
        (("sync.mode=local",), ("sync.mode=local", "optim.name=sgd"), ["the stored state of the optimizer does not fit"]),
        ((), ("sync.mode=local",), []),
        ((), ("sync.mode=exact", "data.batch_size=16"), []),
        (("sync.mode=exact",), ("sync.mode=ddp", "optim.name=sgd", "optim.ema=0.5"), ["optim.name=sgd", "optim.ema=0.5"]),
        (("data.validation=9",), ("data.validation=5",), ["the best evaluation was on other held-out images"]),
        (
            ("data.validation=9",),
            ("data.validation=9", "data.validation_seed=1"),
            ["the best evaluation was on other held-out"],
        ),
        (("data.validation=9",), ("data.validation=9", "data.validation_seed=0"), []),
    ],
)
def test_what_fits_is_taken_over_and_the_rest_starts_fresh_and_is_said(
    alone: Accelerator, tmp_path: Path, mnist_root: Path, first: tuple[str, ...], second: tuple[str, ...], said: list[str]
):
    own = (f"run.dir={tmp_path}", "run.name=a", *COMMON)
    folder, _ = train(alone, str(mnist_root), (*own, *first, "train.max_steps=3"))
    _, lines = train(alone, str(mnist_root), (*own, *second, "train.max_steps=6", ALLOWED))
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))
    assert result(folder)["steps"] == 6
    assert [line["step"] for line in events(folder) if "train/loss" in line][-1] == 6


@pytest.mark.parametrize("change", ["model.args.width=3", "model.target=helpers.awkward.Base"])
def test_weights_that_do_not_fit_are_refused_before_a_file_is_touched(
    alone: Accelerator, tmp_path: Path, mnist_root: Path, change: str
):
    own = (f"run.dir={tmp_path}", "run.name=a", *COMMON)
    folder, _ = train(alone, str(mnist_root), (*own, "train.max_steps=3"))
    before = files(folder)
    assert "result.json" in before
    with pytest.raises(UserError, match="its weights do not fit this network"):
        train(alone, str(mnist_root), (*own, change, "train.max_steps=6", ALLOWED))
    assert files(folder) == before


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_a_schedule_that_would_jump_is_refused_or_said(alone: Accelerator, tmp_path: Path, mnist_root: Path, schedule: str):
    own = (f"run.dir={tmp_path}", "run.name=a", *COMMON, f"schedule.name={schedule}")
    folder, _ = train(alone, str(mnist_root), own)
    before = files(folder)
    with pytest.raises(UserError, match=f"schedule.name={schedule} would have given the steps already taken other"):
        train(alone, str(mnist_root), (*own, "train.epochs=3"))
    assert files(folder) == before
    _, (line,) = train(alone, str(mnist_root), (*own, "train.epochs=3", ALLOWED))
    rates = [event["train/lr"] for event in events(folder) if "train/lr" in event]
    assert f"it goes from {rates[7]:.3g} in step 8 to {rates[8]:.3g}" in line


@pytest.mark.parametrize("schedule", [("schedule.name=constant",), ("schedule.name=step",), ("schedule.warmup_steps=2",)])
def test_a_schedule_that_does_not_know_the_end_goes_on(
    alone: Accelerator, tmp_path: Path, mnist_root: Path, schedule: tuple[str, ...]
):
    own = (f"run.dir={tmp_path}", *COMMON, *schedule)
    whole, _ = train(alone, str(mnist_root), (*own, "run.name=whole", "train.epochs=3"))
    for epochs in (2, 3):
        parts, lines = train(alone, str(mnist_root), (*own, "run.name=parts", f"train.epochs={epochs}"))
        assert not lines
    assert result(parts)["weights_sha256"] == result(whole)["weights_sha256"]


def test_a_schedule_of_which_only_its_rise_is_past_goes_on(alone: Accelerator, tmp_path: Path, mnist_root: Path):
    """A cosine falls after its warm-up, which is the same for any number of steps."""
    own = (f"run.dir={tmp_path}", *COMMON, "schedule.name=cosine", "schedule.warmup_steps=5")
    whole, _ = train(alone, str(mnist_root), (*own, "run.name=whole", "train.epochs=3"))
    train(alone, str(mnist_root), (*own, "run.name=parts", "train.max_steps=5"))
    parts, lines = train(alone, str(mnist_root), (*own, "run.name=parts", "train.epochs=3"))
    assert not lines
    assert result(parts)["weights_sha256"] == result(whole)["weights_sha256"]


def test_each_key_that_a_resumed_run_may_change_is_changed_in_the_tests_or_has_a_reason():
    """integration/test_resuming.py changes them, and compares the weights."""
    assert not CHANGED.keys() & NOT_TRIED.keys()
    harmless = {name for name, key in KEYS.items() if not all(key.alters_result_in(mode) for mode in ("ddp", "exact", "local"))}
    assert harmless == CHANGED.keys() | NOT_TRIED.keys()


@pytest.mark.parametrize("mode", ["ddp", "local"])
def test_harmless_keys_change_no_bit_of_one_process(alone: Accelerator, tmp_path: Path, mnist_root: Path, mode: str):
    own = (f"run.dir={tmp_path}", *COMMON, f"sync.mode={mode}", "sync.every=4", "optim.ema=0.8", "checkpoint.every_steps=0")
    whole, _ = train(alone, str(mnist_root), (*own, "run.name=whole", "train.epochs=6", "train.max_steps=21"))
    train(alone, str(mnist_root), (*own, "run.name=parts", "train.max_steps=6"))
    changed = (f"{key}={value}" for key, value in CHANGED.items())
    parts, lines = train(alone, str(mnist_root), (*own, "run.name=parts", *changed))
    assert not lines
    assert result(parts)["weights_sha256"] == result(whole)["weights_sha256"]


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({"config": None}, "config"),
        ({"config": {}}, "config, train.epochs; config, sync.mode"),
        ({"precision": 32}, "precision"),
        ({"train_seconds": "1"}, "train_seconds"),
        ({"best": []}, "best"),
        ({"best": {"step": "../x"}}, "best"),
    ],
)
def test_a_checkpoint_of_somebody_elses_whose_state_is_not_whole_is_refused_in_a_line(
    alone: Accelerator, tmp_path: Path, mnist_root: Path, change: dict, lacking: str
):
    tensors = {"model": {}, "optimizer": {}}
    state = {
        "step": 2,
        "config": {"train.epochs": 1, "sync.mode": "ddp"},
        "precision": "fp32",
        "train_seconds": 1,
        "best": None,
    }
    folder = checkpoint.write(tmp_path / "sent", Checkpoint(tensors, state | change), keep=1)
    with pytest.raises(UserError, match=f"its state lacks {lacking}, so that no training goes on from it"):
        train(alone, str(mnist_root), [*COMMON, f"run.dir={tmp_path}", "run.name=own", f"checkpoint.resume={folder}"])
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("inner", ["seed-0", "optim.lr=0.1/seed-3"])
def test_a_study_is_no_run_and_stays_as_it_is(alone: Accelerator, tmp_path: Path, mnist_root: Path, inner: str):
    make_run(tmp_path / "mine" / inner, 900)
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"mine is a study, a folder of runs; give another run\.name"):
        train(alone, str(mnist_root), [*COMMON, f"run.dir={tmp_path}", "run.name=mine", "checkpoint.resume=never"])
    assert files(tmp_path) == before
