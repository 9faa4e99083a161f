"""The `DataLoader`s of training and evaluation, which Accelerate shards over the processes.

A batch sampler here yields, again and again, one share for each rank, rank 0's first; Accelerate's `BatchSamplerShard` deals
each rank its own. It starts at any step, so nothing of a loader is saved. No share is padded and none is left out: a rank
without images gets an empty one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from digitdist.data.datasets import AnySet, Batch, Share, StreamedSet
from digitdist.data.order import Order
from digitdist.data.sharding import Sharding
from digitdist.data.workers import loader_options
from digitdist.distributed import takes_pinned_memory


class TrainingSampler(Sampler[Share]):
    """The global batches of one pass, from any step on, each as one share a rank."""

    def __init__(self, order: Order, shardings: list[Sharding], device: torch.device):
        self.order, self.shardings, self.device = order, shardings, device
        self.begin(0, 0, None)

    def begin(self, step: int, last_step: int, ranking: Tensor | None) -> None:
        """Chooses the global batches that follow `step`, to the end of its pass or to `last_step`."""
        self.step, self.ranking = step, ranking
        self.end = min(self.order.pass_bounds(step)[1], last_step)

    def __len__(self) -> int:
        return (self.end - self.step) * len(self.shardings)

    def __iter__(self) -> Iterator[Share]:
        batches = self.order.global_batches(self.step, self.ranking, self.device)
        for step, positions in zip(range(self.step, self.end), batches, strict=False):
            for sharding in self.shardings:
                first, end = sharding.share(len(positions))
                yield Share(positions[first:end], epoch=step // self.order.steps_per_epoch)


class EvaluationSampler(Sampler[Share]):
    """All images in fixed chunks of `chunk_size`, and empty shares until each rank has had as many."""

    def __init__(self, num_images: int, chunk_size: int, world_size: int, device: torch.device):
        self.chunks = torch.arange(num_images, device=device).split(chunk_size)
        self.num_empty = -len(self.chunks) % world_size

    def __len__(self) -> int:
        return len(self.chunks) + self.num_empty

    def __iter__(self) -> Iterator[Share]:
        for positions in (*self.chunks, *[self.chunks[0][:0]] * self.num_empty):
            yield Share(positions)


def prepare_loader(accelerator: Accelerator, images: AnySet, sampler: Sampler[Share]) -> DataLoader[Batch]:
    """A loader of this rank's shares. Images in memory are on the device already, and are indexed there: no copy a step.
    Streamed ones are read by worker processes, which stay for the next pass, and copied without the host waiting for it."""
    streams = isinstance(images, StreamedSet)
    loader: DataLoader[Batch] = DataLoader(
        images,
        batch_sampler=sampler,  # type: ignore[arg-type]
        persistent_workers=images.workers > 0,
        pin_memory=streams and takes_pinned_memory(accelerator.device),
        **loader_options(images.workers),
    )
    return accelerator.prepare_data_loader(loader, device_placement=streams)


def evaluation_loader(accelerator: Accelerator, images: AnySet, chunk_size: int) -> DataLoader[Batch]:
    """A loader of this rank's part of `images` in chunks that are the same for any world size."""
    sampler = EvaluationSampler(len(images), chunk_size, accelerator.num_processes, images.indices.device)
    return prepare_loader(accelerator, images, sampler)
