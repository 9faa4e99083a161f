"""The networks: images, float32 [n, in_channels, height, width], to logits, float32 [n, num_classes].

A new one is a class and a line in `MODELS`; ``model.target`` names a user's own.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from digitdist.config import ModelConfig, import_target
from digitdist.data import DATA_SETS, DataSetInfo, seed_generators
from digitdist.errors import UserError, in_one_line

Size = int | tuple[int, int]  # of an image: its side, or height and width
MNIST = DATA_SETS["mnist"]  # for its images are the networks here, unless they are told otherwise
CLASSES, CHANNELS, SIDE = MNIST.num_classes, MNIST.channels, MNIST.image_size


class Cnn(nn.Module):
    """Two 5×5 convolutions, two linear layers, dropout; 21,840 weights for MNIST.

    It returns logits: a softmax before `CrossEntropyLoss`, which applies one itself, would flatten the gradient and cost
    1.5 points of accuracy after 9 epochs (97.2 % against 98.6 %).
    """

    def __init__(self, num_classes: int = CLASSES, in_channels: int = CHANNELS, image_size: Size = SIDE) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.channel_dropout = nn.Dropout2d(0.5)
        self.linear1 = nn.Linear(20 * area([((side - 4) // 2 - 4) // 2 for side in sides(image_size)], image_size), 50)
        self.dropout = nn.Dropout(0.5)
        self.linear2 = nn.Linear(50, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        # Dropping channels and the activation commute with the maximum, after which they have a quarter of the work.
        x = F.relu(self.channel_dropout(F.max_pool2d(self.conv2(x), 2)))
        x = self.dropout(F.relu(self.linear1(x.flatten(1))))
        return self.linear2(x)


class CnnBatchNorm(nn.Module):
    """Three 3×3 convolutions of `width`, 2·`width` and 4·`width` channels, each with BatchNorm, and a linear layer."""

    def __init__(
        self, num_classes: int = CLASSES, in_channels: int = CHANNELS, image_size: Size = SIDE, width: int = 16
    ) -> None:
        super().__init__()
        channels = (in_channels, width, 2 * width, 4 * width)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(o), nn.ReLU())
                for i, o in itertools.pairwise(channels)
            )
        )
        size = list(sides(image_size))
        for _ in self.blocks:
            size = [(side - 2) // 2 for side in size]
        self.linear = nn.Linear(4 * width * area(size, image_size), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.blocks(images).flatten(1))


class ConvNet(nn.Module):
    """The network of the recipes: convolutions of `channels`, each with BatchNorm and GELU, and a linear layer.

    It leaves out a rim of 2 pixels: the middle 24×24 of MNIST's 28×28 hold all but the rims of a few digits. The first
    convolution is `stem`×`stem`, with stride 2 if that is even; the others are 3×3. The first and the last have no padding. A
    2×2 maximum follows the convolutions numbered in `pools`, before BatchNorm and GELU, which then have a quarter of the work.
    """

    def __init__(
        self,
        num_classes: int = CLASSES,
        in_channels: int = CHANNELS,
        image_size: Size = SIDE,
        channels: Sequence[int] = (16, 32, 48),
        pools: Sequence[int] = (1,),
        stem: int = 4,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size, last = [side - 4 for side in sides(image_size)], len(channels) - 1
        for number, (before, width) in enumerate(itertools.pairwise((in_channels, *channels))):
            kernel, stride, padding = (3, 1, int(number < last)) if number else (stem, 2 - stem % 2, 0)
            layers.append(nn.Conv2d(before, width, kernel, stride, padding, bias=False))
            size = [(side + 2 * padding - kernel) // stride + 1 for side in size]
            if number in pools:
                layers.append(nn.MaxPool2d(2))
                size = [side // 2 for side in size]
            layers += [nn.BatchNorm2d(width), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(channels[-1] * area(size, image_size), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layers(images[:, :, 2:-2, 2:-2])
        # Flattened in the order of channels-last memory, so that the gradient comes back in that layout: where activations
        # and gradients differ in layout, a step takes up to a quarter longer.
        return self.linear(features.permute(0, 2, 3, 1).flatten(1))


class Columns(nn.Module):
    """`columns` convolutional networks side by side, whose logits are averaged. `column`: the arguments of each `ConvNet`.

    In training each column gets a part of the images, so that all together cost as much as one; with fewer images than
    columns, each gets all. After Cireşan, Meier and Schmidhuber, Multi-column Deep Neural Networks for Image
    Classification, 2012, where each column always gets all images.
    """

    def __init__(
        self,
        num_classes: int = CLASSES,
        in_channels: int = CHANNELS,
        image_size: Size = SIDE,
        columns: int = 2,
        **column: Any,
    ) -> None:
        super().__init__()
        self.columns = nn.ModuleList(ConvNet(num_classes, in_channels, image_size, **column) for _ in range(columns))

    def forward(self, images: Tensor) -> Tensor:
        count = len(self.columns)
        if self.training and len(images) >= count:  # with fewer, a column would have no gradient
            parts = images.tensor_split(count)
            return torch.cat([column(part) for column, part in zip(self.columns, parts, strict=True)])
        return torch.stack([column(images) for column in self.columns]).mean(0)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": Cnn,
    "cnn_batchnorm": CnnBatchNorm,
    "convnet": ConvNet,
    "columns": Columns,
}


def sides(image_size: Size) -> tuple[int, int]:
    """Height and width of an image."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def area(size: Sequence[int], image_size: Size) -> int:
    """Pixels of a feature map whose height and width, `size`, are what layers leave of an image.

    Raises:
        ValueError: they leave nothing of it.
    """
    if min(size) < 1:
        height, width = sides(image_size)
        raise ValueError(f"images of {height}×{width} are too small for its layers; take larger ones, or another network")
    return math.prod(size)


