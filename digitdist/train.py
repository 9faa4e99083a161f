"""The trainer and its command.

accelerate launch -m digitdist.train [--config FILE] [key=value ...]
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import digitdist
from digitdist import checkpoint, evaluate, models, optim, runtime, sync, tracking
from digitdist import config as configuration
from digitdist.checkpoint import Checkpoint
from digitdist.config import Config, Parser, UserError, is_main
from digitdist.data import SPECS, Order, Splits, load_splits
from digitdist.runtime import Fault, Plan, Stopped, say

RUN_FILES = ("metrics.jsonl", "result.json", "predictions.npz", "environment.json", "trace.json")
PROFILE_WARMUP = 3  # steps
WORST_MISTAKES = 50  # images in W&B's table
LOCAL_KEYS = ("data.root", "run.dir")  # may differ from host to host
LAG = 0.2  # a rank is named that needs more than this part more time than the others


class Trainer:
    """One training: its state is the model, the optimizer, the moving average, and the step."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        splits: Splits,
        model: nn.Module,
        run: Run,
        heartbeat: runtime.Heartbeat,
    ):
        self.config, self.accelerator, self.run, self.heartbeat = config, accelerator, run, heartbeat
        self.is_main = accelerator.is_main_process  # asked in each step; Accelerate takes a while to say it
        self.reads_at_once = accelerator.device.type == "cpu"  # what is told in a step; elsewhere the host would have to wait
        self.splits = splits.to(accelerator.device)
        self.order = Order.of(config, splits.train)
        self.hardness = sync.Hardness(self.splits.train) if config.data.focus > 1 else None
        self.total_steps = self.order.total_steps(config.train.epochs)
        self.last_step = self.order.last_step(config.train)

        self.model = model.to(accelerator.device).to(memory_format=torch.channels_last)
        self.ema = None
        if config.optim.ema:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema))
            self.ema.n_averaged = self.ema.n_averaged.cpu()  # it is looked at in each update
        self.optimizer = optim.build(self.model, config.optim)
        if config.train.compile != "none":
            self.model.compile(mode=config.train.compile)  # in place: the weights keep their names
        self.sync = sync.build(config, accelerator, self.model, self.heartbeat.enter)
        # Accelerate's wrapper scales and unscales under fp16; else it would only cost 0.1 ms a step.
        self.stepper = accelerator.prepare_optimizer(self.optimizer) if accelerator.scaler else self.optimizer

        self.evaluate_every = config.train.eval_every * self.order.steps_per_epoch  # steps
        self.step = 0
        self.train_seconds = 0.0
        self.best: dict[str, Any] | None = None  # step and accuracy of the best evaluation on held-out images
        self.result: evaluate.Evaluation | None = None  # on the test images, of the last evaluation
        if run.stored:
            self._restore(run.stored)
        self.met = self.step  # the step after which the ranks last met
        self.logged = (self.order.images_seen(self.step), self.train_seconds)  # images and seconds at the last line
        self.gradient_norm = math.nan  # of the last step that has a line
        self.lagging: list[int | None] = [None]  # the rank that lagged at each line
        self.stop = runtime.StopRequest()
        self.tracker = run.tracker(config)
        self.progress = Progress(self.order, self.total_steps, self.is_main)
        self.profiler = profiler(config.train.profile, accelerator.device, run.folder) if self.is_main else None

    @property
    def epoch(self) -> float:
        return self.step / self.order.steps_per_epoch

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def train(self) -> None:
        """Trains from `self.step` to `self.last_step`, and writes the result. Collective: every rank must call it.

        Raises:
            Stopped: on request, after a checkpoint.
            Fault: the loss is not finite (no weight and no checkpoint has seen it), the ranks' weights differ, or the last
                checkpoint cannot be written.
        """
        self.heartbeat.lap()
        self.heartbeat.enter("data")
        mark = time.perf_counter()
        while self.step < self.last_step:
            for batch in self.order.batches(self.splits.train, self.step, self.sync.sharding, self._hardest()):
                agreed = self.train_step(batch)
                self.train_seconds += time.perf_counter() - mark
                if agreed:
                    self.after_meeting(agreed)
                mark = time.perf_counter()
                if self.step == self.last_step:
                    break
                self.heartbeat.enter("data")
        self.finish()

    def after_meeting(self, agreed: sync.Agreed) -> None:
        """What is due since the last meeting: a line, an evaluation, a checkpoint, the end. Collective."""
        done = self.step == self.last_step
        if self._has_line(self.step):
            self.log(agreed)
        improved = False
        if done or self._due(self.evaluate_every):
            improved = self.score()
        stop = agreed.stops > 0 and not done
        if stop:
            self.sync.settle(self.step)
        if done or stop or improved or self._due(self.config.checkpoint.every_steps):
            self.save(last=done or stop)
        self.met = self.step
        if stop:
            self._leave()

    def train_step(self, batch: sync.Batch) -> sync.Agreed | None:
        """One update, by this rank's share of a global batch. What was agreed on, where the ranks met (in local mode they do
        not in every step) and the host looks. Collective."""
        self.heartbeat.step = self.step + 1
        config = self.config.optim
        count = self.order.batch_count(self.step)
        told = self.sync.gradients(batch, count, self.step, self.stop.wanted(self.run.stop_file))
        if self.hardness:
            self.hardness.note(batch[2], self.sync.objective.of_images)
        agreed = self._read(told) if told is not None and self._looks_at(self.step + 1) else None
        self.heartbeat.enter("update")
        if self.is_main and self._has_line(self.step + 1):
            scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
            self.gradient_norm = optim.norm(p.grad for p in self.model.parameters() if p.grad is not None) / scale
        if config.clip_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        optim.set_learning_rate(self.optimizer, self.learning_rate())
        self.stepper.step()
        self.stepper.zero_grad()
        if self.ema:
            self.ema.update_parameters(self.model)
        self.step += 1
        if told is None and (self._is_common(self.step) or self.step % self.config.sync.every == 0):
            agreed = self.sync.end_round(self._networks(), self.step, self._is_common(self.step))
        if agreed and not self.sync.under_way and self._due(self.config.sync.check_every):
            self.heartbeat.enter("sync")
            self._check_equal()
        if self.profiler:
            self.profiler.step()
        return agreed

    def _looks_at(self, step: int) -> bool:
        """Whether the host reads what was agreed on in `step`: on a CPU always, elsewhere where something is due."""
        return self.reads_at_once or self._has_line(step) or self._is_common(step)

    def _read(self, told: sync.Told) -> sync.Agreed:
        """What was agreed on in this step, on the host. Collective where it raises.

        Raises:
            Fault: the loss is not finite; no weight that it has reached is evaluated or saved.
        """
        if not self.reads_at_once:
            self.heartbeat.enter("backward")  # whose end the host now waits for
        agreed = sync.Agreed.read(told)
        sync.check_finite(agreed, self.sync.own_losses, self.step + 1)
        return agreed

    def learning_rate(self) -> float:
        """Of the update that follows `self.step`."""
        steps = self.order.steps_per_epoch
        return optim.learning_rate(self.step, self.total_steps, steps, self.config.schedule, self.config.optim.lr)

    def log(self, agreed: sync.Agreed) -> None:
        """The training line of the step just taken, whose loss is that of its global batch before the update. Collective."""
        self.heartbeat.enter("log")
        times = self.heartbeat.lap()
        images, seconds = self.logged
        self.logged = (self.order.images_seen(self.step), self.train_seconds)
        rate = (self.logged[0] - images) / (self.logged[1] - seconds)
        values = {"train/loss": agreed.loss, "train/lr": self.optimizer.param_groups[0]["lr"]}
        values |= {"train/images_per_second": rate} | {f"time/{name}": round(s, 6) for name, s in times.items()}
        if self.accelerator.num_processes > 1:
            values |= self._name_the_slowest(times)
        if self.is_main:
            norms = {"train/gradient_norm": self.gradient_norm, "train/weight_norm": optim.norm(self.model.parameters())}
            values |= {name: norm for name, norm in norms.items() if math.isfinite(norm)}  # fp16 overflows now and then
        self.tracker.log(values, self.step, self.epoch)
        self.progress.show(self.step, agreed.loss, rate)

    def _name_the_slowest(self, times: dict[str, float]) -> dict[str, float]:
        """The rank that lags behind the others, told once where it does so at two lines in a row. Collective."""
        parts = max(1, len(self.sync.sharding.mine))  # a rank may have more of them than another
        rank, lag = sync.slowest_rank(self.accelerator, (times["data"] + times["compute"]) / parts)
        if lag <= LAG:
            self.lagging.append(None)
            return {}
        if self.lagging[-1] == rank and (rank, rank) not in zip(self.lagging, self.lagging[1:], strict=False):
            say(f"rank {rank} lags: its own part of a step takes {100 * lag:.0f} % more time than that of the others")
        self.lagging.append(rank)
        return {"time/slowest_rank": rank}

    def score(self) -> bool:
        """Scores the held-out and the test images, logs them; True where the held-out score is the best. Collective."""
        self.heartbeat.enter("eval")
        improved, values = False, {}
        if len(self.splits.validation):
            held_out = self._score("validation")
            values = _metrics("validation", held_out)
            improved = self.best is None or held_out.accuracy > self.best["accuracy"]
            if improved:
                self.best = {"step": self.step, "accuracy": held_out.accuracy}
        test = self._score("test")
        self.result = test
        confusion = tracking.confusion_chart(test.confusion, SPECS[self.config.data.name].classes)
        self.tracker.log(values | _metrics("test", test), self.step, self.epoch, {"test/confusion": confusion})
        self.progress.show_test(self.epoch, test)
        return improved

    def save(self, last: bool) -> None:
        """Writes a checkpoint, by the main rank. Collective: every rank must call it.

        Raises:
            Fault: a weight is not finite, or the `last` checkpoint cannot be written; an earlier one may fail.
        """
        self.sync.agree_on_buffers(self._networks())
        self.heartbeat.enter("save")
        if not all(bool(t.isfinite().all()) for t in self.model.state_dict().values()):
            raise Fault(f"a weight is not finite after step {self.step}; no checkpoint has seen it")
        of_sync = self.sync.state(self.optimizer)
        if self.hardness:
            of_sync["hardness"] = self.hardness.state()
        failure = self._write_checkpoint(of_sync) if self.is_main else None
        if last:
            failure = runtime.on_main(self.accelerator, lambda: failure)
            if failure:
                raise Fault(f"the last checkpoint, of step {self.step}, cannot be written: {failure}")
        elif failure:
            say(f"the checkpoint of step {self.step} cannot be written ({failure}); training goes on, older ones are kept")

    def finish(self) -> None:
        """Writes predictions and result, and tells them. Collective: every rank must call it."""
        self.progress.close()
        self.heartbeat.enter("eval")
        result = self.result or self._score("test")  # none where a restart finds the last step saved
        memory = gather_object([runtime.peak_memory_mb(self.accelerator.device)])
        if self.profiler:
            self.profiler.stop()
        if self.is_main:
            seen = self.order.images_seen(self.step)
            report = {
                "test_correct": result.correct,
                "test_total": result.total,
                "test_accuracy": result.accuracy,
                "test_loss": result.mean_loss,
                "epochs": self.epoch,
                "steps": self.step,
                "world_size": self.accelerator.num_processes,
                "device": self.accelerator.device.type,
                "precision": self.run.plan.precision,
                "images_per_second": seen / self.train_seconds if self.train_seconds else None,
                "train_seconds": self.train_seconds,
                "peak_memory_mb": memory,
                "weights_sha256": checkpoint.weights_sha256(self.judged.state_dict()),
            }
            evaluate.save_predictions(result, self.run.folder / "predictions.npz")
            checkpoint.write_whole(self.run.folder / "result.json", json.dumps(report, indent=1).encode() + b"\n")
            say(f"\n{self.config.data.name} test: {evaluate.in_words(result)}")
            if self.train_seconds:
                say(f"trained {seen:,} images in {self.train_seconds:.1f} s, {seen / self.train_seconds:,.0f} images/s")
            say(f"files in {self.run.folder}; next: python -m digitdist.evaluate {self.run.folder}")
            self.tracker.finish(report, {"test/worst_mistakes": self._worst_mistakes(result)}, self._weights_file())

    def _leave(self) -> None:
        """Ends a run that was asked to stop, after its checkpoint."""
        self.progress.close()
        if self.is_main:
            self.run.stop_file.unlink(missing_ok=True)
            note_end(self.run.folder, {"stopped": True})
            self.tracker.finish({})
        raise Stopped(
            f"stopped on request after step {self.step:,}, saved in {self.run.folder};"
            f" to go on, run the same command again (with run.name={self.run.folder.name})"
        )

    def _worst_mistakes(self, result: evaluate.Evaluation) -> tracking.Media:
        rows = result.worst_mistakes(WORST_MISTAKES)
        names = ("index", "label", "prediction", "probability", "loss")
        images = self.splits.test.images[torch.from_numpy(result.index[rows]).to(self.accelerator.device)]
        return tracking.image_table(images.cpu().numpy(), {name: getattr(result, name)[rows].tolist() for name in names})

    def _weights_file(self) -> Path | None:
        """The file of the final weights, where it is to be an artifact."""
        if not self.config.tracking.artifacts:
            return None
        name = "ema" if self.ema else "model"
        return self.run.checkpoints / checkpoint.folder_name(self.step) / f"{name}.safetensors"

    def _has_line(self, step: int) -> bool:
        return step == self.last_step or step // self.config.train.log_every > self.met // self.config.train.log_every

    def _due(self, every: int) -> bool:
        """True where a multiple of `every` steps has been reached since the ranks last met; never for 0."""
        return every > 0 and self.step // every > self.met // every

    def _is_common(self, step: int) -> bool:
        """True where the weights of all ranks after `step` are evaluated or saved, and so must be equal."""
        every = (self.evaluate_every, self.config.checkpoint.every_steps)
        return step == self.last_step or any(steps and step % steps == 0 for steps in every)

    def _networks(self) -> list[nn.Module]:
        return [self.model, self.judged] if self.ema else [self.model]

    def _score(self, split: str) -> evaluate.Evaluation:
        self.sync.agree_on_buffers(self._networks())
        return evaluate.evaluate(self.accelerator, self.judged, getattr(self.splits, split), self.config)

    def _hardest(self) -> torch.Tensor | None:
        """The order of difficulty by which the stretch that begins or goes on here is focused. Collective."""
        if self.hardness is None or self.step < self.order.steps_per_epoch:
            return None
        if self.step == self.order.stretch(self.step)[0]:
            self.heartbeat.enter("sync")
            self.hardness.meet()
            self.heartbeat.enter("data")
        return self.hardness.hardest()

    def _check_equal(self) -> None:
        tensors: dict[str, torch.Tensor] = dict(self.model.named_parameters())
        if self.config.sync.mode == "exact":  # in ddp, a rank's buffers are its own until they are needed
            tensors |= dict(self.model.named_buffers())
        sync.check_equal(tensors, self.step)

    def _write_checkpoint(self, of_sync: dict[str, checkpoint.Tensors]) -> str | None:
        """Writes a checkpoint; returns why it could not, if so."""
        best = checkpoint.folder_name(self.best["step"]) if self.best else None
        try:
            checkpoint.write(
                self.run.checkpoints,
                self._checkpoint(of_sync),
                self.config.checkpoint.keep,
                best,
                on_file=lambda: self.heartbeat.enter("save"),
            )
        except (OSError, checkpoint.DamagedCheckpoint) as error:
            return str(error)
        return None

    def _checkpoint(self, of_sync: dict[str, checkpoint.Tensors]) -> Checkpoint:
        tensors = {"model": self.model.state_dict(), "optimizer": optim.state_tensors(self.optimizer)} | of_sync
        if self.ema:
            tensors["ema"] = self.ema.module.state_dict()
        state = {
            "step": self.step,
            "train_seconds": self.train_seconds,
            "best": self.best,
            "precision": self.run.plan.precision,
            "world_size": self.accelerator.num_processes,
            "wandb_id": self.run.wandb_id,
            "config": configuration.as_dict(self.config),
        }
        if self.accelerator.scaler:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return Checkpoint(tensors, state)

    def _restore(self, stored: Checkpoint) -> None:
        self.model.load_state_dict(stored.tensors["model"])
        optim.load_state_tensors(self.optimizer, stored.tensors["optimizer"])
        self.sync.restore(stored.tensors, self.optimizer)
        if self.ema:
            self.ema.module.load_state_dict(stored.tensors["ema"])
            self.ema.n_averaged.fill_(stored.step)
        if self.accelerator.scaler and "scaler" in stored.state:
            self.accelerator.scaler.load_state_dict(stored.state["scaler"])
        if self.hardness:
            self.hardness.restore(stored.tensors.get("hardness", {}), self.is_main)
        self.step, self.train_seconds = stored.step, stored.state["train_seconds"]
        self.best = stored.state["best"]


