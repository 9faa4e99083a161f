"""Speed on this machine: an epoch of the trainer beside an epoch of the plain way, interleaved in one run.

python -m digitdist.bench
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from torch.nn import functional as F

from digitdist import runtime, train
from digitdist.config import Config, Parser, load
from digitdist.data import Order
from digitdist.models import build


def trainer_epoch(overrides: list[str]) -> float:
    """`train_seconds` of one epoch of the trainer under this configuration, in a run folder that is removed."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        fixed = ["train.epochs=1", f"run.dir={folder}", "tracking.wandb=disabled", "train.eval_every=0"]
        config, plan, splits, model = train.prepare([], [*overrides, *fixed])
        last_step = Order(len(splits.train), config.data.batch_size, config.seed).steps_per_epoch
        accelerator = runtime.start(config, plan)
        run = train.open_run(config, plan, last_step, [])
        heartbeat = runtime.Heartbeat(run.heartbeat, plan.world)
        trainer = train.Trainer(config, accelerator, splits, model, run, heartbeat)
        trainer.train()
        return trainer.train_seconds


def plain_epoch(config: Config) -> float:
    """Seconds of one epoch the plain way: torchvision's MNIST, `ToTensor` an image, one worker process.

    To be run in a process of its own, which nothing of the trainer has touched.
    """
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


def main() -> None:
    parser = Parser(
        prog="python -m digitdist.bench",
        description="Seconds of one epoch: the trainer, and the plain way with torchvision's data set and a worker.",
        epilog="example: python -m digitdist.bench --repeats 3 data.batch_size=100",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, such as data.root=data")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="epochs of each, in turn (default: 3)")
    arguments = parser.parse_args()
    config = load((), arguments.overrides)
    rows: list[tuple[float, float]] = []
    for _ in range(arguments.repeats):
        ours = trainer_epoch(arguments.overrides)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            rows.append((ours, fresh.submit(plain_epoch, config).result()))
        print(f"trainer {rows[-1][0]:6.2f} s   plain {rows[-1][1]:6.2f} s   ratio {rows[-1][0] / rows[-1][1]:.2f}", flush=True)
    ratios = [ours / plain for ours, plain in rows]
    print(f"one epoch takes {statistics.median(ratios):.0%} of the plain way's time ({min(ratios):.0%} to {max(ratios):.0%})")


if __name__ == "__main__":
    runtime.run_command(main)
