"""Probabilities of images by a model that is in memory, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from digitdist.data import DataSetInfo, normalise


def predict(model: nn.Module, images: Tensor, info: DataSetInfo, precision: str = "fp32") -> Tensor:
    """Probability of each class, float32 [n, classes], for raw images; the model must be in `eval` mode, and is run in
    `precision`: fp32 or bf16."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = model(normalise(images, info))
    return logits.float().softmax(1)
