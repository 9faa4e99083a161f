"""Predictions of all ranks, each image exactly once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from digitdist.config import Config
from digitdist.data import AnySet, Batch, DataSetInfo, derive_seed, evaluation_loader, normalise, seed_generators
from digitdist.distributed import autocast, gather_rows
from digitdist.evaluate.result import Evaluation
from digitdist.model_state import SavedBuffers


def chunked_loader(accelerator: Accelerator, images: AnySet, config: Config) -> DataLoader[Batch]:
    """This rank's part of `images`, those in memory on the device, in fixed chunks of ``data.eval_batch_size / sync.shards``:
    an image is computed together with the same others on any world size."""
    return evaluation_loader(accelerator, images, chunk_size=-(-config.data.eval_batch_size // config.sync.shards))


@dataclass(frozen=True)
class Scores:
    """What a network makes of each image: `index`, `label` int64 [n], and `log_probability` of each class, float32 or float64
    [n, classes]; sorted by index, on the CPU."""

    index: Tensor
    label: Tensor
    log_probability: Tensor

    def evaluation(self) -> Evaluation:
        """The most probable class of each image, and its loss."""
        highest, prediction = self.log_probability.max(1)
        loss = F.nll_loss(self.log_probability, self.label, reduction="none")
        columns = (self.index, self.label, prediction, highest.exp().float(), loss.float())
        return Evaluation(*(column.numpy() for column in columns), num_classes=self.log_probability.shape[1])


def evaluate(accelerator: Accelerator, model: nn.Module, loader: Iterable[Batch], info: DataSetInfo) -> Evaluation:
    """The evaluation of what `score` gives. Collective: every rank must call it."""
    return score(accelerator, model, loader, info).evaluation()


def score(
    accelerator: Accelerator, model: nn.Module, loader: Iterable[Batch], info: DataSetInfo, precision: str | None = None
) -> Scores:
    """Predicts every image of a `chunked_loader` once, shared over all ranks. Collective: every rank must call it.

    It computes in `precision` (fp32, bf16 or fp16), by default in the accelerator's. Its rows are in the order of indices, so
    that sums over them too are the same on any world size.

    Raises:
        RuntimeError: an image is missing, or was predicted twice.
    """
    logits, labels = _predict(accelerator, model, loader, info, precision)
    names = gather_rows(accelerator, labels, padding=-1)
    scores = gather_rows(accelerator, logits, padding=0)
    order = names[:, 0].argsort(stable=True)
    order = order[names[order, 0] >= 0]
    index, label = names[order].T
    check_each_once(index.numpy(), loader.dataset.indices)  # type: ignore[attr-defined]
    return Scores(index, label, scores[order].log_softmax(1))  # of all at once, so that the world size has no influence


def _predict(
    accelerator: Accelerator, model: nn.Module, loader: Iterable[Batch], info: DataSetInfo, precision: str | None
) -> tuple[Tensor, Tensor]:
    """This rank's logits, float32 [n, classes], and the index and label of each, int64 [n, 2].

    What a network draws at random depends on the chunk alone, and what it writes into its buffers is undone: neither the world
    size nor the number of evaluations has an influence.
    """
    indices: list[Tensor] = []
    labels: list[Tensor] = []
    logits = [torch.empty(0, info.num_classes, device=accelerator.device)]
    was_training = model.training
    model.eval()
    saved = SavedBuffers(model)
    with torch.inference_mode(), autocast(accelerator, precision):
        for turn, batch in enumerate(loader):
            indices.append(batch.indices)
            labels.append(batch.labels)
            if len(batch.labels):
                chunk = turn * accelerator.num_processes + accelerator.process_index
                seed_generators(derive_seed("evaluation", chunk), accelerator.device)
                logits.append(model(normalise(batch.images, info)).clone())  # a CUDA graph writes all outputs to one place
    model.train(was_training)
    saved.restore()
    return torch.cat([part.float() for part in logits]), torch.stack([torch.cat(indices), torch.cat(labels)], 1)


def check_each_once(index: np.ndarray, expected: Tensor) -> None:
    """Refuses a result in which an image is missing or counted twice.

    Raises:
        RuntimeError: the sorted `index` does not have each of `expected`, int64 [n], exactly once.
    """
    wanted = np.sort(expected.cpu().numpy())
    if not np.array_equal(index, wanted):
        distinct = len(np.unique(index))
        raise RuntimeError(f"{len(index)} predictions of {distinct} distinct images; {len(wanted)} are needed, once each")