class Progress:
    """What a person sees of a training: a bar on a terminal, plain lines elsewhere, nothing off the main rank."""

    def __init__(self, order: Order, total_steps: int, shown: bool):
        self.order, self.shown = order, shown
        self.epochs = -(-total_steps // order.steps_per_epoch)
        self.bar: Any = None

    def show(self, step: int, loss: float, images_per_second: float) -> None:
        """The training line after `step`."""
        if not self.shown:
            return
        epoch, count = -(-step // self.order.steps_per_epoch), self.order.count
        seen = self.order.images_seen(step) - (epoch - 1) * count
        if not sys.stdout.isatty():
            share = f"[{seen:>{len(f'{count:,}')},}/{count:,} ({100 * seen / count:3.0f} %)]"
            print(f"Train epoch {epoch} {share} loss {loss:.4f}, {images_per_second:,.0f} images/s", flush=True)
            return
        title = f"epoch {epoch}/{self.epochs}"
        if self.bar is None or self.bar.desc != title:
            self.close()
            columns, rows = shutil.get_terminal_size()
            size = {"ncols": columns, "nrows": rows}  # tqdm's own look draws nothing on a terminal that tells no size
            self.bar = tqdm(total=count, desc=title, unit=" images", file=sys.stdout, leave=False, **size)
        self.bar.n = seen
        self.bar.set_postfix_str(f"loss {loss:.4f}")  # and draws

    def show_test(self, epoch: float, result: evaluate.Evaluation) -> None:
        """The test line after an epoch."""
        self.close()
        if self.shown:
            score = f"{result.correct}/{result.total} ({100 * result.accuracy:.2f} %)"
            print(f"Test epoch {round(epoch, 2):g}: loss {result.mean_loss:.4f}, accuracy {score}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


@dataclass
class Run:
    """A run's folder, opened by the main rank for this training and known to all."""

    folder: Path
    plan: Plan
    host: str  # the main rank's, which holds the folder
    token: str  # of this start
    wandb_id: str
    stored: Checkpoint | None  # what it goes on from
    finished: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def stop_file(self) -> Path:
        return self.folder / "STOP"

    @property
    def heartbeat(self) -> Path:
        """The file of a host's ranks: in the run's folder on the main rank's host, in the temporary one elsewhere, since
        hosts cannot map one file together."""
        here = platform.node() == self.host and self.visible
        return self.folder / self.heartbeat_name if here else Path(tempfile.gettempdir()) / f"digitdist{self.heartbeat_name}"

    @property
    def visible(self) -> bool:
        """Whether this host sees the folder that the main rank has opened."""
        return (self.folder / self.heartbeat_name).exists()

    @property
    def heartbeat_name(self) -> str:
        return f".heartbeat-{self.token}"

    def tracker(self, config: Config) -> tracking.Tracker:
        if not is_main():
            return tracking.NullTracker()
        if config.tracking.wandb == "disabled":
            return tracking.RunTracker(self.folder, None, say)
        settings = {name: getattr(config.tracking, name) for name in ("project", "entity", "group", "tags", "notes")}
        settings["name"] = config.tracking.name or self.folder.name
        settings["config"] = configuration.as_dict(config) | {"environment": _read_starts(self.folder)[-1]}
        wandb = tracking.Wandb(config.tracking.wandb, self.folder, self.wandb_id, settings, say)
        return tracking.RunTracker(self.folder, wandb, say)


def card(config: Config, plan: Plan, splits: Splits, model: nn.Module) -> dict[str, str]:
    """What must be the same on every rank: the configuration but for a host's folders, code, data, model, what it runs on."""
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))))
    return {name: str(value) for name, value in configuration.as_dict(config).items() if name not in LOCAL_KEYS} | {
        "digitdist": f"version {digitdist.__version__} with sources {code.hexdigest()[:12]}",
        "torch": f"version {torch.__version__}",
        "device": plan.device_type,
        "effective train.precision": plan.precision,
        "data": f"of SHA-256 {splits.sha256()[:12]}",
        "model": ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items()),
    }


