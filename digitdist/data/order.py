"""The order of a training: which images make up the global batch of each step. Position in it is the step alone."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from digitdist.config import Config
from digitdist.data.randomness import permutation
from digitdist.data.sharding import split_bounds
from digitdist.distributed import to_device


@dataclass(frozen=True)
class Order:
    """Global batches of `batch_size` of `num_images` training images, in an order that follows from `seed`.

    An epoch is cut into passes: the first epoch is one, over all images; later ones are `focus` passes.
    """

    num_images: int
    batch_size: int
    seed: int
    focus: int = 1

    @classmethod
    def of_config(cls, config: Config, num_images: int) -> Order:
        return cls(num_images, config.data.batch_size, config.seed, config.data.focus)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_images // self.batch_size)

    def batch_count(self, step: int) -> int:
        """Images in the global batch of the step that follows `step`; the last batch of an epoch may be smaller."""
        return min(self.batch_size, self.num_images - step % self.steps_per_epoch * self.batch_size)

    def images_seen(self, step: int) -> int:
        """Images of the first `step` global batches."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.num_images + min(rest * self.batch_size, self.num_images)

    def total_steps(self, epochs: float) -> int:
        """Steps of `epochs` epochs, rounded to whole steps, at least one."""
        return max(1, round(epochs * self.steps_per_epoch))

    def last_step(self, epochs: float, max_steps: int | None) -> int:
        """The step after which a training ends."""
        total = self.total_steps(epochs)
        return min(total, max_steps or total)

    def pass_bounds(self, step: int) -> tuple[int, int]:
        """First and end step of the pass that contains `step`."""
        epoch, number = divmod(step, self.steps_per_epoch)
        bounds = split_bounds(self.steps_per_epoch, self.focus if epoch else 1)
        index = bisect.bisect_right(bounds, number)
        return step - number + bounds[index - 1], step - number + bounds[index]

    def global_batches(self, step: int, ranking: Tensor | None, device: torch.device) -> Iterator[Tensor]:
        """Positions in the training set, int64 [n] on `device`, of each global batch from the one that follows `step` to the
        end of its pass.

        The pass goes over all images, or, with their `ranking` by falling loss, int64 [num_images] on `device`, over a focused
        choice of them.
        """
        start, end = self.pass_bounds(step)
        seen_before = self.images_seen(start)
        if ranking is None:
            positions = to_device(permutation(self.num_images, self.seed, start // self.steps_per_epoch), device)
        else:
            positions = focused_pass(ranking, self.images_seen(end) - seen_before, self.seed, "focused", start)
        for number in range(step, end):
            first = self.images_seen(number) - seen_before
            yield positions[first : first + self.batch_count(number)]


def focused_pass(ranking: Tensor, size: int, *parts: object) -> Tensor:
    """A pass over `size` of all images, int64 [size], a fixed function of the arguments.

    Three quarters of it are the first images of `ranking`, int64 [num_images]; one quarter is drawn from the others.
    """
    hardest, others = ranking.split([3 * size // 4, len(ranking) - 3 * size // 4])
    drawn = permutation(len(others), *parts, "drawn")[: size - len(hardest)]
    chosen = torch.cat([hardest, others[to_device(drawn, ranking.device)]])
    return chosen[to_device(permutation(size, *parts), ranking.device)]
