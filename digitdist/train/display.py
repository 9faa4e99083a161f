"""What a person sees of a training: its first lines, then a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import platform
import shutil
import sys
from typing import Any

from accelerate.utils import gather_object
from tqdm import tqdm

from digitdist.data import Order
from digitdist.distributed import describe_instructions, device_name
from digitdist.evaluate import Evaluation
from digitdist.runs import Run
from digitdist.train.setup import Setup
from digitdist.world import is_main


def first_lines(setup: Setup, run: Run) -> str:
    """What the training runs on, and what it is about to do. Collective: every rank must call it."""
    config, plan, order, splits = setup.config, setup.plan, setup.order, setup.splits
    blind = sorted(set(gather_object([] if run.visible else [platform.node()])))
    world, accumulate = plan.world, config.train.accumulate
    least, most = order.batch_size // (world.size * accumulate), -(-order.batch_size // (world.size * accumulate))
    share = f"{most}" if least == most else f"{least} or {most}"
    processes = f"{world.size} process{'es' if world.size > 1 else ''}{', on several hosts' if world.several_hosts else ''}"
    holder = f" on {run.host}{', not seen by ' + ', '.join(blind) if blind else ''}" if world.several_hosts else ""
    held_out = f", {len(splits.validation):,} held out" if len(splits.validation) else ""
    focus = f", {order.focus} passes over hard images from the second one on" if order.focus > 1 else ""
    patience = f" or fewer, by train.patience={config.train.patience}" if config.train.patience else ""
    state = f"resumes at step {run.stored.step:,}" if run.stored else "starts"
    device = device_name(plan.device_type) + (f", {describe_instructions()}" if plan.device_type == "cpu" else "")
    quota = f" (CPU quota {round(plan.cpu_quota, 2)})" if plan.cpu_quota else ""
    lines = [
        *plan.notes,
        *setup.notes,
        f"device     {plan.device_type} ({device}), world size {world.size}: {processes}",
        f"precision  {plan.precision}, sync {config.sync.mode}, threads {plan.threads} a process{quota}",
        f"batch      {order.batch_size:,} global = {share} per rank × {world.size} rank{'s' if world.size > 1 else ''}"
        f" × {accumulate} accumulated",
        f"data       {splits.info.name}: {len(splits.train):,} images to train{held_out}, {len(splits.test):,} to test",
        f"steps      {setup.last_step:,}{patience}, {order.steps_per_epoch:,} an epoch{focus}",
        f"run        {run.folder}{holder} {state}",
    ]
    return "\n".join(lines)


class Display:
    """Shows a training on the main rank."""

    def __init__(self, order: Order, num_epochs: int):
        self.order, self.num_epochs = order, num_epochs
        self.shown = is_main()
        self.has_bar = self.shown and sys.stdout.isatty()
        self.bar: Any = None

    def print(self, text: str) -> None:
        """Prints a line, above the bar if there is one; any thread may call it."""
        if self.shown and self.bar is not None:
            tqdm.write(text, file=sys.stdout)
        elif self.shown:
            print(text, flush=True)

    def step(self, step: int) -> None:
        """Moves the bar on to `step`, a few times a second."""
        if not self.has_bar:
            return
        epoch, seen = self._position(step)
        title = f"epoch {epoch}/{self.num_epochs}"
        if self.bar is None or self.bar.desc != title:
            self.close()
            columns, rows = shutil.get_terminal_size()
            size = {"ncols": columns, "nrows": rows}  # tqdm itself draws nothing on a terminal that tells no size
            # `initial`, or its first rate would count images of before it began.
            self.bar = tqdm(
                total=self.order.num_images, initial=seen, desc=title, unit=" images", file=sys.stdout, leave=False, **size
            )
        self.bar.update(seen - self.bar.n)

    def log(self, step: int, loss: float, images_per_second: float) -> None:
        """Shows the line of the log at `step`."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}")
        elif self.shown:
            (epoch, seen), count = self._position(step), self.order.num_images
            share = f"[{seen:>{len(f'{count:,}')},}/{count:,} ({100 * seen / count:3.0f} %)]"
            self.print(f"Train epoch {epoch} {share} loss {loss:.4f}, {images_per_second:,.0f} images/s")

    def test(self, epoch: float, result: Evaluation) -> None:
        """Shows the result of an evaluation on the test images."""
        self.close()
        score = f"{result.correct}/{result.total} ({100 * result.accuracy:.2f} %)"
        self.print(f"Test epoch {round(epoch, 2):g}: loss {result.mean_loss:.4f}, accuracy {score}")

    def close(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _position(self, step: int) -> tuple[int, int]:
        """The epoch of `step`, from 1 on, and the images that it has seen."""
        epoch = -(-step // self.order.steps_per_epoch)
        return epoch, self.order.images_seen(step) - (epoch - 1) * self.order.num_images