def fetch_run(config: Config, plan: Plan, launchers: list[float]) -> None:
    """Brings the run to the main rank's host where another host has come further with it. Collective: every rank must call it.

    Where hosts share no folder, the main rank's holds the run; a launcher that starts it anew may make it another one.
    """
    world, runs = plan.world, Path(config.run.dir)
    if world.size == world.local_size or config.checkpoint.resume == "never":
        return
    name = config.run.name or _run_of(runs, launchers)
    stored = None
    if name and world.local_rank == 0:
        stored = checkpoint.newest_good(runs / name / "checkpoints", lambda _: None)
    views = gather_object([(stored.step if stored else -1, name, platform.node())])
    holder = max(range(world.size), key=lambda rank: (views[rank][0], -rank))
    at, name, host = views[holder]
    if at <= views[0][0]:
        return
    files = [_pack(runs / name, stored) if stored and world.rank == holder else {}]
    broadcast_object_list(files, from_process=holder)
    if world.rank == 0:
        for path, content in files[0].items():
            (runs / name / path).parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_whole(runs / name / path, content)
        say(f"{runs / name}: fetched from host {host}, which has it up to step {at:,}")


def _pack(folder: Path, stored: Checkpoint) -> dict[str, bytes]:
    """The files of a run that it needs to go on elsewhere: path to content, in the order in which to write them."""
    steps = {stored.step, stored.state["best"]["step"] if stored.state["best"] else stored.step}
    inner = [file for step in steps for file in (folder / "checkpoints" / checkpoint.folder_name(step)).glob("*")]
    inner.sort(key=lambda file: file.name == checkpoint.MANIFEST)  # without which the others are no checkpoint yet
    files = [*(folder / name for name in RUN_FILES), *inner]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.exists()}


