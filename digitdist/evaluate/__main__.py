"""The command ``python -m digitdist.evaluate``: the exact accuracy of a run.

python -m digitdist.evaluate RUN
"""

from __future__ import annotations

import json
from functools import partial

from digitdist.config import Parser
from digitdist.data import load_splits
from digitdist.distributed import make_plan, run_command, start_accelerator
from digitdist.errors import UserError
from digitdist.evaluate.evaluating import chunked_loader, evaluate
from digitdist.model_checks import FEW_IMAGES, Traits, first_images, layout_problem
from digitdist.models import build_model
from digitdist.runs import load_run
from digitdist.world import print_main


def main() -> None:
    """The command. Collective: every rank must call it."""
    parser = Parser(
        "python -m digitdist.evaluate",
        "The exact accuracy of a run's checkpoint, on any number of processes.",
        "runs/quick --split test",
    )
    parser.add_run()
    parser.add_overrides()
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    arguments = parser.parse_args()

    run = load_run(arguments.run, arguments.overrides)
    config, info = run.config, run.info
    plan = make_plan(config)
    splits = load_splits(config.data, config.seed)
    run.check_form(splits.info)
    images = getattr(splits, arguments.split)
    if not len(images):
        raise UserError(f"--split {arguments.split}: the run held no images out; set data.validation")
    stored = run.checkpoint(arguments.checkpoint)
    model = run.model(stored)
    build = partial(build_model, config.model, config.seed, info)
    problem = layout_problem(build, *first_images(images, info, FEW_IMAGES))
    accelerator = start_accelerator(config, plan)
    model.to(accelerator.device).to(memory_format=Traits(problem).layout)
    loader = chunked_loader(accelerator, images.to(accelerator.device), config)
    result = evaluate(accelerator, model, loader, info)
    if arguments.json:
        report = {"run": str(run.folder), "step": stored.step, "split": arguments.split, "correct": result.correct}
        report |= {"total": result.total, "accuracy": result.accuracy, "loss": result.mean_loss}
        report |= {"class_accuracy": result.class_accuracy, "confusion": result.confusion.tolist()}
        print_main(json.dumps(report))
    else:
        print_main(f"{run.folder} at step {stored.step:,}, {splits.info.name} {arguments.split}: {result}")
        names = zip(info.classes, result.class_accuracy, strict=True)
        print_main("of each class: " + ", ".join(f"{n} {100 * a:.2f} %" for n, a in names if a is not None))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