def build_model(config: ModelConfig, seed: int, info: DataSetInfo) -> nn.Module:
    """The configured network for a data set, on the CPU, in training mode, its initial weights a function of `seed` alone,
    whether torch, numpy or Python's `random` draws them.

    Its class gets `num_classes`, `in_channels` and `image_size` (a number, or height and width) as far as its constructor
    takes them, and ``model.args``.

    Raises:
        UserError: there is no such network, its arguments do not fit, or its output is not floating-point [n, classes].
    """
    kind = _find_class(config)
    seed_generators(seed)
    label = config.target or config.name
    form = {"num_classes": info.num_classes, "in_channels": info.channels, "image_size": info.image_size}
    try:
        parameters = inspect.signature(kind).parameters
        model = kind(**{name: value for name, value in form.items() if name in parameters} | config.args)
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *info.image_shape))
    except Exception as error:  # a user's network may raise anything
        raise UserError(f"model {label!r} with model.args={dict(config.args)} does not work: {in_one_line(error)}") from error
    problem = output_problem(logits, 2, info.num_classes)
    if problem:
        raise UserError(f"model {label!r} {problem}")
    return model.train()


def output_problem(output: Any, num_images: int, num_classes: int) -> str | None:
    """What is wrong with the `output` of a network for `num_images` images, in words that follow its name; None if nothing."""
    wanted = f"must give logits of shape ({num_images}, {num_classes})"
    if not isinstance(output, Tensor):
        parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else []
        inner = ", ".join(f"a tensor {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__ for p in parts)
        return f"returns a {type(output).__name__}{f' of {inner}' if inner else ''}; forward {wanted}, and nothing beside"
    if tuple(output.shape) != (num_images, num_classes):
        return f"gives {tuple(output.shape)} for {num_images} images; it {wanted}"
    if not output.is_floating_point():
        return f"gives {output.dtype}; it {wanted} as floating-point numbers"
    return None


def _find_class(config: ModelConfig) -> Callable[..., nn.Module]:
    if config.target is None:
        if config.name not in MODELS:
            raise UserError(
                f"model.name={config.name} is not allowed; it takes one of {', '.join(MODELS)}"
                " (your own: model.target=package.module.Class)"
            )
        return MODELS[config.name]
    return import_target("model.target", config.target)
