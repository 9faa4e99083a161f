"""What is done to the pixels of a batch: normalisation and augmentation, on the images' own device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from digitdist.config import AugmentConfig
from digitdist.data.datasets import DataSetInfo
from digitdist.distributed import to_device


def normalise(images: Tensor, info: DataSetInfo) -> Tensor:
    """uint8 [n, 28, 28] to float32 [n, 1, 28, 28] of about zero mean and unit deviation."""
    return images.unsqueeze(1).float().sub_(255 * info.mean).mul_(1 / (255 * info.std))


def augment(images: Tensor, config: AugmentConfig, background: float) -> Tensor:
    """Each image of float32 [n, 1, 28, 28] shifted, rotated, scaled and sheared at random, drawn from torch's CPU generator.

    Pixels that come from outside an image have the value `background`.
    """
    if not (config.shift or config.rotate or config.scale or config.shear) or not len(images):
        return images
    drawn = 2 * torch.rand(5, len(images), 1) - 1  # on the CPU, whatever the device
    angle, scale, shear, shift_x, shift_y = to_device(drawn, images.device)
    angle, scale = torch.deg2rad(config.rotate * angle), 1 + config.scale * scale
    cos, sin, shear = angle.cos() / scale, angle.sin() / scale, config.shear * shear
    size = images.shape[-1]
    pixel = 2 / size  # in the units of grid_sample, where an image extends from -1 to 1
    axis = (torch.arange(size, device=images.device) - (size - 1) / 2) * pixel
    # The source of each pixel, [[cos, -sin], [sin, cos]] @ [[1, shear], [0, 1]] @ (x, y) + shift, as two sums a pixel:
    # the matrix product of F.affine_grid takes a third of the whole time.
    source_x, source_y = cos * axis + config.shift * pixel * shift_x, sin * axis + config.shift * pixel * shift_y
    grid = torch.empty(len(images), size, size, 2, device=images.device)
    torch.add(source_x[:, None], ((cos * shear - sin) * axis)[..., None], out=grid[..., 0])
    torch.add(source_y[:, None], ((sin * shear + cos) * axis)[..., None], out=grid[..., 1])
    return F.grid_sample(images - background, grid, align_corners=False).add_(background)
