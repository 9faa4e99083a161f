"""Checks of gradients, rounds and loss histories against a brute-force reference, for worlds of any size."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from digitdist.config import load_config
from digitdist.data import DATA_SETS, Batch, ImageSet, LossHistory, NullLossHistory, Sharding, Share, Splits, normalise
from digitdist.models import build_model
from digitdist.sync import StepStats, Strategy, build_strategy

MNIST = DATA_SETS["mnist"]


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def reference_gradient(batch: Batch, name: str = "cnn") -> list[torch.Tensor]:
    """The gradient of the mean loss over a whole global batch, in one go."""
    model = without_dropout(build_model(load_config((), [f"model.name={name}"]).model, 0, MNIST))
    pixels = normalise(batch[0], DATA_SETS["mnist"])
    torch.nn.functional.cross_entropy(model(pixels), batch[1]).backward()
    return [parameter.grad for parameter in model.parameters()]


def share(splits: Splits, places: torch.Tensor, strategy: Strategy) -> Batch:
    start, stop = strategy.sharding.share(len(places))
    return splits.train.__getitems__(Share(places[start:stop]))


def check_against_reference(accelerator: Accelerator, splits: Splits, mode: str, batch: int, accumulate: int, shards: int):
    """Asserts that a step's gradient is that of the mean loss over the global batch. Collective."""
    config = load_config((), [f"sync.mode={mode}", f"sync.shards={shards}", f"train.accumulate={accumulate}"])
    model = without_dropout(build_model(config.model, 0, MNIST))
    strategy = build_strategy(config, accelerator, model, MNIST, NullLossHistory(), lambda *_: None)
    places = torch.arange(7, 7 + batch)
    own = share(splits, places, strategy)
    values = strategy.compute_gradients(own, batch, 0, stop=False)
    stats = StepStats.read(values)
    whole = splits.train.__getitems__(Share(places))
    for ours, theirs in zip((p.grad for p in model.parameters()), reference_gradient(whole), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6, rtol=0), (ours - theirs).abs().max()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(normalise(whole[0], DATA_SETS["mnist"])), whole[1])
    assert abs(stats.loss - loss.item()) < 1e-5
    assert stats.stop_requests == 0


def check_rounds(accelerator: Accelerator, splits: Splits) -> None:
    """Asserts that two rounds of three steps end as they do where one process goes through all ranks' steps. Collective."""
    options = ["sync.mode=local", "sync.every=3", "sync.outer_lr=0.7", "sync.outer_momentum=0.9", "model.name=cnn_batchnorm"]
    config, world_size = load_config((), options), accelerator.num_processes
    model, ours = build_model(config.model, 0, MNIST), build_model(config.model, 0, MNIST).train()
    strategy = build_strategy(config, accelerator, model, MNIST, NullLossHistory(), lambda *_: None)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    momenta = [torch.zeros_like(p) for p in ours.parameters()]
    for first in (0, 3):
        local = [copy.deepcopy(ours) for _ in range(world_size)]
        losses = []
        for step in range(first, first + 3):
            places = torch.arange(step * 47, step * 47 + 47)
            assert strategy.compute_gradients(share(splits, places, strategy), 47, step, stop=step == 5) is None
            inner.step()
            inner.zero_grad()
            for rank, network in enumerate(local):
                start, stop = Sharding.of_rank(rank, world_size, world_size).share(47)
                images, labels, _ = splits.train.__getitems__(Share(places[start:stop]))
                total = F.cross_entropy(network(normalise(images, DATA_SETS["mnist"])), labels, reduction="sum")
                gradients = torch.autograd.grad(total / len(labels), list(network.parameters()))
                losses.append(total.item())
                with torch.no_grad():
                    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                        parameter -= 0.1 * gradient
        stats = strategy.sync_round([model], first + 3, make_equal=False, look=True)
        assert abs(stats.loss - sum(losses) / (3 * 47)) < 1e-5
        assert stats.stop_requests == (world_size if first else 0)
        with torch.no_grad():
            for number, parameter in enumerate(ours.parameters()):
                now = torch.stack([list(network.parameters())[number] for network in local]).mean(0)
                momenta[number] = 0.9 * momenta[number] + parameter - now
                parameter -= 0.7 * (parameter - now + 0.9 * momenta[number])  # Nesterov, as in torch.optim.SGD
            for number, buffer in enumerate(ours.buffers()):
                buffer.copy_(torch.stack([list(network.buffers())[number].float() for network in local]).mean(0))
    for (name, theirs), mine in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.allclose(mine.float(), theirs.float(), atol=1e-5, rtol=0), name


def check_loss_history(accelerator: Accelerator, splits: Splits) -> None:
    """Asserts that all ranks come to know the losses that each has recorded, also through a checkpoint. Collective."""
    config = load_config((), ["data.focus=2"])
    model, images = without_dropout(build_model(config.model, 0, MNIST)), splits.train.subset(torch.arange(100, 160))
    history = LossHistory(images)
    strategy = build_strategy(config, accelerator, model, MNIST, history, lambda *_: None)
    start, stop = strategy.sharding.share(20)
    own = images.__getitems__(Share(torch.arange(start, stop)))
    strategy.compute_gradients(own, 20, 0, stop=False)
    restored = LossHistory(images)
    restored.restore(history.state(), accelerator.is_main_process)
    for one in (history, restored):
        one.synchronise()
        assert (one.known[100:120] - losses_of(model, images, 20)).abs().max() < 1e-5
        assert one.ranking()[:40].tolist() == list(range(20, 60)), "those that nobody has seen yet"
        assert one.ranking()[40:].tolist() == one.known[100:120].argsort(descending=True).tolist()
    assert torch.equal(history.known, restored.known)
    history.synchronise()
    assert torch.equal(history.known, restored.known), "what is known stays known"


def losses_of(model: torch.nn.Module, images: ImageSet, count: int) -> torch.Tensor:
    with torch.no_grad():
        return F.cross_entropy(
            model(normalise(images.images[:count], DATA_SETS["mnist"])), images.labels[:count], reduction="none"
        )
