"""What the paper of a picture looks like at each pixel, under the ink too."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

REACH = 0.2  # ink is narrower than this part of the picture's longer side, a shadow is wider


def paper_from_border(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
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


def paper_nearby(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Colours of a picture, smoothed, and of its paper, float32 [h, w, 3] in 0..1 both, in light with shadows of any edge.

    What is narrower than `REACH` and unlike its surroundings is ink, which is either darker than the paper or lighter.
    """
    smooth = np.asarray(image.convert("RGB").filter(ImageFilter.MedianFilter(3)))
    reach = 2 * round(REACH * max(smooth.shape) / 2)
    closed, opened = close(smooth, reach), 255 - close(255 - smooth, reach)
    coarse = image.convert("RGB")
    coarse.thumbnail((48, 48), Image.Resampling.BOX)
    # Ink is the lesser part of a window half as wide as the picture, so the median there is about the paper's.
    median = coarse.filter(ImageFilter.MedianFilter(25)).resize(image.size, Image.Resampling.BILINEAR)
    usual, colour = np.asarray(median).astype(np.int16), smooth.astype(np.int16)
    darker = np.minimum(closed - colour, usual - colour).clip(0).sum()
    lighter = np.minimum(colour - opened, colour - usual).clip(0).sum()
    return smooth.astype(np.float32) / 255, (closed if darker >= lighter else opened).astype(np.float32) / 255


def close(values: np.ndarray, reach: int) -> np.ndarray:
    """The grey closing of uint8 [h, w, c] with an octagon `reach` wide: what is dark and narrower gets its surroundings' value.

    Edges of what is wider, such as a shadow, stay where they are, and so does what comes in from beyond the picture.
    """
    height, width = values.shape[:2]
    padded = np.pad(values, ((reach, reach), (reach, reach), (0, 0)))
    return (255 - _spread(255 - _spread(padded, reach), reach))[reach : reach + height, reach : reach + width]


def _spread(values: np.ndarray, reach: int) -> np.ndarray:
    """The largest of the values around each pixel, in an octagon `reach` (even) wide: four lines, each by doubling."""
    slanted = round(0.293 * reach)
    straight = reach - 2 * slanted
    for down, right, length in ((1, 0, straight), (0, 1, straight), (1, 1, slanted), (1, -1, slanted)):
        done = 0
        while done < length:
            step = min(done + 1, length - done)
            values = np.maximum(values, np.roll(values, (step * down, step * right), (0, 1)))
            done += step
    return np.roll(values, (-reach // 2, -straight // 2), (0, 1))
