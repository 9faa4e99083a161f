"""Gradients and rounds against a brute-force reference on one process; integration/test_worlds.py has the other worlds."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from accelerate import Accelerator
from helpers.strategies import check_against_reference, check_loss_history, check_rounds
from hypothesis import given, settings
from hypothesis import strategies as st

from digitdist.config import load_config
from digitdist.data import DATA_SETS, Batch, NullLossHistory, Share, Splits, normalise
from digitdist.data.sharding import Sharding, split_bounds
from digitdist.models import build_model
from digitdist.optim import build_optimizer
from digitdist.sync import build_strategy
from digitdist.sync.loss import TrainingLoss
from digitdist.sync.tree import Tree

MNIST = DATA_SETS["mnist"]


def test_the_losses_that_ranks_record_are_known_to_all(accelerator: Accelerator, splits: Splits):
    check_loss_history(accelerator, splits)


def test_a_local_round_ends_in_one_outer_step_on_the_mean_of_all_ranks(accelerator: Accelerator, splits: Splits):
    check_rounds(accelerator, splits)


def test_on_another_world_size_or_from_an_older_checkpoint_local_mode_keeps_the_main_ranks_loss_scale(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=8.0))
    config = load_config((), ["sync.mode=local"])
    model = build_model(config.model, 0, MNIST)
    strategy = build_strategy(config, accelerator, model, MNIST, NullLossHistory(), lambda *_: None)
    optimizer = build_optimizer(model, config.optim)
    stored = strategy.state(optimizer)
    assert stored["scaler-rank-0"]["scale"] == 8
    of_two_ranks = stored | {"scaler-rank-1": stored["scaler-rank-0"]}
    of_older_version = {name: group for name, group in stored.items() if name != "scaler-rank-0"}
    for found, scale in ((stored, 8), (of_two_ranks, 4), (of_older_version, 4)):
        accelerator.scaler.load_state_dict(accelerator.scaler.state_dict() | {"scale": 4.0})  # the main rank's
        strategy.restore(found, optimizer, [model])
        assert accelerator.scaler.get_scale() == scale


@settings(max_examples=12, deadline=None)
@given(mode=st.sampled_from(["ddp", "exact"]), batch=st.integers(1, 60), accumulate=st.integers(1, 5), shards=st.integers(1, 9))
def test_the_gradient_is_that_of_the_mean_loss(
    accelerator: Accelerator, splits: Splits, mode: str, batch: int, accumulate: int, shards: int
):
    check_against_reference(accelerator, splits, mode, batch, accumulate, shards)


@pytest.mark.parametrize("side", [28, 15, 30])
def test_each_micro_batch_begins_at_aligned_memory_whatever_the_size_of_an_image(splits: Splits, side: int):
    """GPU libraries choose kernels by alignment too, and exact mode is to have the same bits wherever a shard begins."""
    config, info = load_config(), dataclasses.replace(MNIST, height=side, width=side)
    loss = TrainingLoss(build_model(config.model, 0, MNIST), config, info, NullLossHistory())
    images = torch.arange(50 * side * side).remainder(251).to(torch.uint8).view(50, side, side)
    batch = Batch(images, torch.zeros(50, dtype=torch.int64), torch.arange(50))
    parts = list(loss.micro_batches(batch, Sharding.of_all_ranks(1, 7)[0], 50))
    assert [part.pixels.data_ptr() % 64 for part in parts] == [0] * 7
    assert torch.equal(torch.cat([part.pixels for part in parts]), normalise(images, info))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_loss_that_travels_with_the_gradients_is_not_rounded(splits: Splits, precision: torch.dtype):
    config = load_config((), [])
    loss = TrainingLoss(build_model(config.model, 0, MNIST), config, MNIST, NullLossHistory())
    sharding, scale = Sharding.of_all_ranks(1, 1)[0], 65536.0
    (micro_batch,) = loss.micro_batches(splits.train.read(torch.arange(50)), sharding, 50)
    with torch.autocast("cpu", precision):
        mean = loss(micro_batch, step=1, divisor=50.0, stop=1.0)
    (scale * mean).backward()
    assert loss.signal.grad is not None
    assert loss.signal.grad.tolist() == [scale * float(mean.detach()), scale]


def tree_of(values: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """The root when the shards are summed in spans between `bounds`, whose nodes are then put together."""
    finished = Tree()
    for start, stop in itertools.pairwise(bounds):
        part = Tree()
        for shard in range(start, stop):
            part.add(shard, 1, values[shard].clone())
        for node in part.nodes:
            finished.add(*node)
    return finished.root()


@given(shards=st.integers(1, 40), ranks=st.integers(1, 6), seed=st.integers(0, 100))
def test_the_tree_sums_to_the_same_bits_however_it_is_shared(shards: int, ranks: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shards, 5, generator=generator) * 10 ** torch.randn(shards, 1, generator=generator)
    assert torch.equal(tree_of(values, split_bounds(shards, ranks)), tree_of(values, [0, shards]))


def test_a_tree_keeps_few_nodes():
    tree = Tree()
    for shard in range(1000):
        tree.add(shard, 1, torch.zeros(1))
        assert len(tree.nodes) <= 10


def test_another_order_of_the_sum_would_show():
    """The tree is the point: the same numbers summed one after the other give other bits."""
    values = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    one_by_one = values[0].clone()
    for value in values[1:]:
        one_by_one += value
    assert not torch.equal(one_by_one, tree_of(values, [0, 64]))
    assert torch.allclose(one_by_one, tree_of(values, [0, 64]), atol=1e-4)


def test_dropout_draws_by_seed_step_and_micro_batch_alone(accelerator: Accelerator, splits: Splits):
    def gradient(seed: int, step: int) -> torch.Tensor:
        config = load_config((), ["sync.mode=exact", f"seed={seed}"])
        model = build_model(config.model, 0, MNIST)
        strategy = build_strategy(config, accelerator, model, MNIST, NullLossHistory(), lambda *_: None)
        torch.rand(step + seed)  # whatever was drawn before does not matter
        strategy.compute_gradients(splits.train.__getitems__(Share(torch.arange(50))), 50, step, stop=False)
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    first = gradient(0, 3)
    assert torch.equal(first, gradient(0, 3))
    assert not torch.equal(first, gradient(0, 4))
    assert not torch.equal(first, gradient(1, 3))


def test_batchnorm_statistics_are_folded_in_the_order_of_shards(accelerator: Accelerator, splits: Splits):
    config = load_config((), ["sync.mode=exact", "sync.shards=3", "model.name=cnn_batchnorm"])
    model = build_model(config.model, 0, MNIST)
    by_hand = build_model(config.model, 0, MNIST).train()
    strategy = build_strategy(config, accelerator, model, MNIST, NullLossHistory(), lambda *_: None)
    batch = splits.train.__getitems__(Share(torch.arange(30)))
    strategy.compute_gradients(batch, 30, 0, stop=False)
    with torch.no_grad():
        for part in normalise(batch[0], DATA_SETS["mnist"]).split(10):
            by_hand(part)
    for (name, ours), theirs in zip(model.named_buffers(), by_hand.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name
