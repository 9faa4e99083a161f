"""A picture from anywhere in the form of a data set's images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from digitdist.data.info import DataSetInfo
from digitdist.data.mnist_form import mnist_form


def picture_form(picture: Image.Image, info: DataSetInfo) -> Tensor:
    """An RGBA picture as an image of the data set: uint8 [h, w], or [3, h, w] in colour.

    With ``info.image`` ``mnist`` the digit is cut out, scaled and centred; with ``resize`` the whole picture, on white where it
    is transparent, is scaled with antialiasing.

    Raises:
        UserError: there is no digit in it that could be cut out.
    """
    if info.image == "mnist":
        return mnist_form(picture)
    sheet = Image.new("RGBA", picture.size, "white")
    sheet.alpha_composite(picture)
    mode = "RGB" if info.channels > 1 else "L"
    small = sheet.convert(mode).resize((info.width, info.height), Image.Resampling.BILINEAR)
    return to_image(small)


def to_image(image: object) -> Tensor:
    """An image of a data set in torchvision's convention as uint8 [h, w], or [3, h, w] in colour.

    `image` is a PIL image of 8 bits, an array [h, w] or [h, w, c], or a tensor [h, w] or [c, h, w]; its values are whole
    numbers in 0..255, or floating-point numbers in 0..1.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(image, Image.Image):
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
            raise ValueError(f"a PIL image of mode {image.mode} is not allowed; convert it to L or RGB")
        image = np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    pixels = torch.as_tensor(image) if isinstance(image, np.ndarray | Tensor) else None
    if pixels is None or not 2 <= pixels.ndim <= 3:
        what = type(image).__name__ if pixels is None else f"of shape {tuple(pixels.shape)}"
        raise ValueError(f"an image that is {what} is not allowed; give a PIL image, [h, w], [c, h, w] or [h, w, c]")
    if pixels.ndim == 3:
        channels_last = pixels.shape[2] in (1, 3) and (isinstance(image, np.ndarray) or pixels.shape[0] not in (1, 3))
        pixels = pixels.permute(2, 0, 1) if channels_last else pixels
        if pixels.shape[0] not in (1, 3):
            raise ValueError(f"an image of shape {tuple(pixels.shape)} is not allowed; it takes 1 or 3 channels")
        pixels = pixels[0] if len(pixels) == 1 else pixels
    return _as_bytes(pixels).contiguous()


def _as_bytes(pixels: Tensor) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels
    highest = 1.0 if pixels.is_floating_point() or pixels.dtype == torch.bool else 255
    if pixels.is_complex() or not bool(((pixels >= 0) & (pixels <= highest)).all()):  # NaN is neither
        raise ValueError(
            f"pixels of {str(pixels.dtype).removeprefix('torch.')} outside 0..{highest:g} are not allowed; give bytes, or"
            " numbers in 0..1 that are not normalised, which happens here"
        )
    return (pixels * (255 / highest)).round().to(torch.uint8) if highest == 1 else pixels.to(torch.uint8)
