"""The order of a training and each rank's share of it, as Accelerate deals them."""

from __future__ import annotations

import itertools

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st

from digitdist.data import ImageSet, Order, Sharding, Splits, TrainingSampler, evaluation_loader, prepare_loader
from digitdist.data.loaders import EvaluationSampler
from digitdist.data.order import focused_pass
from digitdist.data.randomness import permutation
from digitdist.data.sharding import split_bounds

CPU = torch.device("cpu")


def black_images(count: int) -> ImageSet:
    return ImageSet(torch.zeros(count, 28, 28, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))


Shares = list[list[int]]


def shares(order: Order, shardings: list[Sharding], rank: int, step: int, ranking: torch.Tensor | None = None) -> Shares:
    """The positions that Accelerate deals `rank` for each step from `step` to the end of its pass."""
    sampler = TrainingSampler(order, shardings, CPU)
    sampler.begin(step, 10**9, ranking)
    dealt = BatchSamplerShard(sampler, len(shardings), rank, even_batches=False)
    found = [share.positions.tolist() for share in dealt]
    assert len(found) == len(dealt)
    return found


def global_batches(order: Order, step: int, ranking: torch.Tensor | None = None) -> Shares:
    return shares(order, Sharding.of_all_ranks(1, 1), 0, step, ranking)


@given(count=st.integers(0, 500), num_parts=st.integers(1, 40))
def test_a_split_is_complete_and_even(count: int, num_parts: int):
    bounds = split_bounds(count, num_parts)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, count, num_parts)
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "rank 0, whose buffers count, is never the one left without images"


@given(
    count=st.integers(1, 300),
    batch_size=st.integers(1, 350),
    world_size=st.integers(1, 8),
    accumulate=st.integers(1, 4),
    epoch=st.integers(0, 2),
    seed=st.integers(0, 3),
)
def test_each_image_is_seen_exactly_once_an_epoch(
    count: int, batch_size: int, world_size: int, accumulate: int, epoch: int, seed: int
):
    order = Order(count, batch_size, seed)
    start = epoch * order.steps_per_epoch
    shardings = Sharding.of_all_ranks(world_size, world_size * accumulate)
    by_rank = [shares(order, shardings, rank, start) for rank in range(world_size)]
    assert {len(batches) for batches in by_rank} == {order.steps_per_epoch}
    one_process = global_batches(order, start)
    for number in range(order.steps_per_epoch):
        together = [position for batches in by_rank for position in batches[number]]
        assert together == one_process[number], "the ranks' shares in turn are the global batch"
        assert len(together) == order.batch_count(start + number)
        for sharding, batches in zip(shardings, by_rank, strict=True):
            parts = [batches[number][span] for _, span in sharding.micro_batches(len(together))]
            assert len(parts) == accumulate
            assert list(itertools.chain(*parts)) == batches[number]
    assert sorted(itertools.chain(*one_process)) == list(range(count))
    assert order.images_seen(start + order.steps_per_epoch) == (epoch + 1) * count


@given(count=st.integers(1, 200), batch_size=st.integers(1, 50), step=st.integers(0, 400))
def test_the_order_from_the_middle_is_the_rest_of_the_order(count: int, batch_size: int, step: int):
    order = Order(count, batch_size, 0)
    first = step - step % order.steps_per_epoch
    assert global_batches(order, step) == global_batches(order, first)[step - first :]


@given(count=st.integers(1, 300), focus=st.integers(1, 9), step=st.integers(0, 200))
def test_a_focused_pass_has_the_hardest_images_and_others_none_of_them_twice(count: int, focus: int, step: int):
    order, ranking = Order(count, 10, 0, focus), permutation(count, "by loss")
    start, end = order.pass_bounds(step)
    assert start <= step < end
    assert {order.pass_bounds(other) for other in range(start, end)} == {(start, end)}
    batches = global_batches(order, start, ranking)
    assert [len(batch) for batch in batches] == [order.batch_count(other) for other in range(start, end)]
    seen = list(itertools.chain(*batches))
    assert len(set(seen)) == len(seen)
    assert set(ranking[: 3 * len(seen) // 4].tolist()) <= set(seen)
    assert global_batches(order, step, ranking) == batches[step - start :]


def test_the_first_epoch_is_one_pass_and_later_ones_are_focus_of_them():
    order = Order(60000, 256, 0, focus=4)
    assert order.pass_bounds(0) == order.pass_bounds(234) == (0, 235)
    assert [order.pass_bounds(s)[0] for s in range(235, 471)] == [235] * 59 + [294] * 59 + [353] * 59 + [412] * 58 + [470]


def test_the_others_of_a_focused_pass_are_drawn_anew_for_each():
    ranking = permutation(3000, "by loss")
    passes = [focused_pass(ranking, 600, 0, start).tolist() for start in range(10)]
    others = {tuple(sorted(set(one) - set(ranking[:450].tolist()))) for one in passes}
    assert [len(drawn) for drawn in others] == [150] * 10
    assert len({tuple(one) for one in passes}) == 10


def test_the_order_depends_on_seed_and_epoch():
    drawn = {tuple(permutation(1000, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(drawn) == 9


@given(count=st.integers(0, 100), chunk_size=st.integers(1, 40), world_size=st.integers(1, 8))
def test_an_evaluation_deals_each_image_once_and_each_rank_as_many_chunks(count: int, chunk_size: int, world_size: int):
    sampler = EvaluationSampler(count, chunk_size, world_size, CPU)
    dealt = [list(BatchSamplerShard(sampler, world_size, rank, even_batches=False)) for rank in range(world_size)]
    assert len({len(chunks) for chunks in dealt}) == 1
    chunks = [chunk.positions.tolist() for turn in zip(*dealt, strict=True) for chunk in turn]
    assert list(itertools.chain(*chunks)) == list(range(count))
    sizes = [len(chunk) for chunk in chunks if chunk]
    assert sizes == [chunk_size] * (count // chunk_size) + [count % chunk_size] * bool(count % chunk_size)


def test_a_prepared_loader_gives_the_batches_of_its_sampler_again_and_again(accelerator: Accelerator, splits: Splits):
    order = Order(1000, 300, 0)
    sampler = TrainingSampler(order, Sharding.of_all_ranks(1, 1), CPU)
    loader = prepare_loader(accelerator, splits.train.subset(torch.arange(1000)), sampler)
    for step in (0, 2, 4):
        sampler.begin(step, 6, None)
        batches = [batch.indices.tolist() for batch in loader]
        assert batches == global_batches(order, step)[: 6 - step]
    batch = next(iter(evaluation_loader(accelerator, splits.test, 7)))
    assert torch.equal(batch.images, splits.test.images[:7])
    assert torch.equal(batch.labels, splits.test.labels[:7])


def test_loading_draws_nothing_from_the_global_generator(accelerator: Accelerator, splits: Splits):
    sampler = TrainingSampler(Order(60000, 100, 0), Sharding.of_all_ranks(1, 1), CPU)
    loader = prepare_loader(accelerator, splits.train, sampler)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    sampler.begin(0, 3, None)
    assert len(list(loader)) == 3
    assert torch.equal(torch.rand(3), expected)