def open_run(config: Config, plan: Plan, last_step: int, held: list[FileLock], launchers: list[float]) -> Run:
    """Opens the run's folder on the main rank: locks it, finds what to go on from, cuts the metrics to it.

    `launchers` are the starts of those that have started the ranks, by which workers that they restart find their run.

    Raises:
        UserError: another training works in the folder, or the run cannot go on with this configuration.
    """
    runs = Path(config.run.dir)
    folder = runs / (config.run.name or _run_of(runs, launchers) or _name_from_time(runs))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.append(FileLock(folder / ".lock"))  # dies with this process
        held[0].acquire(timeout=1)
    except Timeout:
        raise UserError(f"{folder}: another training works in this run; wait for it, or give another run.name") from None
    except OSError as error:
        raise UserError(f"run.dir: {error.filename}: {error.strerror}; give a folder you can write to") from None

    run = Run(folder, plan, platform.node(), secrets.token_hex(8), "", None)
    if config.checkpoint.resume == "never":
        _clear(folder)
    run.stored = checkpoint.newest_good(run.checkpoints, say)
    if run.stored is None and config.checkpoint.resume not in ("auto", "never"):
        run.stored = _checkpoint_at(Path(config.checkpoint.resume))
    if run.stored:
        _check_unchanged(config, plan, run.stored)
        run.finished = run.stored.step >= last_step and (folder / "result.json").is_file()
        if run.finished:
            return run
        for name in ("result.json", "predictions.npz"):  # of the end that is now to be passed
            (folder / name).unlink(missing_ok=True)
    starts = _note_last_end(folder, _read_starts(folder))
    _check_progress(folder, starts, launchers, plan.world.size)
    run.wandb_id = starts[0]["wandb_id"] if starts else os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    tracking.cut_metrics(folder, run.stored.step if run.stored else -1)
    step = run.stored.step if run.stored else 0
    starts.append({**environment(plan), "step": step, "wandb_id": run.wandb_id, "launchers": launchers})
    _write_starts(folder, starts)
    (folder / run.heartbeat_name).touch()
    config.run.name = folder.name
    configuration.save(config, folder / "config.yaml")
    return run


