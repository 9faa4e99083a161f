"""Decoding pictures that anybody may have made, safely."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from digitdist.errors import UserError, in_one_line

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF")  # not all of Pillow's: one of those starts a program
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff"}
MAX_BYTES = 2**28
WORKING_SIDE = 512  # a larger picture is reduced to this first


def list_pictures(names: list[str]) -> Iterator[str]:
    """The names, each folder replaced by the image files in it, sorted; a folder without any stays as it is."""
    for name in names:
        files = sorted(os.listdir(name)) if os.path.isdir(name) and os.access(name, os.R_OK) else []
        pictures = [os.path.join(name, file) for file in files if Path(file).suffix.lower() in SUFFIXES and file[0] != "."]
        # What nobody has named is not waited for, as a FIFO would be; a link to nothing is an error of its own.
        yield from [file for file in pictures if os.path.isfile(file) or not os.path.exists(file)] or [name]


def read_picture(name: str) -> bytes:
    """The content of a file, or of stdin for ``-``.

    Raises:
        UserError: it cannot be read.
    """
    if name == "-":
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    if os.path.isdir(name):
        raise UserError(f"there is no image file in this folder that can be read ({', '.join(sorted(SUFFIXES))})")
    try:
        with open(name, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror}") from None


def open_picture(content: bytes) -> Image.Image:
    """The decoded picture, upright, as RGBA, at most `WORKING_SIDE` pixels wide and high.

    Raises:
        UserError: it is not a complete image, or too large to be decoded safely.
    """
    if not content or len(content) > MAX_BYTES:
        raise UserError("it is empty" if not content else f"it is larger than {MAX_BYTES >> 20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(io.BytesIO(content), formats=FORMATS)
            file.draft(None, (2 * WORKING_SIDE, 2 * WORKING_SIDE))  # a large JPEG is decoded smaller at once
            return upright_picture(file)
    except Image.UnidentifiedImageError:
        raise UserError("it is not an image of a known format") from None
    except Exception as error:  # decoders raise anything on damaged data
        raise UserError(f"it cannot be decoded: {in_one_line(error)}") from None


def upright_picture(image: Image.Image) -> Image.Image:
    """A picture of any mode, upright, as RGBA, at most `WORKING_SIDE` pixels wide and high."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # more than 8 bits, which Pillow would cut off
        image = _as_grey(np.asarray(image, dtype=np.float32))
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        image = image.convert("RGB")
    image = image.convert("RGBA")
    image.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    return image


def _as_grey(grey: np.ndarray) -> Image.Image:
    """A picture of more than 8 bits, float32 [h, w], with its highest finite value as white; what is no number is black."""
    highest = grey.max(initial=0, where=np.isfinite(grey))
    grey = np.nan_to_num(grey, nan=0, posinf=highest, neginf=0)
    return Image.fromarray((grey * (255 / (highest if highest > 1e-30 else 1))).clip(0, 255).astype(np.uint8))
