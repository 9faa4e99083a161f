"""The published one-epoch recipe, which reports 99.04 % of MNIST's test images, the mean of 30 seeds: plain PyTorch.

It is the last form of github.com/tuomaso/train_mnist_fast: convolutions of 24 channels, 5×5, and of 32 channels, 3×3, each with
a 2×2 maximum and ReLU; linear layers of 256 and 10; one epoch in batches of 256, the last one smaller; Adam with betas of 0.7
and 0.9, its rate that of `OneCycleLR` up to 0.01, without cycling the momentum. As there, all images are in memory, normalised
and in random order before the clock starts. The code is our own.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from digitdist.bench.loops import await_device
from digitdist.config import load_config
from digitdist.data import DATA_SETS, normalise, read_mnist
from digitdist.distributed import make_plan

BATCH_SIZE, TEST_BATCH_SIZE, PEAK = 256, 2000, 0.01


def measure_one_epoch(overrides: list[str]) -> dict[str, float]:
    """One training in this process, in fp32: `seconds` from the first batch to the last update, and `accuracy` on all test
    images after it.

    Of the configuration it takes `seed`, `data.root`, `train.threads`, and `train.max_steps`, which ends it earlier.
    """
    config = load_config([], overrides)
    plan = make_plan(config)
    device = torch.device(plan.device_type)
    torch.manual_seed(config.seed)
    torch.set_num_threads(plan.threads)
    pixels, labels = _ready_images(config.data.root, "train", device)
    order = torch.randperm(len(labels), device=device)
    batches = list(zip(pixels[order].split(BATCH_SIZE), labels[order].split(BATCH_SIZE), strict=True))
    features = [nn.Conv2d(1, 24, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.MaxPool2d(2), nn.ReLU()]
    head = [nn.Flatten(), nn.Linear(32 * 5 * 5, 256), nn.ReLU(), nn.Linear(256, 10)]
    model = nn.Sequential(*features, *head).to(device)
    optimizer = torch.optim.Adam(model.parameters(), PEAK, betas=(0.7, 0.9))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=len(batches), cycle_momentum=False)

    start = time.perf_counter()
    for batch, targets in batches[: config.train.max_steps]:
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets).backward()
        optimizer.step()
        scheduler.step()
    await_device(device)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "accuracy": _accuracy(model, *_ready_images(config.data.root, "test", device))}


def _ready_images(root: str, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """All images of MNIST's `split`, normalised, float32 [n, 1, 28, 28], and their labels, int64 [n]."""
    images = read_mnist(Path(root), split).to(device)
    return normalise(images.images, DATA_SETS["mnist"]), images.labels


def _accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        correct = [
            (model(batch).argmax(1) == targets).sum().item()
            for batch, targets in zip(pixels.split(TEST_BATCH_SIZE), labels.split(TEST_BATCH_SIZE), strict=True)
        ]
    return sum(correct) / len(labels)
