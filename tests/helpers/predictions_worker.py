"""Run by the tests in gpu/: the predictions of a run's last checkpoint, uncompiled, on this process's device, into a file.

python -m helpers.predictions_worker RUN FILE.npz key=value...
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from digitdist.data import load_splits
from digitdist.distributed import make_plan, run_command, start_accelerator
from digitdist.evaluate import chunked_loader, evaluate, save_predictions
from digitdist.model_checks import Traits, first_images, layout_problem
from digitdist.models import build_model
from digitdist.runs import load_run


def main() -> None:
    folder, file, *overrides = sys.argv[1:]
    run = load_run(folder, overrides)
    accelerator = start_accelerator(run.config, make_plan(run.config))
    splits = load_splits(run.config.data, run.config.seed)
    build = partial(build_model, run.config.model, run.config.seed, run.info)
    layout = Traits(layout_problem(build, *first_images(splits.test, run.info, 4))).layout
    model = run.model(run.checkpoint("last")).to(accelerator.device).to(memory_format=layout)
    loader = chunked_loader(accelerator, splits.test.to(accelerator.device), run.config)
    save_predictions(evaluate(accelerator, model, loader, run.info), Path(file))


if __name__ == "__main__":
    run_command(main)
