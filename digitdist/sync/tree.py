"""A sum in one fixed binary tree over shard numbers: the same bits, whichever rank has computed which shards."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from digitdist.data import Sharding

# Into one tensor, which saves a copy of what each rank sends. Older versions of torch have the other name alone.
ALL_GATHER = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
Node = tuple[int, int]  # its first shard, and how many shards it has


class Tree:
    """A binary tree sum over shards 0, 1, 2, … that come in this order, from any first one on.

    Like a binary counter, it merges two neighbours of equal size whose first shard is a multiple of their joint size. Which
    sums are formed so depends on the shards' numbers alone, and it holds at most two nodes of each size.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple[int, int, Tensor]] = []  # first shard, number of shards, their sum

    def add(self, start: int, size: int, value: Tensor) -> None:
        """Adds the node of shards `start` to ``start + size - 1``; `value` may be changed in place."""
        while self.nodes and self.nodes[-1][1] == size and self.nodes[-1][0] % (2 * size) == 0:
            start, _, left = self.nodes.pop()
            value, size = left.add_(value), 2 * size
        self.nodes.append((start, size, value))

    def root(self) -> Tensor:
        """The sum of all shards. The tree is used up."""
        _, _, value = self.nodes.pop()
        while self.nodes:
            _, _, left = self.nodes.pop()
            value = left.add_(value)
        return value


class Reduced(NamedTuple):
    """The tree's root float32 [length], the rows of all shards in their order, and the sum of all stop requests (a scalar)."""

    root: Tensor
    rows: list[Tensor]
    stop_requests: Tensor


class TreeReduction:
    """Finishes the tree over the nodes of all ranks, on every rank.

    Two ranks send each other their nodes. More of them do as in a ring all-reduce: each first gets one slice of every node
    and finishes the tree on it, and then all gather the slices. A rank so sends 2·(W-1)/W of a gradient where W is a power of
    two that divides the shards, and every rank holds one node; elsewhere up to as many times that as it has nodes.

    `length`: numbers of a shard's gradient and loss; `row_length`: numbers of what is gathered of each shard beside them.
    """

    def __init__(self, shardings: list[Sharding], rank: int, length: int, row_length: int):
        self.shardings, self.rank, self.length, self.row_length = shardings, rank, length, row_length
        self.world_size = len(shardings)

    def reduce(self, tree: Tree, rows: list[Tensor], stop: Tensor, num_shards: int) -> Reduced:
        """Collective: every rank must call it.

        `tree` holds this rank's shards of the `num_shards` that have images (it may be empty), `rows` what is gathered of each,
        float32 [row_length], and `stop`, float32 [1], is 1 if this rank was asked to stop.
        """
        if self.world_size == 1:
            return Reduced(tree.root(), rows, stop[0])
        nodes = [self._nodes_of(rank, num_shards) for rank in range(self.world_size)]
        direct = self.world_size == 2
        head = self._own_nodes(tree, max(map(len, nodes)), stop) if direct else self._own_slice(tree, nodes, stop)

        counts = [len(self._shards_of(rank, num_shards)) for rank in range(self.world_size)]
        own_rows = stop.new_zeros(max(counts), self.row_length)
        if rows:
            own_rows[: len(rows)] = torch.stack(rows)
        message = torch.cat([head, own_rows.flatten(), stop])
        gathered = message.new_empty(self.world_size * len(message))
        ALL_GATHER(gathered, message)
        messages = gathered.view(self.world_size, -1)

        heads = messages[:, : len(head)]
        root = finish(nodes, [h.view(-1, self.length) for h in heads]) if direct else heads.flatten()[: self.length]
        of_ranks = [m[len(head) : -1].view(own_rows.shape)[:n] for m, n in zip(messages, counts, strict=True)]
        return Reduced(root, [row for of_rank in of_ranks for row in of_rank], messages[:, -1].sum())

    def _own_nodes(self, tree: Tree, most: int, like: Tensor) -> Tensor:
        """This rank's nodes one after another, in a vector with room for `most` of them."""
        room = like.new_zeros((most - len(tree.nodes)) * self.length)
        return torch.cat([*(value for _, _, value in tree.nodes), room])

    def _own_slice(self, tree: Tree, nodes: list[list[Node]], like: Tensor) -> Tensor:
        """The slice of the root that this rank finishes, from that slice of the nodes of all ranks. Collective."""
        width = -(-self.length // self.world_size)
        own = like.new_zeros(len(tree.nodes), self.world_size * width)
        for row, (_, _, value) in zip(own, tree.nodes, strict=True):
            row[: self.length] = value
        sizes = [len(n) * width for n in nodes]
        received = own.new_empty(sum(sizes))
        by_rank = own.view(-1, self.world_size, width).transpose(0, 1).contiguous().flatten()
        dist.all_to_all_single(received, by_rank, sizes, [sizes[self.rank]] * self.world_size)
        return finish(nodes, [part.view(-1, width) for part in received.split(sizes)])

    def _shards_of(self, rank: int, num_shards: int) -> range:
        """The shards of `rank` that have images, where the first `num_shards` have."""
        own = self.shardings[rank].own
        return range(min(own.start, num_shards), min(own.stop, num_shards))

    def _nodes_of(self, rank: int, num_shards: int) -> list[Node]:
        tree = Tree()
        for shard in self._shards_of(rank, num_shards):
            tree.add(shard, 1, torch.empty(0))
        return [(start, size) for start, size, _ in tree.nodes]


def finish(nodes: list[list[Node]], values: list[Tensor]) -> Tensor:
    """The root over the nodes of all ranks, whose `values` are the first rows of a matrix for each rank."""
    tree = Tree()
    for theirs, rows in zip(nodes, values, strict=True):
        for (start, size), row in zip(theirs, rows, strict=False):
            tree.add(start, size, row)
    return tree.root()
