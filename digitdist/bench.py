"""Speed on this machine, measured in turn in one run: the trainer beside the plain way, and exact steps beside ddp ones.

python -m digitdist.bench
python -m digitdist.bench --recipes --seeds 20
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from digitdist import optim, runtime, sync, train
from digitdist.config import Config, Parser, UserError, load
from digitdist.data import Order
from digitdist.models import build

CONFIGS = Path(__file__).parent.parent / "configs"  # of a checkout
RECIPES = ("fast", "sharp")


def trainer_epoch(overrides: list[str]) -> float:
    """`train_seconds` of one epoch of the trainer under this configuration, in a run folder that is removed."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        fixed = ["train.epochs=1", f"run.dir={folder}", "tracking.wandb=disabled", "train.eval_every=0", "run.report=false"]
        config, plan, splits, model = train.prepare([], [*overrides, *fixed])
        last_step = Order(len(splits.train), config.data.batch_size, config.seed).steps_per_epoch
        accelerator = runtime.start(config, plan)
        run = train.open_run(config, plan, last_step, [], [])
        heartbeat = runtime.Heartbeat(run.heartbeat, plan.world)
        trainer = train.Trainer(config, accelerator, splits, model, run, heartbeat)
        trainer.train()
        return trainer.train_seconds


def plain_epoch(config: Config) -> float:
    """Seconds of one epoch the plain way: torchvision's MNIST, `ToTensor` an image, one worker process."""
    import torchvision

    images = torchvision.datasets.MNIST(config.data.root, transform=torchvision.transforms.ToTensor())
    loader = torch.utils.data.DataLoader(images, config.data.batch_size, shuffle=True, num_workers=1)
    model = build(config.model, config.seed)
    optimizer = torch.optim.Adam(model.parameters(), config.optim.lr)
    start = time.perf_counter()
    for pixels, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    return time.perf_counter() - start


def stepper(overrides: list[str]) -> Callable[[int], float]:
    """A function that takes some steps of a training under this configuration and gives their seconds."""
    config, plan, splits, model = train.prepare([], overrides)
    accelerator = runtime.start(config, plan)
    model.to(accelerator.device).to(memory_format=torch.channels_last)
    how = sync.build(config, accelerator, model, lambda *_: None)
    optimizer = optim.build(model, config.optim)
    order = Order(len(splits.train), config.data.batch_size, config.seed)

    def steps(count: int) -> float:
        batches = iter(order.epoch_loader(splits.train, 0, how.sharding))
        start = time.perf_counter()
        for step in range(count):
            how.gradients(next(batches), order.batch_size, step, stop=False)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    return steps


def in_turn(first: Callable[[], float], second: Callable[[], float], repeats: int) -> tuple[float, float, str]:
    """Median seconds of each, measured in turn, and their ratio in words: median, least and greatest."""
    rows = [(first(), second()) for _ in range(repeats)]
    ratios = [a / b for a, b in rows]
    words = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} over {repeats})"
    return statistics.median(a for a, _ in rows), statistics.median(b for _, b in rows), words


def measure_recipes(seeds: int, overrides: list[str]) -> None:
    """Trains each of `RECIPES` with seeds 0 to seeds-1 by the trainer's own command, and prints what came out.

    Without W&B and without the page of plots, whose seconds are no part of a training.

    Raises:
        UserError: there are no recipes beside the package.
        Fault: a training has failed; it has told why.
    """
    for file in (CONFIGS / f"{name}.yaml" for name in RECIPES):
        if not file.is_file():
            raise UserError(f"--recipes: there is no {file}; the recipes are not installed, run it in a checkout")
        accuracies, train_seconds, wall_seconds = zip(
            *(run_recipe(file, seed, overrides) for seed in range(seeds)), strict=True
        )
        spread = 100 * statistics.stdev(accuracies) if seeds > 1 else math.nan
        print(
            f"{file.stem:6} test accuracy {100 * statistics.mean(accuracies):.3f} %, deviation {spread:.3f}, {seeds} seeds"
            f" ({100 * min(accuracies):.2f} to {100 * max(accuracies):.2f});"
            f" train_seconds {statistics.mean(train_seconds):.2f} ({min(train_seconds):.2f} to {max(train_seconds):.2f});"
            f" the whole command {statistics.mean(wall_seconds):.1f} s",
            flush=True,
        )


def run_recipe(file: Path, seed: int, overrides: list[str]) -> tuple[float, float, float]:
    """Test accuracy, `train_seconds` and the whole command's seconds of one training, in a run folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"seed={seed}", f"run.dir={folder}", "run.name=recipe", "run.report=false", "tracking.wandb=disabled"]
        command = [sys.executable, "-m", "digitdist.train", "--config", str(file), *overrides, *fixed]
        start = time.perf_counter()
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        seconds = time.perf_counter() - start
        if code:
            raise runtime.Fault(f"{' '.join(command)} ended with exit code {code}")
        result = json.loads((Path(folder) / "recipe/result.json").read_text())
    return result["test_accuracy"], result["train_seconds"], seconds


def main() -> None:
    parser = Parser(
        prog="python -m digitdist.bench",
        description="An epoch of the trainer beside the plain way, and steps of exact beside ddp on one process and thread.",
        epilog="example: python -m digitdist.bench --repeats 3 data.root=data",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, such as data.root=data")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="how often each is measured (default: 3)")
    parser.add_argument("--recipes", action="store_true", help=f"measure the recipes {', '.join(RECIPES)} of configs/ instead")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="of --recipes: seeds 0 to N-1 (default: 20)")
    arguments = parser.parse_args()
    if arguments.recipes:
        if arguments.seeds < 1:
            raise UserError(f"--seeds {arguments.seeds} is not allowed; it takes a whole number from 1 on")
        measure_recipes(arguments.seeds, arguments.overrides)
        return
    config = load((), arguments.overrides)

    def plain() -> float:  # in a process of its own, which nothing of the trainer has touched
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            return fresh.submit(plain_epoch, config).result()

    ours, theirs, ratio = in_turn(lambda: trainer_epoch(arguments.overrides), plain, arguments.repeats)
    print(f"an epoch: trainer {ours:.1f} s, plain way {theirs:.1f} s, ratio {ratio}", flush=True)
    for batch_size, count in ((100, 60), (512, 12)):
        options = [*arguments.overrides, f"data.batch_size={batch_size}", "train.threads=1"]
        exact, ddp = stepper([*options, "sync.mode=exact"]), stepper([*options, "sync.mode=ddp"])
        for warm in (exact, ddp):
            warm(count)
        slow, fast, ratio = in_turn(partial(exact, count), partial(ddp, count), 3 * arguments.repeats)
        milliseconds = [f"{1e3 * seconds / count:.1f} ms" for seconds in (slow, fast)]
        print(f"a step of {batch_size}: exact {milliseconds[0]}, ddp {milliseconds[1]}, ratio {ratio}", flush=True)


if __name__ == "__main__":
    runtime.run_command(main)
