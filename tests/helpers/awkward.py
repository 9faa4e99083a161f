"""Networks that are awkward to train on several processes, each for one reason, which its docstring gives."""

from __future__ import annotations

import collections
import os
import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


class Base(nn.Module):
    """A linear layer on images made smaller, 7×7; the others differ from it."""

    def __init__(self, features: int = 49) -> None:
        super().__init__()
        self.head = nn.Linear(features, 10)

    def small(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 4).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.small(images))


class Convolution(Base):
    """The classic network of the tutorials: `view` takes no channels-last."""

    def __init__(self) -> None:
        super().__init__(320)
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(images), 2).relu_()
        return self.head(F.relu(F.max_pool2d(self.conv2(x), 2), inplace=True).view(-1, 320))


class Volume(Base):
    """Its weights have five dimensions, for which there is another layout."""

    def __init__(self) -> None:
        super().__init__(2 * 7 * 7)
        self.conv = nn.Conv3d(1, 2, (1, 4, 4), stride=4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images[:, :, None]).flatten(1))


class UnusedParameter(Base):
    """A parameter takes no part in the loss; and a module in a list is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))
        self.heads = nn.ModuleList(nn.Linear(49, 10) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.heads[1](self.small(images))


class StochasticDepth(Base):
    """Which parameters take part changes with step and rank."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(49, 49) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.small(images)
        for block in self.blocks:
            if not self.training or torch.rand(()) < 0.5:
                x = x + torch.tanh(block(x))
        return self.head(x)


class Frozen(Base):
    """A layer is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(49, 49).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.first(self.small(images)).tanh())


class NoGradient(Base):
    """A part runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(49, 49)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(self.small(images)).tanh()
        return self.head(x)


class Double(Base):
    """A float64 parameter and a float64 buffer, and logits in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(10, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.scale + self.shift


class DoubleNorm(Base):
    """BatchNorm in float64 between layers in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(49).double()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.small(images).double()).float())


class Half(Base):
    """Parameters in bfloat16, and logits that are a view which is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.head.bfloat16()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.small(images).bfloat16()).t().contiguous().t()


class Integers(Base):
    """An integer parameter, an integer buffer, a truth value, and a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.arange(49).flip(0), requires_grad=False)
        self.register_buffer("again", torch.arange(49))
        self.register_buffer("mask", torch.ones(49, dtype=torch.bool))
        self.register_buffer("phase", torch.ones(49, dtype=torch.complex64))

    def forward(self, images: Tensor) -> Tensor:
        x = self.small(images)[:, self.order][:, self.again]
        return self.head((x * self.phase).real * self.mask)


class Mask(Base):
    """A buffer that is not finite, as masks of attention are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((7, 7), -torch.inf).triu(1))

    def forward(self, images: Tensor) -> Tensor:
        x = F.avg_pool2d(images, 4).squeeze(1)
        return self.head((torch.softmax(x @ x.transpose(1, 2) + self.mask, 2) @ x).flatten(1))


class OtherGenerators(Base):
    """Initial weights and noise of numpy's and Python's generators."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(np.random.randn(10, 49)) * 0.1)
            self.head.bias.fill_(random.random())

    def forward(self, images: Tensor) -> Tensor:
        noise = random.random() * torch.from_numpy(np.random.rand(10)).float()
        return super().forward(images) + (noise if self.training else 0)


class AlwaysDropout(Base):
    """`F.dropout` without `training=`: it is random in evaluations too."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.dropout(self.small(images)))


class ExtraState(Base):
    """Extra state of every kind that can be stored, which changes in training."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.scale = 0, torch.ones(2)

    def get_extra_state(self) -> object:
        return {"steps": self.steps, "scale": (self.scale, None), 7: [b"\x00\xff", "text", 0.1, True]}

    def set_extra_state(self, state: dict) -> None:
        assert state[7] == [b"\x00\xff", "text", 0.1, True]
        self.steps, (self.scale, _) = state["steps"], state["scale"]


class ExtraTensor(Base):
    """Extra state that is a tensor, as Transformer Engine's is."""

    extra = torch.tensor([3, 1], dtype=torch.uint8)

    def get_extra_state(self) -> Tensor:
        return self.extra

    def set_extra_state(self, state: Tensor) -> None:
        assert torch.equal(state, self.extra)


