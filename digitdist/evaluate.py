"""Predictions of all ranks, each image exactly once; counts, confusion, and the evidence for them.

python -m digitdist.evaluate RUN
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from digitdist import checkpoint, models, runtime
from digitdist.config import Config, Parser, UserError, load
from digitdist.data import SPECS, ImageSet, Sharding, load_splits, normalise
from digitdist.models import NUM_CLASSES


@dataclass(frozen=True)
class Evaluation:
    """One row an image, sorted by index: `index`, `label`, `prediction` int64 [n], `probability`, `loss` float32 [n].

    `probability` is the model's for the predicted class, `loss` the cross-entropy of the image.
    """

    index: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    probability: np.ndarray
    loss: np.ndarray

    @property
    def total(self) -> int:
        return len(self.index)

    @property
    def correct(self) -> int:
        return int((self.label == self.prediction).sum())

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def mean_loss(self) -> float:
        return math.fsum(self.loss.tolist()) / self.total

    @property
    def confusion(self) -> np.ndarray:
        """int64 [10, 10]: how many images of class `row` were predicted as `column`."""
        counts = np.bincount(self.label * NUM_CLASSES + self.prediction, minlength=NUM_CLASSES**2)
        return counts.reshape(NUM_CLASSES, NUM_CLASSES)

    def worst_mistakes(self, count: int) -> np.ndarray:
        """Rows of the wrong predictions with the highest losses, the worst one first: int64 [up to count]."""
        wrong = np.flatnonzero(self.label != self.prediction)
        return wrong[np.argsort(-self.loss[wrong], kind="stable")][:count]

    @property
    def class_accuracy(self) -> list[float | None]:
        """Accuracy over the images of each class; None where there are none."""
        return [int(row[i]) / int(row.sum()) if row.sum() else None for i, row in enumerate(self.confusion)]


def evaluate(accelerator: Accelerator, model: nn.Module, images: ImageSet, config: Config) -> Evaluation:
    """Predicts every image once, shared over all ranks. Collective: every rank must call it.

    The images are cut into fixed chunks of data.eval_batch_size / sync.shards whatever the world size, so that an
    image is always computed in the same company.

    Raises:
        RuntimeError: an index is missing, or there twice.
    """
    size, device = -(-config.data.eval_batch_size // config.sync.shards), accelerator.device
    bounds = [*range(0, len(images), size), len(images)]
    mine = Sharding.of(len(bounds) - 1, accelerator.process_index, accelerator.num_processes).mine
    here = slice(bounds[mine.start], bounds[mine.stop])
    logits = [torch.empty(0, NUM_CLASSES, device=device)]
    was_training = model.training
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        for start in bounds[mine.start : mine.stop]:
            logits.append(model(normalise(images.images[start : start + size], SPECS[config.data.name])))
    model.train(was_training)
    rows = -(-(len(bounds) - 1) // accelerator.num_processes) * size  # no rank has more
    named = _gather(accelerator, torch.stack([images.indices[here], images.labels[here]], 1), rows, padding=-1)
    scores = _gather(accelerator, torch.cat([part.float() for part in logits]), rows, padding=0)
    order = named[:, 0].argsort(stable=True)
    order = order[named[order, 0] >= 0]
    index, label = named[order].T
    certify(index.numpy(), images.indices)
    log_probability = scores[order].log_softmax(1)  # of all images at once, so that world size cannot enter
    highest, prediction = log_probability.max(1)
    loss = F.nll_loss(log_probability, label, reduction="none")
    return Evaluation(*(part.numpy() for part in (index, label, prediction, highest.exp(), loss)))


def certify(index: np.ndarray, wanted: Tensor) -> None:
    """Refuses a result in which an image is missing or counted twice.

    Raises:
        RuntimeError: the sorted `index` is not `wanted`, once each.
    """
    expected = np.sort(wanted.cpu().numpy())
    if not np.array_equal(index, expected):
        distinct = len(np.unique(index))
        raise RuntimeError(f"{len(index)} predictions of {distinct} distinct images; {len(expected)} are wanted, once each")


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval for a proportion (E. B. Wilson, JASA 22, 1927)."""
    z = 1.959963984540054
    share, scale = correct / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return centre - half, centre + half


def in_words(result: Evaluation) -> str:
    low, high = wilson_interval(result.correct, result.total)
    return (
        f"{result.correct:,}/{result.total:,} correct = {100 * result.accuracy:.2f} %"
        f" (95 % interval {100 * low:.2f} to {100 * high:.2f} %), loss {result.mean_loss:.4f}"
    )


