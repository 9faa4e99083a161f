"""What is done to the pixels of a batch: normalisation and augmentation, on the images' own device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from digitdist.config import AugmentConfig
from digitdist.data.info import DataSetInfo
from digitdist.distributed import to_device


def normalise(images: Tensor, info: DataSetInfo) -> Tensor:
    """uint8 [n, h, w] or [n, c, h, w] to float32 [n, c, h, w], each channel of about zero mean and unit deviation."""
    if info.channels == 1:
        return images.unsqueeze(1).float().sub_(255 * info.mean[0]).mul_(1 / (255 * info.std[0]))
    mean, std = (per_channel(values, images.device) for values in (info.mean, info.std))
    return images.float().sub_(255 * mean).div_(255 * std)


def displayable(images: Tensor) -> np.ndarray:
    """Raw images on the CPU as plots take them: uint8 [n, h, w], or [n, h, w, 3] in colour."""
    return (images.permute(0, 2, 3, 1) if images.ndim == 4 else images).numpy()


def black(info: DataSetInfo) -> Tensor:
    """What a black pixel is after `normalise`: float32 [], or in colour [c, 1, 1]; on the CPU."""
    values = per_channel([-mean / std for mean, std in zip(info.mean, info.std, strict=True)], torch.device("cpu"))
    return values.squeeze() if info.channels == 1 else values


def per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """One number for each channel, float32 [c, 1, 1], made on the device: the host would wait for a copy."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


def augment(images: Tensor, config: AugmentConfig, background: Tensor | float) -> Tensor:
    """Each image of float32 [n, c, h, w] shifted, rotated, scaled and sheared at random, drawn from torch's CPU generator.

    Pixels that come from outside an image have the value `background`, a number, or float32 [] or [c, 1, 1] on the same device.
    """
    if not (config.shift or config.rotate or config.scale or config.shear) or not len(images):
        return images
    drawn = 2 * torch.rand(5, len(images), 1) - 1  # on the CPU, whatever the device
    angle, scale, shear, shift_x, shift_y = to_device(drawn, images.device)
    angle, scale = torch.deg2rad(config.rotate * angle), 1 + config.scale * scale
    cos, sin, shear = angle.cos() / scale, angle.sin() / scale, config.shear * shear
    height, width = images.shape[-2:]
    # In the units of grid_sample, where an image extends from -1 to 1 both ways.
    x, y = ((torch.arange(size, device=images.device) - (size - 1) / 2) * (2 / size) for size in (width, height))
    # The source of each pixel, [[cos, -sin], [sin, cos]] @ [[1, shear], [0, 1]] @ (x, y) + shift, as two sums a pixel:
    # the matrix product of F.affine_grid takes a third of the whole time.
    source_x = cos * x + config.shift * (2 / width) * shift_x
    source_y = sin * x * (width / height) + config.shift * (2 / height) * shift_y
    grid = torch.empty(len(images), height, width, 2, device=images.device)
    torch.add(source_x[:, None], ((cos * shear - sin) * y * (height / width))[..., None], out=grid[..., 0])
    torch.add(source_y[:, None], ((sin * shear + cos) * y)[..., None], out=grid[..., 1])
    return F.grid_sample(images - background, grid, align_corners=False).add_(background)
