"""Networks as users bring them."""

from __future__ import annotations

import time

import torch
from torch import nn


class Smooth(nn.Sequential):
    """It has no maximum, whose choice between two nearly equal values rounding may change, and no dropout."""

    def __init__(self) -> None:
        layers = (nn.Conv2d(1, 8, 5, stride=2), nn.Tanh(), nn.Conv2d(8, 16, 3, stride=2), nn.Tanh())
        super().__init__(*layers, nn.Flatten(), nn.Linear(400, 10))


class Tied(nn.Module):
    """Two of its weights are one."""

    def __init__(self, width: int = 10):
        super().__init__()
        self.first, self.second = nn.Linear(784, width), nn.Linear(784, width)
        self.second.weight = self.first.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.first(images.flatten(1)) + self.second(images.flatten(1)).relu()


class Moody(nn.Linear):
    """No graph can hold it: what it does depends on what it sees."""

    def __init__(self) -> None:
        super().__init__(784, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images.flatten(1))
        return logits if logits.sum() > 0 else -logits


class Bessel(nn.Linear):
    """It has an operation that ONNX lacks."""

    def __init__(self) -> None:
        super().__init__(784, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(super().forward(images.flatten(1)))


class Light(nn.Sequential):
    """A convolution, dropout and a linear layer, which take little even where a CPU computes in float16."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 5, stride=2), nn.ReLU(), nn.Dropout2d(0.2), nn.Flatten(), nn.Linear(4 * 12 * 12, 10))


class Unhurried(nn.Sequential):
    """It waits in each forward pass of training, so that what is done to it at some moment finds it there on any machine.

    It has BatchNorm and dropout; `pause` is in seconds.
    """

    def __init__(self, num_classes: int, in_channels: int, pause: float = 0.0):
        first = (nn.Conv2d(in_channels, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
        super().__init__(*first, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(4 * 4 * 4, num_classes))
        self.pause = pause

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(self.pause)
        return super().forward(images)