def save_predictions(result: Evaluation, file: Path) -> None:
    """Writes index, label, prediction and probability of each image as `file`, in one move."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, index=result.index, label=result.label, prediction=result.prediction, probability=result.probability
    )
    checkpoint.write_whole(file, buffer.getvalue())


def find_run(name: str, runs: str = "runs") -> Path:
    """The folder of a run, named by its folder or by its name in `runs`.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(name), Path(runs) / name):
        if (folder / "config.yaml").is_file():
            return folder
    there = sorted(path.parent.name for path in Path(runs).glob("*/config.yaml"))
    known = f"in {runs} there are {', '.join(there)}" if there else f"there is no run in {runs}"
    raise UserError(f"{name}: no run of that folder or name (a run has a config.yaml); {known}")


def open_run(name: str, overrides: Sequence[str]) -> tuple[Path, Config]:
    """The folder of a run and its configuration, wherever the run was made or has been copied to.

    Raises:
        UserError: there is no such run, or a mistake in `overrides`.
    """
    run = find_run(name, load((), [o for o in overrides if o.startswith("run.dir=")]).run.dir)
    here = ["checkpoint.resume=auto", f"run.dir={run.parent}"]
    return run, load([str(run / "config.yaml")], [*here, *overrides])


def read_checkpoint(run: Path, which: str) -> checkpoint.Checkpoint:
    """The checkpoint `which` of a run: `last` (the newest good one), `best` by validation accuracy, or a step.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    folder = run / "checkpoints"
    last = checkpoint.newest_good(folder, partial(print, file=sys.stderr))
    if last is None:
        raise UserError(f"{run}: no good checkpoint in {folder}; train the run first")
    if which == "last":
        return last
    if which == "best":
        if not last.state["best"]:
            raise UserError(f"{run}: no best checkpoint; it is chosen only where data.validation holds images out")
        which = str(last.state["best"]["step"])
    if not which.isdecimal():
        raise UserError(f"--checkpoint {which} is not allowed; it takes last, best or a step")
    try:
        return checkpoint.read(folder / checkpoint.folder_name(int(which)))
    except checkpoint.DamagedCheckpoint as damage:
        raise UserError(f"{damage}; checkpoints of this run: {[f.name for f in checkpoint.folders(folder)]}") from None


def load_weights(model: nn.Module, stored: checkpoint.Checkpoint) -> None:
    """Puts the weights that a run is judged by (the moving average where there is one) into `model`."""
    try:
        model.load_state_dict(stored.tensors.get("ema") or stored.tensors["model"])
    except RuntimeError as error:
        raise UserError(f"{stored.folder} does not fit the model: {' '.join(str(error).split())}") from None


def _gather(accelerator: Accelerator, rows: Tensor, length: int, padding: int) -> Tensor:
    """The rows of all ranks on the CPU, each rank's padded to `length`, since a collective wants one shape. Collective."""
    padded = F.pad(rows, (0, 0, 0, length - len(rows)), value=padding)
    return accelerator.gather(padded).cpu()


def main() -> None:
    parser = Parser(
        prog="python -m digitdist.evaluate",
        description="The exact accuracy of a run's checkpoint, on any number of processes.",
        epilog="example: python -m digitdist.evaluate runs/quick --split test",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name in run.dir")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, such as data.root=data")
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last, best, or a step (default: last)")
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    arguments = parser.parse_args()

    run, config = open_run(arguments.run, arguments.overrides)
    plan = runtime.plan(config)
    images = getattr(load_splits(config.data, config.seed), arguments.split)
    if not len(images):
        raise UserError(f"--split {arguments.split}: the run held no images out; set data.validation")
    stored = read_checkpoint(run, arguments.checkpoint)
    model = models.build(config.model, config.seed)
    load_weights(model, stored)
    accelerator = runtime.start(config, plan)
    model.to(accelerator.device).to(memory_format=torch.channels_last)
    result = evaluate(accelerator, model, images.to(accelerator.device), config)
    if arguments.json:
        report = {"run": str(run), "step": stored.step, "split": arguments.split, "correct": result.correct}
        report |= {"total": result.total, "accuracy": result.accuracy, "loss": result.mean_loss}
        report |= {"class_accuracy": result.class_accuracy, "confusion": result.confusion.tolist()}
        runtime.say(json.dumps(report))
    else:
        runtime.say(f"{run} at step {stored.step:,}, {config.data.name} {arguments.split}: {in_words(result)}")
        names = zip(SPECS[config.data.name].classes, result.class_accuracy, strict=True)
        runtime.say("of each class: " + ", ".join(f"{n} {100 * a:.2f} %" for n, a in names if a is not None))
    accelerator.end_training()


if __name__ == "__main__":
    runtime.run_command(main)
