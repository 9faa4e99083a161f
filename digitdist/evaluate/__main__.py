"""The command ``python -m digitdist.evaluate``: the exact accuracy of a run.

python -m digitdist.evaluate RUN
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial

from digitdist.checkpoint import weights_sha256
from digitdist.config import Config, Parser, SyncConfig, shown
from digitdist.data import load_splits
from digitdist.distributed import make_plan, planned_device, run_command, start_accelerator
from digitdist.errors import UserError
from digitdist.evaluate.evaluating import chunked_loader, evaluate
from digitdist.evaluate.saved import saved_predictions
from digitdist.model_checks import FEW_IMAGES, Traits, first_images, layout_problem
from digitdist.model_state import model_state
from digitdist.models import build_model
from digitdist.runs import load_run
from digitdist.world import print_main, read_world


def evaluation_config(config: Config, precision: str | None) -> Config:
    """What of a run's configuration says how to compute, without what only its training needs of a machine; `precision`: the
    one to compute in, None for that of `config`."""
    train = dataclasses.replace(config.train, compile="none", accumulate=1)
    if precision:
        train.precision = precision  # type: ignore[assignment]
    sync = SyncConfig(mode=config.sync.mode, shards=max(config.sync.shards, read_world().size), timeout_s=config.sync.timeout_s)
    return dataclasses.replace(config, train=train, sync=sync)


def main() -> None:
    """The command. Collective: every rank must call it."""
    parser = Parser(
        "python -m digitdist.evaluate",
        "The exact accuracy of a run's checkpoint, on any number of processes.",
        "runs/quick --split test",
    )
    parser.add_run()
    parser.add_overrides("configuration, such as data.root=data; trust=true executes the network that a received run names")
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    arguments = parser.parse_args()

    run = load_run(arguments.run, arguments.overrides)
    stored = run.checkpoint(arguments.checkpoint)
    chosen = any(text.startswith("train.precision=") for text in arguments.overrides)
    settings = evaluation_config(run.config, None if chosen else run.precision(stored, planned_device()))
    plan = make_plan(settings)
    config, info, splits = run.config, run.info, load_splits(run.config.data, run.config.seed)
    run.check_form(splits.info)
    images = getattr(splits, arguments.split)
    if not len(images):
        raise UserError(f"--split {arguments.split}: the run held no images out; set data.validation")
    model = run.model(stored)
    saved = saved_predictions(run, weights_sha256(model_state(model))) if arguments.split == "test" else None
    build = partial(build_model, config.model, config.seed, info)
    problem = layout_problem(build, *first_images(images, info, FEW_IMAGES))
    accelerator = start_accelerator(settings, plan)
    model.to(accelerator.device).to(memory_format=Traits(problem).layout)
    loader = chunked_loader(accelerator, images.to(accelerator.device), config)
    result = evaluate(accelerator, model, loader, info)
    if arguments.json:
        report = {"run": str(run.folder), "step": stored.step, "split": arguments.split, "correct": result.correct}
        report |= {"total": result.total, "accuracy": result.accuracy, "loss": result.mean_loss, "precision": plan.precision}
        report |= {"class_accuracy": result.class_accuracy, "confusion": result.confusion.tolist()}
        print_main(json.dumps(report))
    else:
        where = f"{run.folder} at step {stored.step:,}, {splits.info.name} {arguments.split}"
        print_main(f"{where}: {result}, in {plan.precision} on {plan.device_type}")
        if saved:
            print_main(saved.compare(result.index, result.prediction))
        names = zip(info.classes, result.class_accuracy, strict=True)
        print_main("of each class: " + ", ".join(f"{shown(n)} {100 * a:.2f} %" for n, a in names if a is not None))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
