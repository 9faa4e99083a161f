"""Digits and probabilities for image files, by the model of a run, on one process.

Any picture of one digit will do: of any size and colours, dark on light or light on dark, with or without transparency.
It is brought to the form of MNIST's own images (`mnist_form`); one that has that form already is left as it is. A file
that holds no digit is told in an ``error:`` line of its own and does not stop the others. Needs the run's folder alone.

    python -m digitdist.predict RUN IMAGE...
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from digitdist import models, runtime
from digitdist.config import Parser, UserError
from digitdist.data import SPECS, Spec, normalise
from digitdist.evaluate import load_weights, open_run, read_checkpoint
from digitdist.models import IMAGE_SHAPE, NUM_CLASSES

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF")  # not all of Pillow's: one of them starts a program
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff"}
MAX_BYTES = 2**28
SIDE = IMAGE_SHAPE[-1]
BOX = 20  # MNIST's digits fill a box of so many pixels
WORKING_SIDE = 512  # a larger picture is reduced to this first
COARSE_SIDE = 64  # and to this, where all that matters is what hangs together
LEAST_CONTRAST = 0.06  # ink less different from the paper, of 1, is none
FAINT = 0.12  # ink weaker than this part of the full ink is not part of the digit
EDGE = 0.25  # where the box of the digit ends; artefacts around the ink are weaker
SPECK = 0.04  # neither is what holds less than this part of the largest patch's ink
PEN_WIDTHS = (1.5, 5.0)  # thinnest and thickest mean stroke, in pixels of the box: about MNIST's own range


def open_image(content: bytes) -> Image.Image:
    """The decoded picture, upright, as RGBA, at most `WORKING_SIDE` pixels wide and high.

    Raises:
        UserError: it is no whole image, or too large to be decoded safely.
    """
    if not content or len(content) > MAX_BYTES:
        raise UserError("it is empty" if not content else f"it is larger than {MAX_BYTES >> 20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(io.BytesIO(content), formats=FORMATS)
            file.draft(None, (2 * WORKING_SIDE, 2 * WORKING_SIDE))  # a large JPEG is decoded smaller at once
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":  # more than 8 bits, which Pillow would cut off
                grey = np.asarray(image, dtype=np.float32)
                image = Image.fromarray((grey * (255 / (grey.max() or 1))).clip(0, 255).astype(np.uint8))
            if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
                image = image.convert("RGB")
            image = image.convert("RGBA")
            image.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX, reducing_gap=2.0)
            return image
    except Image.UnidentifiedImageError:
        raise UserError("it is no image of a known format") from None
    except Exception as error:  # decoders raise what they like on damaged data
        raise UserError(f"it cannot be decoded: {' '.join(str(error).split())}") from None


def mnist_form(image: Image.Image) -> Tensor:
    """The digit of an RGBA picture as MNIST has it: uint8 [28, 28], ink light on dark.

    It is scaled to fit a box of 20×20 pixels, its aspect ratio kept, with antialiasing, and put with its centre of mass at
    the centre of 28×28, as in Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-Based Learning Applied to Document
    Recognition, Proc. IEEE 86(11), 1998, section III.A. A pen far thinner or thicker than MNIST's is brought to its range.

    Raises:
        UserError: there is no ink.
    """
    ink = _crop(_ink(image))
    ink = _crop(_pen(ink))
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


def predict(model: nn.Module, images: Tensor, spec: Spec) -> Tensor:
    """Probability of each class, float32 [n, 10], for images uint8 [n, 28, 28]; the model must be in `eval` mode."""
    with torch.inference_mode():
        return model(normalise(images, spec)).float().softmax(1)


def _ink(image: Image.Image) -> np.ndarray:
    """How much ink there is, float32 [h, w] in 0..1: the distance from the paper's colour, which is that of the border."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    colour, alpha = pixels[..., :3], pixels[..., 3]
    if 2 * alpha.min() < alpha.max():
        sheet = _extent(2 * alpha > alpha.max())
        opaque = 2 * alpha[sheet] > alpha.max()
        if opaque.mean() > 0.75 and np.ptp(colour[sheet][opaque], axis=0).max() > 0.25:  # paper on a transparent ground
            colour, alpha = colour[sheet], alpha[sheet]
        else:  # ink on a transparent ground, whatever colour it has
            colour, alpha = alpha[..., None], np.ones_like(alpha)
    distance = alpha * np.linalg.norm(colour - _paper(colour, alpha), axis=2)
    strong = 2 * distance > distance.max()
    full = np.percentile(distance[strong], 90) if strong.any() else 0
    noise = np.median(distance[~strong])
    if full < max(LEAST_CONTRAST, 6 * noise):
        raise UserError("it is blank: there is no ink in it")
    distance[distance < max(FAINT * full, 4 * noise)] = 0
    return _without_specks((distance / full).clip(0, 1).astype(np.float32))