def environment(plan: Plan) -> dict[str, Any]:
    """What this start of a run runs on."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "device": plan.device_type,
        "device_name": runtime.device_name(plan),
        "world_size": plan.world.size,
        "precision": plan.precision,
        "threads": plan.threads,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "digitdist": digitdist.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "git_commit": commit.stdout.strip() if commit and commit.returncode == 0 else None,
        "command": sys.argv,
    }


def introduction(config: Config, plan: Plan, splits: Splits, order: Order, last_step: int, run: Run) -> str:
    """The first lines of a run: what it runs on, and what it is about to do. Collective: every rank must call it."""
    blind = sorted(set(gather_object([] if run.visible else [platform.node()])))
    world, accumulate = plan.world.size, config.train.accumulate
    low, high = order.batch_size // (world * accumulate), -(-order.batch_size // (world * accumulate))
    share = f"{high}" if low == high else f"{low} or {high}"
    several = world > plan.world.local_size
    processes = f"{world} process{'es' if world > 1 else ''}{', on several hosts' if several else ''}"
    holder = f" on {run.host}{', not seen by ' + ', '.join(blind) if blind else ''}" if several else ""
    held_out = f", {len(splits.validation):,} held out" if len(splits.validation) else ""
    focus = f", {order.focus} passes over hard images from the second one on" if order.focus > 1 else ""
    state = f"goes on from step {run.stored.step:,}" if run.stored else "starts"
    lines = [
        *plan.notes,
        f"device     {plan.device_type} ({runtime.device_name(plan)}), world size {world}: {processes}",
        f"precision  {plan.precision}, sync {config.sync.mode}, threads {plan.threads} a process",
        f"batch      {order.batch_size:,} global = {share} per rank × {world} rank{'s' if world > 1 else ''}"
        f" × {accumulate} accumulated",
        f"data       {config.data.name}: {len(splits.train):,} images to train{held_out}, {len(splits.test):,} to test",
        f"steps      {last_step:,}, {order.steps_per_epoch:,} an epoch{focus}",
        f"run        {run.folder}{holder} {state}",
    ]
    return "\n".join(lines)


def _run_of(runs: Path, launchers: list[float]) -> str | None:
    """The newest run that one of these launchers has started before, as it does to go on with it; None where there is none."""
    folders = [file.parent for file in runs.glob("*/environment.json")]
    if not runtime.restart_count():  # a launcher in a program may start several runs, one after another
        folders = [folder for folder in folders if not (folder / "result.json").exists()]
    return max((folder.name for folder in folders if _started_by(_read_starts(folder)[-1:], launchers)), default=None)


def _started_by(starts: list[dict[str, Any]], launchers: list[float]) -> list[dict[str, Any]]:
    return [start for start in starts if set(start.get("launchers", ())) & set(launchers)]


def _name_from_time(runs: Path) -> str:
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if not (runs / n).exists())


def _clear(folder: Path) -> None:
    """Removes what a former training has left in the folder of a run that starts over."""
    for name in ("checkpoints", "wandb", "plots"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def _checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint in `path`, or the newest good one of the run there."""
    try:
        stored = checkpoint.newest_good(path / "checkpoints", say) or checkpoint.read(path)
    except checkpoint.DamagedCheckpoint as damage:
        raise UserError(f"checkpoint.resume={path}: {damage}; give auto, never or a good checkpoint's folder") from None
    return stored


