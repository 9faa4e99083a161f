"""Where what happens in a training goes: into its log and W&B, onto the screen, and at the end into the run's folder."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from digitdist.checkpoint import folder_name, weights_sha256
from digitdist.data import AnySet, displayable
from digitdist.errors import Fault, in_one_line
from digitdist.evaluate import Evaluation, save_predictions
from digitdist.files import atomic_write, remove
from digitdist.model_state import model_state
from digitdist.optim import norm
from digitdist.runs import PREDICTIONS, RESULT, Media, Run, confusion_chart, image_table, record_end, start_tracker
from digitdist.sync import StepStats
from digitdist.train.display import Display
from digitdist.train.profiler import NullProfiler, start_profiler
from digitdist.train.setup import Setup
from digitdist.train.state import TrainingState
from digitdist.train.stragglers import StragglerWatch

WORST_MISTAKES = 50  # images in W&B's table


class Recorder:
    """Records one attempt of a training whose state is `state`."""

    def __init__(self, setup: Setup, accelerator: Accelerator, run: Run, state: TrainingState):
        self.config, self.plan, self.order = setup.config, setup.plan, setup.order
        self.run, self.state = run, state
        self.is_main = accelerator.is_main_process
        self.classes = setup.splits.info.classes
        self.data_set = setup.splits.info.name
        self.gradient_norm = math.nan  # of the last step with a line in the log
        self.logged = (self.order.images_seen(state.step), state.train_seconds)  # images and seconds at the last line
        total_steps = self.order.total_steps(self.config.train.epochs)
        self.display = Display(self.order, num_epochs=-(-total_steps // self.order.steps_per_epoch))
        self.tracker = start_tracker(run, self.config, self.display.print)
        self.stragglers = StragglerWatch(accelerator, len(state.strategy.sharding.own), self.display.print)
        steps = self.config.train.profile
        self.profiler = start_profiler(steps, accelerator.device, run.folder) if self.is_main else NullProfiler()

    @property
    def epoch(self) -> float:
        return self.state.step / self.order.steps_per_epoch

    def measure_gradient(self) -> None:
        """Measures the gradient's norm, on the main rank, before it is clipped."""
        if self.is_main:
            scale = self.state.scaler.get_scale() if self.state.scaler else 1.0
            gradients = (p.grad for p in self.state.model.parameters() if p.grad is not None)
            self.gradient_norm = norm(gradients) / scale if scale else math.nan

    def step(self) -> None:
        """Notes that a step has been taken."""
        self.profiler.step()
        self.display.step(self.state.step)

    def log(self, stats: StepStats) -> None:
        """Logs the step just taken; the loss is that of its global batch before the update. Collective."""
        times = self.state.timer.lap()
        images, seconds = self.logged
        self.logged = (self.order.images_seen(self.state.step), self.state.train_seconds)
        rate = (self.logged[0] - images) / (self.logged[1] - seconds)
        values = {"train/loss": stats.loss, "train/lr": self.state.optimizer.param_groups[0]["lr"]}
        values |= {"train/images_per_second": rate} | {f"time/{name}": round(s, 6) for name, s in times.items()}
        values |= self.stragglers.metrics(times)
        if self.is_main:
            norms = {"train/gradient_norm": self.gradient_norm, "train/weight_norm": norm(self.state.model.parameters())}
            values |= {name: value for name, value in norms.items() if math.isfinite(value)}  # fp16 overflows now and then
        self.tracker.log(values, self.state.step, self.epoch)
        self.display.log(self.state.step, stats.loss, rate)

    def evaluation(self, results: dict[str, Evaluation]) -> None:
        """Logs and shows the results on the splits that were evaluated, ``test`` among them."""
        values = {name: value for split, result in results.items() for name, value in result.metrics(split).items()}
        chart = confusion_chart(results["test"].confusion, self.classes)
        self.tracker.log(values, self.state.step, self.epoch, {"test/confusion": chart})
        self.display.test(self.epoch, results["test"])

    def stop(self) -> bool:
        """Records on the main rank that the run was asked to stop and is saved; returns whether the file STOP asked for it."""
        self.display.close()
        by_file = self.run.stop_file.exists()
        remove(self.run.stop_file)
        record_end(self.run.folder, stopped=True)
        self.tracker.stop()
        return by_file

    def close(self) -> None:
        """Ends bar, profile and tracking of a training that has failed or was stopped, in a process that goes on."""
        self.display.close()
        self._end_profile()
        self.tracker.close()

    def finish(self, result: Evaluation, ended: str | None, test: AnySet, memory: list[dict[str, float | None]]) -> None:
        """Writes predictions and result, and shows them; `ended` is the key by which the training has ended, `memory` the peak
        memory of each rank.

        Raises:
            Fault: one of the two cannot be written; the last checkpoint is there, from which they are made again.
        """
        self.display.close()
        self._end_profile()
        if not self.is_main:
            return
        record = self._result(result, ended, memory)
        with _needed_at_the_end(PREDICTIONS):
            save_predictions(result, self.run.folder / PREDICTIONS)
        images, seconds = self.order.images_seen(self.state.step), self.state.train_seconds
        if ended == "train.patience" and (best := self.state.best):
            self.display.print(
                f"\nended by train.patience={self.config.train.patience}: accuracy on held-out images has not risen since step"
                f" {best['step']:,} ({100 * best['accuracy']:.2f} %), whose weights other commands take with --checkpoint best"
            )
        self.display.print(f"\n{self.data_set} test: {result}")
        if seconds:
            self.display.print(f"trained {images:,} images in {seconds:.1f} s, {images / seconds:,.0f} images/s")
        self.tracker.finish(record, {"test/worst_mistakes": _worst_mistakes(result, test)}, self._weights_file())
        # Last, since a run that has its result is finished: one that is killed before is ended again, for W&B too.
        with _needed_at_the_end(RESULT):
            atomic_write(self.run.folder / RESULT, json.dumps(record, indent=1).encode() + b"\n")
        remove(self.run.stop_file)  # of a request that came too late
        folder = shlex.quote(str(self.run.folder))
        self.display.print(f"files in {self.run.folder}; next: python -m digitdist.evaluate {folder}")

    def _end_profile(self) -> None:
        self.profiler.stop()
        self.profiler = NullProfiler()

    def _result(self, result: Evaluation, ended: str | None, memory: list[dict[str, float | None]]) -> dict[str, Any]:
        """What ``result.json`` holds."""
        seconds = self.state.train_seconds
        return {
            "test_correct": result.correct,
            "test_total": result.total,
            "test_accuracy": result.accuracy,
            "test_loss": result.mean_loss,
            "epochs": self.epoch,
            "steps": self.state.step,
            "ended": ended,
            "world_size": self.plan.world.size,
            "device": self.plan.device_type,
            "precision": self.plan.precision,
            "images_per_second": self.order.images_seen(self.state.step) / seconds if seconds else None,
            "train_seconds": seconds,
            "peak_memory_mb": memory,
            "weights_sha256": weights_sha256(model_state(self.state.average.eval_model)),
        }

    def _weights_file(self) -> Path | None:
        """The file of the final weights, where it is to be an artifact."""
        if not self.config.tracking.artifacts:
            return None
        name = "ema" if self.config.optim.ema else "model"
        return self.run.checkpoints / folder_name(self.state.step) / f"{name}.safetensors"


@contextlib.contextmanager
def _needed_at_the_end(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Fault(
            f"{name} cannot be written ({in_one_line(error)}); the last checkpoint is there: the same command makes it again"
        ) from None


def _worst_mistakes(result: Evaluation, test: AnySet) -> Media:
    rows = result.worst_mistakes(WORST_MISTAKES)
    names = ("index", "label", "prediction", "probability", "loss")
    images = test.read(torch.from_numpy(result.index[rows])).images.cpu()
    return image_table(displayable(images), {name: getattr(result, name)[rows].tolist() for name in names})
