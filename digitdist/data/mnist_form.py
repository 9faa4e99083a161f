"""The digit of a picture in the form of MNIST's own images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from digitdist.data.ink import count_side_by_side, extent, extract_ink, widened
from digitdist.errors import UserError

SIDE = 28
BOX = 20  # MNIST's digits fill a box of so many pixels
EDGE = 0.25  # ink at which the box of the digit ends; artefacts around the ink are weaker
BOXES = (19, 20)  # the longer side of the ink in each of MNIST's 70,000 images,
CENTRES = (13.4, 14.6)  # and where the centre of mass is on both axes
PEN_WIDTHS = (1.5, 5.0)  # thinnest and thickest mean stroke, in pixels of the box: about MNIST's own range


def mnist_form(image: Image.Image) -> Tensor:
    """The digit of an RGBA picture as MNIST has it: uint8 [28, 28], light ink on dark.

    It is scaled to fit a box of 20×20 pixels, its aspect ratio kept, with antialiasing, and put with its centre of mass at
    the centre of 28×28, as in Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-Based Learning Applied to Document
    Recognition, Proc. IEEE 86(11), 1998, section III.A. A pen far thinner or thicker than MNIST's is brought to its range. An
    image that is in this form already, light on dark or dark on light, keeps each value.

    Raises:
        UserError: there is no ink, or more than one digit.
    """
    kept = _kept(image)
    if kept is not None:
        return torch.from_numpy(kept)
    ink = _crop(extract_ink(image))
    if (count := count_side_by_side(ink)) > 1:
        raise UserError(f"it holds {count} digits side by side; give one digit a picture")
    ink = _crop(_adjust_pen(ink))
    scale = BOX / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    small = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    small = small / small.max()
    top = SIDE // 2 - np.average(np.arange(height), weights=small.sum(1))  # in all of MNIST it rounds to pixel 14
    left = SIDE // 2 - np.average(np.arange(width), weights=small.sum(0))
    row, column = min(max(round(top), 0), SIDE - height), min(max(round(left), 0), SIDE - width)
    form = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    form[row : row + height, column : column + width] = torch.from_numpy((255 * small).round().astype(np.uint8))
    return form


def _kept(image: Image.Image) -> np.ndarray | None:
    """The values of a picture that is in MNIST's form, uint8 [28, 28], light on dark; None for any other picture."""
    if image.size != (SIDE, SIDE):
        return None
    pixels = np.asarray(image)
    grey = pixels[..., 0]
    if (pixels[..., 3] != 255).any() or (pixels[..., 1:3] != grey[..., None]).any():
        return None
    values = 255 - grey if grey[0, 0] > 127 else grey
    rows, columns = values.sum(1, dtype=np.int64), values.sum(0, dtype=np.int64)
    sides = [np.ptp(np.flatnonzero(sums)) + 1 if sums.any() else 0 for sums in (rows, columns)]
    if max(sides) not in BOXES:
        return None
    centres = [sums @ np.arange(SIDE) / sums.sum() for sums in (rows, columns)]
    return values.copy() if all(CENTRES[0] <= centre < CENTRES[1] for centre in centres) else None


def _adjust_pen(ink: np.ndarray) -> np.ndarray:
    """The ink, padded, with strokes of a width in MNIST's range, grown or worn away at their edges."""
    unit = max(ink.shape) / BOX
    padded = np.pad(ink, max(1, round(PEN_WIDTHS[0] * unit)))
    # Measured at five pixels a unit at most, which averages out noise: it would count as edges.
    fine = F.avg_pool2d(torch.from_numpy(padded)[None], max(1, int(unit / 5)))[0].numpy()
    edges = np.abs(np.diff(fine, axis=0)).sum() + np.abs(np.diff(fine, axis=1)).sum()
    # An edge in all directions is π/4 of its steps along the axes.
    width = 2 * fine.sum() / (edges * np.pi / 4) * max(1, int(unit / 5)) / unit
    radius = round((float(np.clip(width, *PEN_WIDTHS)) - width) / 2 * unit)
    if not radius:
        return padded
    sign = 1 if radius > 0 else -1
    return sign * widened(sign * torch.from_numpy(padded), abs(radius)).numpy()


def _crop(ink: np.ndarray) -> np.ndarray:
    if not ink.any():
        raise UserError("it is blank: what ink there is, is too thin")
    return ink[extent(ink > min(EDGE, ink.max() / 2))]