def _check_unchanged(config: Config, plan: Plan, stored: Checkpoint) -> None:
    """Refuses to go on under a configuration that would give another result than the one the run began with."""
    differences = configuration.changes(stored.state["config"], configuration.as_dict(config))
    if stored.state["precision"] != plan.precision:
        differences.append(f"effective train.precision was {stored.state['precision']} and is now {plan.precision}")
    if differences and not config.checkpoint.allow_change:
        advice = "set it back, give another run.name, or set checkpoint.allow_change=true"
        raise UserError(*(f"{stored.folder}: {difference}; {advice}" for difference in differences))


def note_end(folder: Path, what: dict[str, Any]) -> None:
    """Notes in ``environment.json`` how the last start of a run ended."""
    starts = _read_starts(folder)
    starts[-1] |= what
    _write_starts(folder, starts)


def _note_last_end(folder: Path, starts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to the last start how far its ranks had come, from their heartbeats, which are then removed."""
    for file in folder.glob(".heartbeat-*"):
        beats = runtime.read_beats(file.read_bytes())
        if starts and beats:
            furthest = max(beats, key=lambda beat: beat.step)
            starts[-1] |= {"reached": furthest.step}
            if "stopped" not in starts[-1]:
                starts[-1].setdefault("fault", f"rank {furthest.rank} ended without a word at {furthest}")
        file.unlink()
    return starts


def _check_progress(folder: Path, starts: list[dict[str, Any]], launchers: list[float], world_size: int) -> None:
    """Ends what the launcher restarts in vain.

    Raises:
        Stopped: the workers before these were asked to stop, and not by a launcher that has found more hosts meanwhile.
        Fault: the launcher has restarted them twice without a step of progress.
    """
    mine = _started_by(starts, launchers)
    if mine and mine[-1].get("stopped") and world_size <= mine[-1]["world_size"]:
        raise Stopped(f"{folder}: stopped on request; the launcher's restart does not change that")
    faulty = [start for start in mine if not start.get("stopped")]
    reached = [start.get("reached", 0) for start in faulty]
    if len(reached) > 2 and max(reached[-2:]) <= max(reached[:-2]):
        raise Fault(f"{folder}: restarted twice without a step of progress; the cause: {faulty[-1]['fault']}")


def _write_starts(folder: Path, starts: list[dict[str, Any]]) -> None:
    checkpoint.write_whole(folder / "environment.json", json.dumps({"starts": starts}, indent=1).encode() + b"\n")


def _read_starts(folder: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((folder / "environment.json").read_text())["starts"]
    except FileNotFoundError:
        return []


def profiler(steps: int, device: torch.device, folder: Path) -> torch.profiler.profile | None:
    """Begins to profile `steps` steps after a warm-up, into ``trace.json``, which Perfetto and Chrome open."""
    if not steps:
        return None
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    running = torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=0, warmup=PROFILE_WARMUP, active=steps, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(folder / "trace.json")),
    )
    running.start()
    return running


def _metrics(split: str, result: evaluate.Evaluation) -> dict[str, float]:
    values = {"loss": result.mean_loss, "accuracy": result.accuracy, "correct": result.correct, "total": result.total}
    return {f"{split}/{name}": value for name, value in values.items()}


def prepare(files: Sequence[str], overrides: Sequence[str]) -> tuple[Config, Plan, Splits, nn.Module]:
    """All that a training needs before its process group exists.

    Raises:
        UserError: with every mistake of configuration, launch and model, before anything is made; then that of the data.
    """
    config, mistakes = configuration.read(files, overrides)
    plan = model = None
    try:
        plan = runtime.plan(config)
    except UserError as error:
        mistakes += error.mistakes
    try:
        model = models.build(config.model, config.seed)
    except UserError as error:
        mistakes += error.mistakes
    if config.tracking.wandb == "online" and not tracking.has_wandb_key():
        mistakes.append("tracking.wandb=online needs a key: run wandb login, or set tracking.wandb=offline")
    if is_main() and not os.access(configuration.nearest_folder(Path(config.run.dir)), os.W_OK | os.X_OK):
        mistakes.append(f"run.dir={config.run.dir}: no permission to write there; give a folder that you own")
    if mistakes or plan is None or model is None:
        raise UserError(*mistakes)
    return config, plan, load_splits(config.data, config.seed), model


@contextlib.contextmanager
def blaming(heartbeat: runtime.Heartbeat, run: Run) -> Iterator[None]:
    """Finds out which rank ended the run where one did, tells it once a host, and ends the others with exit code 1."""
    try:
        yield
    except (UserError, Stopped, Fault):
        raise
    except Exception as error:
        if not runtime.collective_failed(error):
            heartbeat.mark(heartbeat.RAISED)
            _note_fault(run, f"rank {runtime.world().rank} raised {error!r} at {heartbeat}")
            raise
        heartbeat.mark(heartbeat.NOTICED)
        culprit, tells = heartbeat.culprit()
        if tells:
            _note_fault(run, culprit)
            print(f"fault: {culprit}; the run ends, and the same command goes on with it", file=sys.stderr, flush=True)
        os._exit(runtime.EXIT_FAULT)


def write_report(folder: Path) -> None:
    """Makes plots and page of a run in a process of its own: whatever becomes of it, the training is done."""
    command = [sys.executable, "-m", "digitdist.report", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        say(f"no report: {made.stderr.strip()[-300:]}; later: python -m digitdist.report {folder}")
    else:
        say(f"report in {folder / 'report.html'}")


def _note_fault(run: Run, text: str) -> None:
    if _read_starts(run.folder) and "fault" not in _read_starts(run.folder)[-1]:
        note_end(run.folder, {"fault": text})


def main() -> None:
    parser = Parser(
        prog="accelerate launch -m digitdist.train",
        description="Trains a digit CNN on whatever the launcher gives: one CPU, one GPU, many of them, many hosts.",
        epilog="example: accelerate launch -m digitdist.train --config configs/quick.yaml train.epochs=1\n\n"
        + configuration.describe(),
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="a YAML file; may be repeated")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides the files; the last one wins")
    arguments = parser.parse_args()

    try:
        config, plan, splits, model = prepare(arguments.config, arguments.overrides)
    except UserError as error:
        runtime.refuse(error)
    if plan.world.size > 1:
        runtime.roll_call(plan.world, card(config, plan, splits, model), config.sync.join_timeout_s)
    order = Order.of(config, splits.train)
    last_step = order.last_step(config.train)

    accelerator = runtime.start(config, plan)
    held: list[FileLock] = []  # for as long as this process lives
    launchers = sorted({start for start in gather_object([runtime.launcher_start()]) if start})
    fetch_run(config, plan, launchers)
    run = runtime.on_main(accelerator, lambda: open_run(config, plan, last_step, held, launchers))
    if run.finished and run.stored:
        say(f"{run.folder} is finished, at step {run.stored.step:,}; raise train.epochs or train.max_steps to go on")
    else:
        say(introduction(config, plan, splits, order, last_step, run))
        heartbeat = runtime.Heartbeat(run.heartbeat, plan.world)
        gc.freeze()  # what is there stays: to look through all of torch for garbage takes 0.1 s in the middle of a step
        with blaming(heartbeat, run):
            Trainer(config, accelerator, splits, model, run, heartbeat).train()
        run.heartbeat.unlink(missing_ok=True)
        if is_main() and config.run.report:
            write_report(run.folder)
    accelerator.end_training()


if __name__ == "__main__":
    runtime.run_command(main)