def _paper(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The paper's colour at each pixel of [h, w, c], in uneven light too: a quadratic through most of the border."""
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
    for _ in range(8):  # least absolute deviations, by reweighting: ink that runs over the border has no say
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


def _pen(ink: np.ndarray) -> np.ndarray:
    """The ink with strokes of a width in MNIST's range, grown or worn away at their edges; padded."""
    unit = max(ink.shape) / BOX
    padded = np.pad(ink, max(1, round(PEN_WIDTHS[0] * unit)))
    # Measured at five pixels a unit at most, where noise is averaged out: it would count as edges.
    fine = F.avg_pool2d(torch.from_numpy(padded)[None], max(1, int(unit / 5)))[0].numpy()
    edges = np.abs(np.diff(fine, axis=0)).sum() + np.abs(np.diff(fine, axis=1)).sum()
    # An edge in all directions is π/4 of its steps along the axes.
    width = 2 * fine.sum() / (edges * np.pi / 4) * max(1, int(unit / 5)) / unit
    radius = round((float(np.clip(width, *PEN_WIDTHS)) - width) / 2 * unit)
    if not radius:
        return padded
    sign = 1 if radius > 0 else -1
    grown, size = sign * torch.from_numpy(padded)[None], 2 * abs(radius) + 1
    for kernel, padding in (((size, 1), (abs(radius), 0)), ((1, size), (0, abs(radius)))):  # one way at a time: far faster
        grown = F.max_pool2d(grown, kernel, stride=1, padding=padding)
    return sign * grown[0].numpy()


def _extent(mask: np.ndarray) -> tuple[slice, slice]:
    """The smallest box around what is true."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _crop(ink: np.ndarray) -> np.ndarray:
    return ink[_extent(ink > EDGE)]


def _files(names: list[str]) -> Iterator[str]:
    """The names, but for a folder the image files in it, sorted; a folder without any stays what it is."""
    for name in names:
        there = sorted(os.listdir(name)) if os.path.isdir(name) and os.access(name, os.R_OK) else []
        files = [os.path.join(name, file) for file in there if Path(file).suffix.lower() in SUFFIXES and file[0] != "."]
        yield from files or [name]


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    if os.path.isdir(name):
        raise UserError(f"there is no image file in this folder that can be read ({', '.join(sorted(SUFFIXES))})")
    try:
        with open(name, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror}") from None


def main() -> None:
    parser = Parser(
        prog="python -m digitdist.predict",
        description="The digit in each image, with its probability, by the model of a run.",
        epilog="example: python -m digitdist.predict runs/quick digit.png photos --top 3",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name in run.dir")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, a folder, or - for stdin (or run.dir=DIR)")
    ks = range(1, NUM_CLASSES + 1)
    parser.add_argument("--top", type=int, choices=ks, default=1, metavar="K", help="list the K most probable (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last, best, or a step (default: last)")
    arguments = parser.parse_args()
    run_dir = [name for name in arguments.images if name.startswith("run.dir=")]
    names = [name for name in arguments.images if name not in run_dir]
    if not names:
        raise UserError("no IMAGE is given; give a file, a folder, or - for stdin")

    run, config = open_run(arguments.run, ["data.root=.", *run_dir])  # the data set need not be here
    with contextlib.redirect_stdout(sys.stderr):  # what they say is no prediction
        model = models.build(config.model, config.seed).eval()
        load_weights(model, read_checkpoint(run, arguments.checkpoint))
    spec = SPECS[config.data.name]
    mistakes = 0
    for file in _files(names):
        shown = file if file.isprintable() else repr(file)
        try:
            form = mnist_form(open_image(_read(file)))
        except UserError as error:
            mistakes += 1
            print(f"error: {shown}: {error}", file=sys.stderr, flush=True)
            continue
        probabilities, digits = (row.tolist() for row in predict(model, form[None], spec)[0].topk(arguments.top))
        if arguments.json:
            top = [{"digit": d, "probability": p} for d, p in zip(digits, probabilities, strict=True)]
            runtime.say(json.dumps({"file": file} | top[0] | {"top": top}))
        else:
            words = (f"{spec.classes[d]} {100 * p:.2f} %" for d, p in zip(digits, probabilities, strict=True))
            runtime.say(f"{shown}: {', '.join(words)}")
    if mistakes:
        sys.exit(runtime.EXIT_MISTAKE)


if __name__ == "__main__":
    runtime.run_command(main)
