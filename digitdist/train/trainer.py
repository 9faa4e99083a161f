"""The trainer: its loop, one step, and what is done where something is due."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from digitdist.checkpoint import Checkpoint, DamagedCheckpoint, folder_name, write
from digitdist.data import Batch, TrainingSampler, prepare_loader
from digitdist.distributed import Heartbeat, StopRequest, check_equal, peak_memory_mb, run_on_main, work_on_main
from digitdist.errors import Fault, Stopped
from digitdist.evaluate import Evaluation, chunked_loader, evaluate
from digitdist.model_state import model_state
from digitdist.optim import learning_rate, set_learning_rate
from digitdist.runs import Run
from digitdist.sync import StepStats, check_finite
from digitdist.train.recorder import Recorder
from digitdist.train.setup import Setup
from digitdist.train.state import build_state


class Trainer:
    """One training. Everything that it depends on is in `state`; ranks last synchronised at `synced_step`."""

    def __init__(
        self, setup: Setup, accelerator: Accelerator, run: Run, heartbeat: Heartbeat, stop_request: StopRequest | None = None
    ):
        config, device = setup.config, accelerator.device
        self.config, self.accelerator, self.run = config, accelerator, run
        self.heartbeat, self.phase = heartbeat, heartbeat.phase
        self.is_main = accelerator.is_main_process
        self.reads_every_step = device.type == "cpu"  # elsewhere the host would have to wait for the device
        self.setup, self.order, self.cadence = setup, setup.order, setup.cadence
        self.splits = setup.splits.to(device)

        self.state = build_state(setup, accelerator, self.splits.train, heartbeat)
        self.strategy, self.average = self.state.strategy, self.state.average
        if run.stored:
            self.state.restore(run.stored, self.is_main)
        self.synced_step = self.step
        self.is_unsaved = False  # whether the last checkpoint could not be written
        self.result: Evaluation | None = None  # of the last evaluation on the test images

        self.sampler = TrainingSampler(self.order, self.strategy.shardings, self.splits.train.indices.device)
        self.loader = prepare_loader(accelerator, self.splits.train, self.sampler)
        evaluated = {"validation": self.splits.validation, "test": self.splits.test}
        self.eval_loaders = {name: chunked_loader(accelerator, images, config) for name, images in evaluated.items()}
        self.recorder = Recorder(setup, accelerator, run, self.state)
        self.stop_request = stop_request or StopRequest()  # which hears the STOP file alone
        self.stop_request.report = self.recorder.display.print

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def ending(self) -> str | None:
        """The key by which the training ends here, if it does; the same on all ranks."""
        return self.setup.ending(self.step, self.state.best)

    def train(self) -> None:
        """Trains from `self.step` to the end, and writes the result. Collective: every rank must call it.

        Raises:
            Stopped: on request, after a checkpoint.
            Fault: the loss is not finite (no weight and no checkpoint has seen it), fp16 takes no step any more, the ranks'
                weights differ, or the last checkpoint cannot be written.
        """
        if self.config.sync.check_every and not self.strategy.ranks_differ:
            self._check_weights()
        for batch in self.batches():
            stats = self.train_step(batch)
            if stats is None:
                continue
            due = self.cadence.between(self.synced_step, self.step)
            self.synced_step = self.step
            if due.log:
                self.log(stats)
            improved = due.evaluate and self.evaluate()
            ending = self.ending is not None
            stopping = stats.stop_requested and not ending
            if due.save or improved or ending or stopping:
                self.save(last=ending or stopping)
            if stopping:
                self.stop()
        self.finish()

    def batches(self) -> Iterator[Batch]:
        """This rank's share of each global batch that is left. Collective: every rank must exhaust it."""
        self.heartbeat.timer.lap()
        while self.ending is None:
            self.phase("data")
            self.sampler.begin(self.step, self.setup.last_step, self._ranking())
            for batch in self.loader:
                yield batch
                self.phase("data")

    def train_step(self, batch: Batch) -> StepStats | None:
        """One update from this rank's share of a global batch. Collective: every rank must call it.

        Returns what ranks know after synchronising; None where they have not (in local mode), or the host need not look.
        """
        step = self.heartbeat.step = self.step + 1
        due = self.cadence.between(self.synced_step, step)
        needs_equal = self.cadence.needs_equal_weights(step)
        synchronises = self.strategy.synchronises(step, needs_equal)
        look = synchronises and (self.reads_every_step or due.log or due.check or needs_equal)
        stop = self.stop_request.is_requested(self.run.stop_file)
        values = self.strategy.compute_gradients(batch, self.order.batch_count(self.step), self.step, stop)
        stats = self._read(values) if look else None
        self.phase("update")
        if due.log and synchronises:
            self.recorder.measure_gradient()
        self._update()
        stats = self.strategy.sync_round(self.average.networks, step, needs_equal, look) or stats
        if due.check and stats and not self.strategy.ranks_differ:
            self._check_weights()
        self.recorder.step()
        return stats

    def _read(self, values: Tensor | None) -> StepStats | None:
        """The stats of the step being taken, on the host. Collective where it raises.

        Raises:
            Fault: the loss is not finite; no weight that it has reached is evaluated or saved.
        """
        if values is None:
            return None
        if not self.reads_every_step:
            self.phase("backward")  # for whose end the host now waits
        stats = StepStats.read(values)
        check_finite(stats, self.strategy.own_losses, self.step + 1)
        return stats

    def _update(self) -> None:
        """Clips the gradient, takes the optimizer's step, and updates the moving average."""
        state, config = self.state, self.config
        if config.optim.clip_norm:
            self.accelerator.clip_grad_norm_(state.model.parameters(), config.optim.clip_norm)
        total_steps = self.order.total_steps(config.train.epochs)
        rate = learning_rate(self.step, total_steps, self.order.steps_per_epoch, config.schedule, config.optim.lr)
        set_learning_rate(state.optimizer, rate)
        state.optimizer.step()
        state.optimizer.zero_grad()
        self.average.update()
        state.step += 1

    def _ranking(self) -> Tensor | None:
        """The ranking of images by which the pass that begins or is resumed here is focused, if it is. Collective."""
        if self.step < self.order.steps_per_epoch:
            return None
        if self.step == self.order.pass_bounds(self.step)[0]:
            self.phase("sync")
            self.state.loss_history.synchronise()
            self.phase("data")
        return self.state.loss_history.ranking()

    def _check_weights(self, equal: Sequence[nn.Module] = ()) -> None:
        """Compares the weights of all ranks, and all that the networks hold that have been made `equal`. Collective."""
        if self.accelerator.num_processes == 1:
            return
        self.phase("sync")
        model, *averages = equal or [self.state.model]
        tensors: dict[str, Tensor] = dict(model.named_parameters())
        if equal or self.config.sync.mode == "exact":  # in ddp mode a rank's buffers are its own until they are needed
            tensors |= dict(model.named_buffers())
        if self.config.sync.mode == "exact":
            tensors |= model_state(model)
        for average in averages:
            named = (*average.named_parameters(), *average.named_buffers())
            tensors |= {f"{name} of the moving average": tensor for name, tensor in named}
        check_equal(tensors, self.step)

    def log(self, stats: StepStats) -> None:
        """Logs the step just taken. Collective: every rank must call it.

        Raises:
            Fault: fp16 takes no step any more.
        """
        self.phase("log")
        self.recorder.log(stats)
        self.state.check_scale()

    def evaluate(self) -> bool:
        """Evaluates on held-out and test images; True where the held-out accuracy is the best so far. Collective."""
        self.strategy.make_equal(self.average.networks, self.step)
        self.phase("eval")
        results = {split: self._evaluate(split) for split in ("validation", "test") if len(getattr(self.splits, split))}
        self.result, best = results["test"], self.state.best
        held_out = results.get("validation")
        improved = held_out is not None and (best is None or held_out.accuracy > best["accuracy"])
        if held_out is not None:
            found = {"step": self.step, "accuracy": held_out.accuracy} if improved or best is None else best
            self.state.best = found | {"evaluated": self.step}
        self.recorder.evaluation(results)
        return improved

    def _evaluate(self, split: str) -> Evaluation:
        return evaluate(self.accelerator, self.average.eval_model, self.eval_loaders[split], self.splits.info)

    def save(self, last: bool) -> None:
        """Writes a checkpoint, by the main rank. Collective: every rank must call it.

        Raises:
            Fault: a weight is not finite, or the `last` checkpoint cannot be written; an earlier one may fail.
        """
        self.strategy.make_equal(self.average.networks, self.step)
        self._check_weights(self.average.networks)
        self.phase("save")
        stored = self.state.to_checkpoint()
        failure = work_on_main(self.accelerator, lambda: self._write(stored), self.heartbeat)
        if failure and last:
            raise Fault(f"the last checkpoint, of step {self.step}, cannot be written: {failure}")
        if failure and not self.is_unsaved:
            self.recorder.display.print(
                f"the checkpoint of step {self.step} cannot be written ({failure}); training continues, older ones are kept"
            )
        elif self.is_unsaved and not failure:
            self.recorder.display.print(f"the checkpoint of step {self.step} is written again")
        self.is_unsaved = bool(failure)

    def _write(self, stored: Checkpoint) -> str | None:
        """Writes a checkpoint; returns why that is not possible, if it is not."""
        best = folder_name(self.state.best["step"]) if self.state.best else None
        show = self.recorder.display.print
        try:
            self.recorder.tracker.flush()  # no checkpoint is ahead of its lines, even if the host fails
            write(self.run.checkpoints, stored, self.config.checkpoint.keep, best, lambda: self.phase("save"), show)
        except (OSError, DamagedCheckpoint) as error:
            return str(error)
        return None

    def stop(self) -> None:
        """Ends a run that was asked to stop, after its checkpoint. Collective: every rank must call it."""
        by_file = run_on_main(self.accelerator, self.recorder.stop)
        raise Stopped(
            f"stopped on request after step {self.step:,}, saved in {self.run.folder}; to resume it, {self.run.resuming}",
            final=by_file,  # a signal may be a launcher's own, which then starts other workers
        )

    def finish(self) -> None:
        """Writes predictions and result. Collective: every rank must call it."""
        self.strategy.make_equal(self.average.networks, self.step)
        self.phase("eval")
        result = self.result or self._evaluate("test")  # where a restart finds the last step saved
        memory = gather_object([peak_memory_mb(self.accelerator.device)])
        self.phase("end")  # no rank needs another any more
        self.recorder.finish(result, self.ending, self.splits.test, memory)
