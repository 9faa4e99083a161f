from __future__ import annotations

import pytest
import torch

from digitdist import data
from digitdist.config import AugmentConfig
from digitdist.data import Splits


def test_normalised_training_images_have_mean_0_and_deviation_1(splits: Splits):
    pixels = data.normalise(splits.train.images, data.DATA_SETS["mnist"])
    assert pixels.shape == (60000, 1, 28, 28)
    assert abs(pixels.mean().item()) < 1e-3
    assert abs(pixels.std().item() - 1) < 1e-3


def test_augmentation_moves_images_and_keeps_the_background(splits: Splits):
    pixels = data.normalise(splits.train.images[:50], data.DATA_SETS["mnist"])
    background = pixels.min().item()
    assert data.augment(pixels, AugmentConfig(), background) is pixels
    torch.manual_seed(0)
    moved = data.augment(pixels, AugmentConfig(shift=2, rotate=10, scale=0.1), background)
    assert moved.shape == pixels.shape
    assert not torch.equal(moved, pixels)
    assert torch.allclose(moved[:, :, 0, 0], torch.tensor(background), atol=1e-5)
    ink, moved_ink = (pixels - background).sum((1, 2, 3)), (moved - background).sum((1, 2, 3))
    assert ((moved_ink / ink - 1).abs() < 0.4).all()


def test_a_sheared_image_has_its_rows_where_they_were(splits: Splits):
    pixels = splits.train.images[:50].unsqueeze(1).float()
    torch.manual_seed(0)
    moved = data.augment(pixels, AugmentConfig(shear=0.2), 0.0)
    assert torch.allclose(moved.sum(3), pixels.sum(3), rtol=1e-3, atol=1)
    columns = torch.arange(28.0)
    shift = ((moved * columns).sum(3) / moved.sum(3) - (pixels * columns).sum(3) / pixels.sum(3))[:, 0]
    inked = pixels[:, 0].sum(2) > 500
    slant = (shift / (torch.arange(28) - 13.5)).masked_fill(~inked, torch.nan)
    of_image = slant.nanmean(1, keepdim=True)
    assert of_image.abs().max() <= 0.201
    assert of_image.std() > 0.08
    assert ((slant - of_image).abs().nan_to_num() < 0.01).all()


def test_an_augmented_image_is_the_affine_map_of_what_was_drawn():
    images, config = torch.rand(50, 1, 28, 28), AugmentConfig(shift=2, rotate=20, scale=0.2, shear=0.3)
    torch.manual_seed(0)
    moved = data.augment(images, config, -0.4)
    torch.manual_seed(0)
    angle, scale, shear, *shift = (2 * torch.rand(5, 50) - 1).unbind()
    angle = torch.deg2rad(config.rotate * angle)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(50, 2, 2)
    slant = torch.eye(2).repeat(50, 1, 1)
    slant[:, 0, 1] = config.shear * shear
    matrix = rotation @ slant / (1 + config.scale * scale)[:, None, None]
    theta = torch.cat([matrix, torch.stack(shift, 1)[..., None] * config.shift * 2 / 28], 2)
    grid = torch.nn.functional.affine_grid(theta, [50, 1, 28, 28], align_corners=False)
    wanted = torch.nn.functional.grid_sample(images + 0.4, grid, align_corners=False) - 0.4
    assert torch.allclose(moved, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["shift", "rotate", "scale", "shear"])
def test_each_augmentation_works_alone(kind: str, splits: Splits):
    pixels = splits.train.images[:5].unsqueeze(1).float()
    assert not torch.equal(data.augment(pixels, AugmentConfig(**{kind: 0.5}), 0.0), pixels)


def test_a_whole_shift_is_a_whole_shift(splits: Splits):
    pixels = splits.train.images[:5].unsqueeze(1).float()
    theta = torch.tensor([[1.0, 0, 2 / 28 * 3], [0, 1, 0]]).expand(5, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, [5, 1, 28, 28], align_corners=False)
    moved = torch.nn.functional.grid_sample(pixels, grid, align_corners=False)
    assert torch.allclose(moved[..., :-3], pixels[..., 3:], atol=1e-3)
