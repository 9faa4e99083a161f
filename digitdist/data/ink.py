"""Separating the ink of a picture from its paper."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from digitdist.errors import UserError

COARSE_SIDE = 64  # the resolution at which connected patches are found
LEAST_CONTRAST = 0.06  # ink that differs from the paper by less, of 1, is none
FAINT = 0.12  # ink weaker than this fraction of the full ink is not part of the digit
SPECK = 0.04  # neither is a patch with less than this fraction of the largest patch's ink


def extract_ink(image: Image.Image) -> np.ndarray:
    """How much ink there is at each pixel of an RGBA picture, float32 [h, w] in 0..1: the distance from the paper's colour,
    which is that of the border.

    Raises:
        UserError: there is no ink.
    """
    pixels = np.asarray(image, dtype=np.float32) / 255
    colour, alpha = _without_transparency(pixels[..., :3], pixels[..., 3])
    distance = alpha * np.linalg.norm(colour - _paper(colour, alpha), axis=2)
    strong = 2 * distance > distance.max()
    full = np.percentile(distance[strong], 90) if strong.any() else 0
    noise = np.median(distance[~strong])
    if full < max(LEAST_CONTRAST, 6 * noise):
        raise UserError("it is blank: there is no ink in it")
    distance[distance < max(FAINT * full, 4 * noise)] = 0
    return _without_specks((distance / full).clip(0, 1).astype(np.float32))


def extent(mask: np.ndarray) -> tuple[slice, slice]:
    """The smallest box around what is true in bool [h, w]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _without_transparency(colour: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour [h, w, c] and alpha [h, w] of a sheet of paper on a transparent ground, or of ink of any colour on one."""
    if 2 * alpha.min() >= alpha.max():
        return colour, alpha
    sheet = extent(2 * alpha > alpha.max())
    opaque = 2 * alpha[sheet] > alpha.max()
    if opaque.mean() > 0.75 and np.ptp(colour[sheet][opaque], axis=0).max() > 0.25:
        return colour[sheet], alpha[sheet]
    return alpha[..., None], np.ones_like(alpha)


def _paper(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The paper's colour at each pixel of [h, w, c], also in uneven light: a quadratic fitted to most of the border."""
    height, width = alpha.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=2)
    depth = max(1, min(height, width) // 40)
    border = np.ones(alpha.shape, dtype=bool)
    border[depth:-depth, depth:-depth] = False
    if (alpha[border] > 0.5).any():
        border &= alpha > 0.5
    wanted, known = colour[border], terms[border]
    guess = np.median(wanted, axis=0)
    if (np.abs(wanted - guess).max(1) < 0.01).mean() > 0.5:
        return guess  # even light
    for _ in range(8):  # least absolute deviations, by reweighting: ink that runs over the border hardly counts
        weighted = known / np.maximum(np.linalg.norm(wanted - guess, axis=1, keepdims=True), 1e-3)
        solution = np.linalg.lstsq(weighted.T @ known, weighted.T @ wanted, rcond=1e-9)[0]
        guess = known @ solution
    return (terms @ solution).clip(0, 1)


def _without_specks(ink: np.ndarray) -> np.ndarray:
    """The ink without patches that are tiny beside the largest one: dust and noise."""
    factor = -(-max(ink.shape) // COARSE_SIDE)
    coarse = F.max_pool2d(torch.from_numpy(ink)[None, None], factor, ceil_mode=True)
    mass = F.avg_pool2d(torch.from_numpy(ink)[None, None], factor, ceil_mode=True).flatten()
    mask = (coarse > 0).float()
    patch = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask
    while not torch.equal(patch, grown := F.max_pool2d(patch, 3, stride=1, padding=1) * mask):
        patch = grown  # until each patch has one number
    sums = torch.zeros(mask.numel() + 1).index_add_(0, patch.flatten().long(), mass)
    kept = (sums[patch.long()] >= SPECK * sums.max()) & (patch > 0)
    kept = kept[0, 0].repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    return ink * kept[: ink.shape[0], : ink.shape[1]].numpy()
