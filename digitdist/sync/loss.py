"""The training loss of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from digitdist.config import Config
from digitdist.data import (
    Batch,
    DataSetInfo,
    LossHistory,
    NullLossHistory,
    Sharding,
    augment,
    black,
    derive_seed,
    normalise,
    seed_generators,
)

ALIGNMENT = 64  # bytes: more than cuBLASLt and cuDNN ask for, and a line of a CPU's cache


class MicroBatch(NamedTuple):
    """Its number within the global batch, `pixels` float32 [n, c, h, w], `labels` and `indices` int64 [n]; n may be 0."""

    number: int
    pixels: Tensor
    labels: Tensor
    indices: Tensor


class TrainingLoss(nn.Module):
    """Seeds the generators, augments, runs the network, and sums the cross-entropy of a micro-batch.

    `signal` is a parameter that is always 0 and belongs to no optimizer. Its gradient is whatever the loss multiplies it by,
    and so carries numbers along in the gradients' all-reduce. `trained`: the parameters that are; `one_graph`: whether each of
    them gets its gradient through the graph of the loss, and not from a backward pass inside the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        info: DataSetInfo,
        loss_history: LossHistory | NullLossHistory,
        one_graph: bool = True,
    ):
        super().__init__()
        self.model, self.loss_history, self.one_graph = model, loss_history, one_graph
        self.info, self.augment = info, config.augment
        self.background: Tensor
        self.register_buffer("background", black(info))  # which goes to the device with this module
        self.label_smoothing, self.seed = config.train.label_smoothing, config.seed
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.signal = nn.Parameter(torch.zeros(2))

    def micro_batches(self, batch: Batch, sharding: Sharding, count: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a global batch of `count` images, of which `batch` is its share."""
        pixels = normalise(batch.images, self.info)
        for number, span in sharding.micro_batches(count):
            yield MicroBatch(number, aligned(pixels[span]), batch.labels[span], batch.indices[span])

    def total(self, batch: MicroBatch, step: int) -> Tensor:
        """The summed loss, a float32 scalar; 0, with a gradient of 0, for an empty micro-batch.

        Dropout and augmentation draw from generators keyed by (seed, step, number), whichever rank runs the micro-batch.
        """
        if not len(batch.labels):
            return sum(((p.sum() * 0).float() for p in self.trained), torch.zeros((), device=batch.pixels.device))
        seed_generators(derive_seed(self.seed, step, batch.number), batch.pixels.device)
        logits = self.model(augment(batch.pixels, self.augment, self.background)).float()
        self.loss_history.record(batch.indices, logits, batch.labels)
        return F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=self.label_smoothing)

    def forward(self, batch: MicroBatch, step: int, divisor: float, stop: float) -> Tensor:
        """The summed loss divided by `divisor`; it and `stop` become the gradient of `signal`, where that takes one."""
        mean = self.total(batch, step) / divisor
        # Not a matrix product, which autocast would round: in fp16 the scaled loss would be infinite.
        return mean + (self.signal * stats_tensor(mean, stop)).sum() if self.signal.requires_grad else mean


def aligned(pixels: Tensor) -> Tensor:
    """`pixels`, copied if they do not begin at a multiple of `ALIGNMENT` bytes of their memory.

    Libraries choose a kernel by alignment too, and which images come before these follows from the world size. Slices of
    MNIST's images, of 49 times 64 bytes each, are never copied.
    """
    return pixels if pixels.storage_offset() * pixels.itemsize % ALIGNMENT == 0 else pixels.clone()


def stats_tensor(loss: Tensor, stop: float) -> Tensor:
    """A loss and a number of stop requests, float32 [2] on the device of `loss`."""
    return torch.stack([loss.detach(), torch.full_like(loss, stop)])
