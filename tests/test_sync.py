"""Gradients against a brute-force reference; the worlds of more than one process are in test_worlds.py."""

from __future__ import annotations

import copy
import itertools

import torch
import transfers
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from digitdist import models, sync
from digitdist.config import load
from digitdist.data import SPECS, ImageSet, Sharding, Splits, cut, normalise
from digitdist.sync import Tree


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def reference_gradient(batch: sync.Batch, name: str = "cnn") -> list[torch.Tensor]:
    """The gradient of the mean loss over a whole global batch, in one go."""
    model = without_dropout(models.build(load((), [f"model.name={name}"]).model, 0))
    pixels = normalise(batch[0], SPECS["mnist"])
    torch.nn.functional.cross_entropy(model(pixels), batch[1]).backward()
    return [parameter.grad for parameter in model.parameters()]


def share(splits: Splits, places: torch.Tensor, how: sync.GradientSync) -> sync.Batch:
    start, stop = how.sharding.share(len(places))
    return splits.train.__getitems__(places[start:stop])


def check_against_reference(accelerator: Accelerator, splits: Splits, mode: str, batch: int, accumulate: int, shards: int):
    """Asserts that a step's gradient is that of the mean loss over the global batch. Collective."""
    config = load((), [f"sync.mode={mode}", f"sync.shards={shards}", f"train.accumulate={accumulate}"])
    model = without_dropout(models.build(config.model, 0))
    how = sync.build(config, accelerator, model, lambda *_: None)
    places = torch.arange(7, 7 + batch)
    own = share(splits, places, how)
    with transfers.none_allowed():
        told = how.gradients(own, batch, 0, stop=False)
    agreed = sync.Agreed.read(told)
    whole = splits.train.__getitems__(places)
    for ours, theirs in zip((p.grad for p in model.parameters()), reference_gradient(whole), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6, rtol=0), (ours - theirs).abs().max()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(normalise(whole[0], SPECS["mnist"])), whole[1])
    assert abs(agreed.loss - loss.item()) < 1e-5
    assert agreed.stops == 0


def check_rounds(accelerator: Accelerator, splits: Splits) -> None:
    """Asserts that two rounds of three steps end as they do where one process goes through all ranks' steps. Collective."""
    options = ["sync.mode=local", "sync.outer_lr=0.7", "sync.outer_momentum=0.9", "model.name=cnn_batchnorm"]
    config, world_size = load((), options), accelerator.num_processes
    model, ours = models.build(config.model, 0), models.build(config.model, 0).train()
    how = sync.build(config, accelerator, model, lambda *_: None)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    momenta = [torch.zeros_like(p) for p in ours.parameters()]
    for first in (0, 3):
        local = [copy.deepcopy(ours) for _ in range(world_size)]
        losses = []
        for step in range(first, first + 3):
            places = torch.arange(step * 47, step * 47 + 47)
            assert how.gradients(share(splits, places, how), 47, step, stop=step == 5) is None
            inner.step()
            inner.zero_grad()
            for rank, network in enumerate(local):
                start, stop = Sharding.of(world_size, rank, world_size).share(47)
                images, labels, _ = splits.train.__getitems__(places[start:stop])
                total = F.cross_entropy(network(normalise(images, SPECS["mnist"])), labels, reduction="sum")
                gradients = torch.autograd.grad(total / len(labels), list(network.parameters()))
                losses.append(total.item())
                with torch.no_grad():
                    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                        parameter -= 0.1 * gradient
        agreed = how.end_round([model], first + 3, together=False)
        assert abs(agreed.loss - sum(losses) / (3 * 47)) < 1e-5
        assert agreed.stops == (world_size if first else 0)
        with torch.no_grad():
            for number, parameter in enumerate(ours.parameters()):
                now = torch.stack([list(network.parameters())[number] for network in local]).mean(0)
                momenta[number] = 0.9 * momenta[number] + parameter - now
                parameter -= 0.7 * (parameter - now + 0.9 * momenta[number])  # Nesterov, as in torch.optim.SGD
            for number, buffer in enumerate(ours.buffers()):
                buffer.copy_(torch.stack([list(network.buffers())[number].float() for network in local]).mean(0))
    for (name, theirs), mine in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.allclose(mine.float(), theirs.float(), atol=1e-5, rtol=0), name


