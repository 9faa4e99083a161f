"""Run on every rank of a world by test_networks.py: trains each awkward network in each mode, in runs of a few steps.

It prints, on the main rank, a JSON object: of each ``Network:mode[:key=value]`` what the run came to, or the error that
refused it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from digitdist.config import load_config
from digitdist.data import DATA_SETS, ImageSet, Splits, load_splits
from digitdist.distributed import (
    Heartbeat,
    make_plan,
    run_command,
    run_on_main,
    start_accelerator,
    use_deterministic_algorithms,
)
from digitdist.errors import UserError
from digitdist.evaluate import chunked_loader, evaluate
from digitdist.runs import StoredRun, open_run, read_metrics
from digitdist.train import Trainer, prepare

STEPS = 6
OPTIONS = (
    *("tracking.wandb=disabled", "run.report=false", "data.batch_size=26", "optim.ema=0.5", "optim.clip_norm=1"),
    *(
        "train.log_every=1",
        "train.eval_every=1",
        "sync.every=2",
        "sync.check_every=1",
        "sync.shards=4",
        "optim.weight_decay=0.1",
    ),
)


def few(images: ImageSet, count: int) -> ImageSet:
    return images.subset(torch.arange(count))


@functools.cache
def few_images() -> Splits:
    """61 images to train on, so that a step has 26, 26 and 9, and 40 to test on."""
    splits = load_splits(load_config((), [f"data.root={sys.argv[1]}"]).data, 0)
    return dataclasses.replace(splits, train=few(splits.train, 61), test=few(splits.test, 40))


def train(accelerator: Accelerator, options: list[str], steps: int) -> tuple[Path, torch.memory_format]:
    setup = prepare([], [*options, f"train.max_steps={steps}"])
    use_deterministic_algorithms(setup.config.sync.mode == "exact")
    run = run_on_main(accelerator, lambda: open_run(setup.config, setup.plan, setup.splits, setup.ending, []))
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(setup, accelerator, run, Heartbeat(run.heartbeat, setup.plan.world)).train()
    return run.folder, setup.traits.layout


def outcome(accelerator: Accelerator, folder: Path, options: list[str]) -> dict[str, Any]:
    """Of a run that, on several processes, ends in its middle and is resumed; evaluated again from its files."""
    if accelerator.num_processes > 1:
        train(accelerator, options, STEPS // 2)
    run, layout = train(accelerator, options, STEPS)
    accelerator.wait_for_everyone()
    config = load_config([str(run / "config.yaml")])
    stored = StoredRun(run, config, DATA_SETS["mnist"])
    model = stored.model(stored.checkpoint("last"))
    model.to(accelerator.device).to(memory_format=layout)
    loader = chunked_loader(accelerator, few_images().test.to(accelerator.device), config)
    again = evaluate(accelerator, model, loader, DATA_SETS["mnist"])
    result = json.loads((run / "result.json").read_text())
    losses = [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]
    return {
        "weights": result["weights_sha256"],
        "losses": losses,
        "test loss": result["test_loss"],
        "test loss again": again.mean_loss,
    }


def main() -> None:
    root, folder, *cases = sys.argv[1:]
    config = load_config((), [f"data.root={root}", "train.threads=1"])
    accelerator = start_accelerator(config, make_plan(config))
    folder = f"{folder}/runs-{accelerator.num_processes}"
    warnings.simplefilter("ignore")
    pytest.MonkeyPatch().setattr("digitdist.train.setup.load_splits", lambda *_: few_images())
    found: dict[str, Any] = {}
    for case in cases:
        name, mode, *more = case.split(":")
        own = [f"data.root={root}", f"run.dir={folder}", f"run.name={case}", f"sync.mode={mode}", "train.threads=1"]
        options = [*OPTIONS, *own, f"model.target=helpers.awkward.{name}", *more]
        try:
            found[case] = outcome(accelerator, Path(folder), options)
        except UserError as error:
            assert not (Path(folder) / case).exists(), "refused before a run folder exists"
            found[case] = str(error)
        except Exception:
            traceback.print_exc()
            print(f"in {case}", file=sys.stderr)
            raise
    if accelerator.is_main_process:
        print(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