class Spectral(Base):
    """Spectral norm: its buffers change in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.spectral_norm(nn.Linear(49, 49))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.first(self.small(images)).relu())


class SpectralHook(Base):
    """Spectral norm as it was before, by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.spectral_norm(nn.Linear(49, 49))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.first(self.small(images)).relu())


class WeightNorm(Base):
    """Weight norm, as a parametrization and as a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(49, 49))
        self.second = nn.utils.weight_norm(nn.Linear(49, 49))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.small(images)).relu()))


class InstanceNorm(Base):
    """InstanceNorm with running statistics, and GroupNorm."""

    def __init__(self) -> None:
        super().__init__(4 * 7 * 7)
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).flatten(1))


class RunningMean(Base):
    """A running mean of its own, a counter, and a buffer that is not persistent: all change in forward, one by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(49))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.small(images)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.count += 1
        self.largest.copy_(torch.maximum(self.largest, x.detach().max()))
        return self.head((x - self.mean) / (1 + self.largest)) + 0.001 * self.count


class NormsNowAndThen(Base):
    """Which norms take part changes with step and micro-batch; one takes part twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(49) for _ in range(3))
        self.twice = nn.BatchNorm1d(49)

    def forward(self, images: Tensor) -> Tensor:
        x = self.small(images)
        for norm in self.norms:
            if not self.training or torch.rand(()) < 0.5:
                x = norm(x)
        return self.head(self.twice(self.twice(x).relu()))


class Renorm(Base):
    """Running statistics enter training: it normalises by them, half and half."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(49)

    def forward(self, images: Tensor) -> Tensor:
        x = self.small(images)
        by_running = (x - self.norm.running_mean) / (self.norm.running_var + 0.1).sqrt()
        return self.head(self.norm(x) + by_running)


class LazyNorms(Base):
    """Norms that learn their size in the first forward pass."""

    def __init__(self) -> None:
        super().__init__(4 * 7 * 7)
        norms = (nn.LazyBatchNorm2d(), nn.LazyInstanceNorm2d(track_running_stats=True, affine=True))
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 4, 4), *norms)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).flatten(1))


class OwnNorm(Base):
    """A norm of its own, whose statistics change in place, and only after a few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(49))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.small(images)
        if self.training:
            self.steps += 1
            if self.steps > 3:
                self.mean.lerp_(x.detach().mean(0), 0.5)
        return self.head(x - self.mean)


class HiddenState(Base):
    """A running mean that is no buffer."""

    mean: float | Tensor = 0.0

    def forward(self, images: Tensor) -> Tensor:
        x = self.small(images)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.head(x - self.mean)


class HiddenCounter(Base):
    """A count of its forward passes that is no buffer."""

    count = 0

    def forward(self, images: Tensor) -> Tensor:
        self.count += self.training
        return super().forward(images) / (1 + self.count)


class LateCounter(Base):
    """A count of its forward passes, in a plain dict, that matters from the sixth on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"passes": 0}

    def forward(self, images: Tensor) -> Tensor:
        self.seen["passes"] += self.training
        return super().forward(images) * (1.0 if self.seen["passes"] < 6 else 0.5)


class PairsInEvaluation(Base):
    """It takes images two by two in evaluations."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.small(images)
        return self.head(x if self.training else x.view(-1, 2, 49).flip(1).view(-1, 49))


class Remembers(Base):
    """It keeps its last features, and does nothing with them."""

    def forward(self, images: Tensor) -> Tensor:
        self.last = self.small(images)
        return self.head(self.last)


class ChangedParameter(Base):
    """A running mean that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(49), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.small(images)
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.head(x - self.mean)


class ChangedExtraState(Base):
    """A count in its extra state."""

    steps = 0

    def get_extra_state(self) -> object:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict) -> None:
        self.steps = state["steps"]

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        return super().forward(images)


