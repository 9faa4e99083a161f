"""Separating the ink of a picture from its paper."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from digitdist.data.paper import paper_from_border, paper_nearby
from digitdist.errors import UserError

COARSE_SIDE = 64  # the resolution at which connected patches are found
LEAST_CONTRAST = 0.06  # ink that differs from the paper by less, of 1, is none
PHOTOGRAPH = 64  # a picture with smaller sides is none: it shows too little to tell ink from shadows
# Light is uneven where paper is between these fractions of full ink away from the border's (ink itself is further, or paper
# appears lighter than that while ink is darker), in an area wider than the edges of strokes, twice this part of the picture's
# side, and so large a part of the picture.
SHADOW = (0.2, 0.85, 0.015, 0.015)
DARKEST = 0.08  # paper is taken to be at least so bright where ink is compared with it, or noise would be ink
FAINT = 0.12  # ink weaker than this fraction of the full ink is not part of the digit,
BODY = (0.35, 0.02)  # nor ink weaker than this that lies further, in parts of the picture's side, from where it is stronger
SPECK = 0.04  # neither is a patch with less than this fraction of the largest patch's ink
RIM = 0.1  # neither are patches at the picture's rim, where one inside has more than this fraction of the largest's ink
SPOT, SPOTS_A_DIGIT = (
    0.04,
    3,
)  # ink of less than this part of the picture's side may be a spot, beside ink so many times as large
AS_TALL = 0.65  # what stands beside a digit and has this fraction of its height is another digit


def extract_ink(image: Image.Image) -> np.ndarray:
    """How much ink there is at each pixel of an RGBA picture, float32 [h, w] in 0..1: the distance from the paper's colour,
    which is that of the border, or in uneven light that of the surroundings.

    Raises:
        UserError: there is no ink.
    """
    distance = _distance_from_paper(image)
    ink, strong = _strongest_ink(distance)
    if _side(ink > 0) >= SPOT * max(ink.shape) and (ink > BODY[0]).any():
        return ink
    try:  # a dark speck beside, or on, a faint digit
        weaker, _ = _strongest_ink(np.where(widened(torch.from_numpy(strong).float(), 2).numpy() > 0, 0, distance))
    except UserError:
        weaker = ink / ink.max()
    return weaker if _side(weaker > 0) > SPOTS_A_DIGIT * _side(strong) or not (ink > BODY[0]).any() else ink


def _strongest_ink(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ink, float32 [h, w] in 0..1, by the distance from the paper, and where it is strong, bool [h, w], specks too.

    Raises:
        UserError: there is no ink.
    """
    full = _full(distance)
    weak = distance[2 * distance <= distance.max()]
    noise = np.median(weak) if weak.size else 0
    if full < max(LEAST_CONTRAST, 6 * noise):
        raise UserError("it is blank: there is no ink in it")
    distance = np.where(distance < max(FAINT * full, 4 * noise), 0, distance)
    reach = max(2, round(BODY[1] * max(distance.shape)))
    strong = distance > BODY[0] * full
    body = widened(torch.from_numpy(strong).float(), reach).numpy()
    return _without_specks((distance * body / full).clip(0, 1).astype(np.float32)), strong


def _side(mask: np.ndarray) -> int:
    """The longer side of the smallest box around what is true in bool [h, w]."""
    return max(part.stop - part.start for part in extent(mask)) if mask.any() else 0


def _distance_from_paper(image: Image.Image) -> np.ndarray:
    """How far each pixel's colour is from the paper's there, [h, w]; in uneven light as a part of the paper's brightness."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    colour, alpha = _without_transparency(pixels[..., :3], pixels[..., 3])
    paper = paper_from_border(colour, alpha)
    distance = alpha * np.linalg.norm(colour - paper, axis=2)
    if max(image.size) < PHOTOGRAPH or pixels[..., 3].min() < 1:
        return distance
    smooth, nearby = paper_nearby(image)
    changed = np.linalg.norm(nearby - paper, axis=2)
    least, most = SHADOW[0] * _full(distance), SHADOW[1] * _full(distance)
    against = (smooth - nearby).sum() * (nearby - paper).sum(2) < 0  # ink is on one side of the paper, this on the other
    shaded = (changed > least) & (distance > least) & ((distance < most) | against)
    reach = round(SHADOW[2] * max(image.size))
    if 1 - widened(torch.from_numpy(~shaded).float(), reach).mean() < SHADOW[3]:
        return distance
    return np.linalg.norm(1 - smooth / np.maximum(nearby, DARKEST), axis=2)


def _full(distance: np.ndarray) -> float:
    """The distance from the paper of full ink: most of what is at least half as far as the farthest."""
    strong = 2 * distance > distance.max()
    return float(np.percentile(distance[strong], 90)) if strong.any() else 0.0


def widened(values: Tensor, reach: int) -> Tensor:
    """At each pixel of float32 [h, w] the largest value up to `reach` pixels away on either axis."""
    for size, padding in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):  # one axis at a time: far faster
        values = F.max_pool2d(values[None], size, stride=1, padding=padding)[0]
    return values


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


def count_side_by_side(ink: np.ndarray) -> int:
    """How many digits stand side by side in ink [h, w] that fills it: tall patches with free columns between them.

    Strokes of one digit lie above each other, are close together, or are far less tall than the digit.
    """
    patch = _patches(ink)[0]
    groups: list[list[int]] = []  # right end, top and bottom of patches that share columns
    for rows, columns in sorted(
        (extent(patch == number) for number in np.unique(patch[patch > 0])), key=lambda box: box[1].start
    ):
        if not groups or columns.start >= groups[-1][0]:
            groups.append([columns.stop, rows.start, rows.stop])
        right, top, bottom = groups[-1]
        groups[-1] = [max(right, columns.stop), min(top, rows.start), max(bottom, rows.stop)]
    heights = [bottom - top for _, top, bottom in groups]
    return sum(height >= AS_TALL * max(heights) for height in heights)


def _patches(ink: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Numbers of the connected patches of ink, int64 [H, W], 0 where there is none, the ink there, float32 [H, W], and by what
    factor H and W are less than the ink's h and w."""
    factor = -(-max(ink.shape) // COARSE_SIDE)
    fine = torch.from_numpy(ink)[None, None]
    mask = (F.max_pool2d(fine, factor, ceil_mode=True) > 0).float()
    patch = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask
    while not torch.equal(patch, grown := F.max_pool2d(patch, 3, stride=1, padding=1) * mask):
        patch = grown  # until each patch has one number
    return patch[0, 0].long().numpy(), F.avg_pool2d(fine, factor, ceil_mode=True)[0, 0].numpy(), factor


def _without_specks(ink: np.ndarray) -> np.ndarray:
    """The ink without patches that are tiny beside the largest one, dust and noise, and without what comes in from the rim."""
    patch, mass, factor = _patches(ink)
    sums = np.bincount(patch.flat, mass.flat)
    sums[0] = 0
    inner = sums.copy()
    inner[np.concatenate([patch[0], patch[-1], patch[:, 0], patch[:, -1]])] = 0
    if inner.max() > RIM * sums.max():
        sums = inner
    kept = (sums >= SPECK * sums.max())[patch] & (patch > 0)
    kept = kept.repeat(factor, 0).repeat(factor, 1)
    return ink * kept[: ink.shape[0], : ink.shape[1]]
