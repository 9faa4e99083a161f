"""How a global batch is cut into micro-batches, and which of them a rank runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


def split_bounds(count: int, num_parts: int) -> list[int]:
    """Bounds of `num_parts` spans of 0..count-1, as equal as possible, longer ones first: ``num_parts + 1`` numbers."""
    quotient, num_longer = divmod(count, num_parts)
    return [i * quotient + min(i, num_longer) for i in range(num_parts + 1)]


@dataclass(frozen=True)
class Sharding:
    """A global batch in `num_micro_batches` spans, of which this rank runs the consecutive `own`, one at a time.

    In exact mode the micro-batches are the shards. The spans are as equal as possible; a small batch leaves some empty.
    """

    num_micro_batches: int
    own: range

    @classmethod
    def of_rank(cls, rank: int, world_size: int, num_micro_batches: int) -> Sharding:
        bounds = split_bounds(num_micro_batches, world_size)
        return cls(num_micro_batches, range(bounds[rank], bounds[rank + 1]))

    @classmethod
    def of_all_ranks(cls, world_size: int, num_micro_batches: int) -> list[Sharding]:
        return [cls.of_rank(rank, world_size, num_micro_batches) for rank in range(world_size)]

    def share(self, count: int) -> tuple[int, int]:
        """Start and end of this rank's images in a global batch of `count`."""
        bounds = split_bounds(count, self.num_micro_batches)
        return bounds[self.own.start], bounds[self.own.stop]

    def micro_batches(self, count: int) -> Iterator[tuple[int, slice]]:
        """The number of each of this rank's micro-batches, and its span within the rank's share of `count` images."""
        bounds = split_bounds(count, self.num_micro_batches)
        first = bounds[self.own.start]
        for number in self.own:
            yield number, slice(bounds[number] - first, bounds[number + 1] - first)