class Tied(Base):
    """Two weights are one, and one module has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(49, 49), nn.Linear(49, 49)
        self.second.weight, self.third = self.first.weight, self.first

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(self.small(images)).tanh()).tanh()).tanh())


class View(Base):
    """A parameter that is a view with gaps, and one that lies transposed in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps = nn.Parameter((torch.randn(49, 98) * 0.1)[:, ::2])
        self.turned = nn.Parameter((torch.randn(30, 49) * 0.1).t())

    def forward(self, images: Tensor) -> Tensor:
        x = (self.small(images) @ self.gaps).relu()
        return self.head(x + (x @ self.turned) @ self.turned.t())


class ListOfParameters(Base):
    """Parameters in a `ParameterList`, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.ones(49) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.small(images)
        for scale in self.scales:
            x = F.dropout(x * scale, 0.2, self.training)
        return self.head(x)


class Transformer(Base):
    """A Transformer's encoder over rows."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(7, 1, 14, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(F.avg_pool2d(images, 4).squeeze(1)).flatten(1))


class Recurrent(Base):
    """An LSTM over rows."""

    def __init__(self) -> None:
        super().__init__(16)
        self.lstm = nn.LSTM(7, 16, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.lstm(F.avg_pool2d(images, 4).squeeze(1))[0][:, -1])


class Checkpointed(Base):
    """Activation checkpointing."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(49, 49), nn.BatchNorm1d(49), nn.Dropout(0.1), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        x = self.small(images).requires_grad_()
        return self.head(checkpoint(self.first, x, use_reentrant=self.reentrant))


class ReentrantlyCheckpointed(Checkpointed):
    """The same by a backward pass inside the backward pass, of which the graph of the loss knows nothing."""

    reentrant = True


class Lazy(Base):
    """Layers that learn their size in the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.LazyLinear(20), nn.LazyLinear(10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.first(self.small(images)).relu())


class Hooked(Base):
    """Hooks on a module, forward and backward, and on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.head.register_forward_hook(lambda module, inputs, output: 2 * output)
        self.head.register_full_backward_hook(lambda module, inputs, outputs: tuple(0.5 * g for g in inputs if g is not None))
        self.head.bias.register_hook(lambda gradient: 0.5 * gradient)


class Sign(torch.autograd.Function):
    """A custom function with a straight-through gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class Custom(Base):
    """A custom function of autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(49, 49)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(Sign.apply(self.first(self.small(images))))


class GhostNorm(Base):
    """It takes its images in three parts, each with BatchNorm, so that it needs six."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(49)

    def forward(self, images: Tensor) -> Tensor:
        x = self.small(images)
        return self.head(torch.cat([self.norm(part) for part in x.tensor_split(3)]) if self.training else self.norm(x))


class AllFrozen(Base):
    """Nothing of it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class NoParameters(nn.Module):
    """It has no parameters."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :10]


class Detached(Base):
    """No parameter takes part in its logits."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


class Complex(Base):
    """A complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(49, dtype=torch.complex64))

    def forward(self, images: Tensor) -> Tensor:
        return self.head((self.small(images) * self.phase).real)


class TwoOutputs(Base):
    """It returns a tuple."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(images), images


class NamedOutputs(Base):
    """It returns a dict, in training alone."""

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        return {"logits": super().forward(images)} if self.training else super().forward(images)


class FailsInTraining(Base):
    """It fails in training alone."""

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training, "no training today"
        return super().forward(images)


class NotANumber(Base):
    """It divides 0 by 0."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * 0 / 0


class UnstorableState(Base):
    """Extra state that only pickling could hold."""

    def get_extra_state(self) -> object:
        return {"deque": collections.deque()}


class LostState(Base):
    """Extra state that it cannot take back."""

    def get_extra_state(self) -> object:
        return 1


class Sparse(Base):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Embedding(4, 49, sparse=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.small(images) + self.shift(torch.zeros(len(images), dtype=torch.int64)))


class Growing(Base):
    """A buffer that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, images: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, images.detach().mean().view(1)])
        return super().forward(images)


class OwnGenerator(Base):
    """Initial weights of a generator that nobody can seed."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.head.bias.copy_(torch.from_numpy(np.random.default_rng().random(10)))


class ByRank(Base):
    """Initial weights that depend on the rank."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.head.bias.fill_(float(os.environ.get("RANK", "0")))


class WithoutMomentum(Base):
    """BatchNorm with a cumulative average."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(49, momentum=None)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.small(images)))