def check_hardness(accelerator: Accelerator, splits: Splits) -> None:
    """Asserts that all ranks come to know the losses that each has noted, also through a checkpoint. Collective."""
    config = load((), ["data.focus=2"])
    model, images = without_dropout(models.build(config.model, 0)), splits.train.subset(torch.arange(100, 160))
    how, hardness = sync.build(config, accelerator, model, lambda *_: None), sync.Hardness(images)
    start, stop = how.sharding.share(20)
    own = images.__getitems__(torch.arange(start, stop))
    how.gradients(own, 20, 0, stop=False)
    hardness.note(own[2], how.objective.of_images)
    restored = sync.Hardness(images)
    restored.restore(hardness.state(), accelerator.is_main_process)
    for one in (hardness, restored):
        one.meet()
        assert (one.known[100:120] - losses_of(model, images, 20)).abs().max() < 1e-5
        assert one.hardest()[:40].tolist() == list(range(20, 60)), "those that nobody has visited yet"
        assert one.hardest()[40:].tolist() == one.known[100:120].argsort(descending=True).tolist()
    assert torch.equal(hardness.known, restored.known)
    hardness.meet()
    assert torch.equal(hardness.known, restored.known), "what is known stays known"


def losses_of(model: torch.nn.Module, images: ImageSet, count: int) -> torch.Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(normalise(images.images[:count], SPECS["mnist"])), images.labels[:count], reduction="none")


def test_the_losses_that_ranks_note_are_known_to_all(accelerator: Accelerator, splits: Splits):
    check_hardness(accelerator, splits)


def test_a_local_round_ends_in_one_outer_step_on_the_mean_of_all_ranks(accelerator: Accelerator, splits: Splits):
    check_rounds(accelerator, splits)


@settings(max_examples=12, deadline=None)
@given(mode=st.sampled_from(["ddp", "exact"]), batch=st.integers(1, 60), accumulate=st.integers(1, 5), shards=st.integers(1, 9))
def test_the_gradient_is_that_of_the_mean_loss(
    accelerator: Accelerator, splits: Splits, mode: str, batch: int, accumulate: int, shards: int
):
    check_against_reference(accelerator, splits, mode, batch, accumulate, shards)


def tree_of(values: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """The root when the leaves are summed in stretches between `bounds`, whose nodes then meet."""
    finished = Tree()
    for start, stop in itertools.pairwise(bounds):
        part = Tree()
        for leaf in range(start, stop):
            part.add(leaf, 1, values[leaf].clone())
        for node in part.nodes:
            finished.add(*node)
    return finished.root()


@given(leaves=st.integers(1, 40), ranks=st.integers(1, 6), seed=st.integers(0, 100))
def test_the_tree_sums_to_the_same_bits_however_it_is_shared(leaves: int, ranks: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(leaves, 5, generator=generator) * 10 ** torch.randn(leaves, 1, generator=generator)
    assert torch.equal(tree_of(values, cut(leaves, ranks)), tree_of(values, [0, leaves]))


def test_a_tree_keeps_few_nodes():
    tree = Tree()
    for leaf in range(1000):
        tree.add(leaf, 1, torch.zeros(1))
        assert len(tree.nodes) <= 10


def test_another_order_of_the_sum_would_show():
    """The tree is the point: the same numbers summed one after the other give other bits."""
    values = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    one_by_one = values[0].clone()
    for value in values[1:]:
        one_by_one += value
    assert not torch.equal(one_by_one, tree_of(values, [0, 64]))
    assert torch.allclose(one_by_one, tree_of(values, [0, 64]), atol=1e-4)


def test_dropout_draws_by_seed_step_and_part_alone(accelerator: Accelerator, splits: Splits):
    def gradient(seed: int, step: int) -> torch.Tensor:
        config = load((), ["sync.mode=exact", f"seed={seed}"])
        model = models.build(config.model, 0)
        how = sync.build(config, accelerator, model, lambda *_: None)
        torch.rand(step + seed)  # whatever was drawn before does not matter
        how.gradients(splits.train.__getitems__(torch.arange(50)), 50, step, stop=False)
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    first = gradient(0, 3)
    assert torch.equal(first, gradient(0, 3))
    assert not torch.equal(first, gradient(0, 4))
    assert not torch.equal(first, gradient(1, 3))


def test_batchnorm_statistics_are_folded_in_the_order_of_shards(accelerator: Accelerator, splits: Splits):
    config = load((), ["sync.mode=exact", "sync.shards=3", "model.name=cnn_batchnorm"])
    model = models.build(config.model, 0)
    by_hand = models.build(config.model, 0).train()
    how = sync.build(config, accelerator, model, lambda *_: None)
    batch = splits.train.__getitems__(torch.arange(30))
    how.gradients(batch, 30, 0, stop=False)
    with torch.no_grad():
        for part in normalise(batch[0], SPECS["mnist"]).split(10):
            by_hand(part)
    for (name, ours), theirs in zip(model.named_buffers(), by_hand.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name
