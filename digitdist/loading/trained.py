"""A trained model, and what it makes of images in any of the forms in which a program may have them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from digitdist.config import shown
from digitdist.data import DataSetInfo, open_picture, picture_form, read_picture, upright_picture
from digitdist.errors import UserError, in_one_line
from digitdist.predict import predict

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image"
Images: TypeAlias = "np.ndarray | Tensor | Picture | Iterable[np.ndarray | Tensor | Picture]"
CHUNK = 125  # images computed at once, as in an evaluation by default


class TrainedModel:
    """A network with its weights, on the CPU, and all that it needs to tell what is in a picture.

    `classes`: the names of its classes, by number. `card`: the text of its model card, None where it has none, as a run has.
    `info`: the form of its images. It computes in `precision`, that of its training: fp32 or bf16.
    """

    def __init__(self, network: nn.Module, info: DataSetInfo, precision: str = "fp32", card: str | None = None):
        self.network, self.info, self.precision, self.card = network.eval(), info, precision, card

    @property
    def classes(self) -> tuple[str, ...]:
        return self.info.classes

    def predict(self, images: Images) -> np.ndarray:
        """The number of the most probable class of each image, int64 [n]; `images` are as `probabilities` takes them.

        Raises:
            UserError: see `probabilities`.
        """
        return self.probabilities(images).argmax(1)

    def probabilities(self, images: Images) -> np.ndarray:
        """The probability of each class for each image: float32 [n, classes].

        `images`: one, or any number, of

        * file names and PIL images of any size and colours, which are brought to the form of the model's images as the command
          ``predict`` does;
        * images in that form already, arrays or tensors uint8 [h, w], in colour [3, h, w], or [n, …] of them at once.

        Raises:
            UserError: a file or picture cannot be read, or holds no digit, or an array is of another form.
        """
        raw, network, info = self._raw_images(images), self.network, self.info
        found = [predict(network, chunk, info, self.precision) for chunk in raw.split(CHUNK) if len(chunk)]
        return torch.cat([torch.empty(0, info.num_classes), *found]).numpy()

    def _raw_images(self, images: Images) -> Tensor:
        """uint8 [n, h, w], or [n, 3, h, w] in colour."""
        if isinstance(images, np.ndarray | Tensor):
            return self._checked(images)
        items: list[object] = [images]
        if isinstance(images, Iterable) and not isinstance(images, str | bytes | Mapping | io.IOBase):
            items = [*images]
        parts = [self._checked(item) if isinstance(item, np.ndarray | Tensor) else self._form(item)[None] for item in items]
        return torch.cat([torch.empty(0, *self.info.raw_shape, dtype=torch.uint8), *parts])

    def _checked(self, images: np.ndarray | Tensor) -> Tensor:
        """One image, or many, which are in the form of the model's already."""
        wanted, shape = self.info.raw_shape, tuple(images.shape)
        if str(images.dtype).removeprefix("torch.") != "uint8" or wanted not in (shape, shape[1:]):
            sizes = ", ".join(map(str, wanted))
            raise UserError(
                f"images of {images.dtype} and shape {shape} are not allowed; give uint8 [n, {sizes}] or [{sizes}], PIL images"
                " or file names"
            )
        tensor = torch.from_numpy(np.array(images, order="C")) if isinstance(images, np.ndarray) else images.cpu()
        return tensor[None] if shape == wanted else tensor

    def _form(self, picture: object) -> Tensor:
        """A picture in the form of the model's images."""
        if not isinstance(picture, str | os.PathLike | Image.Image):
            kind = type(picture).__name__
            raise UserError(
                f"an image of type {kind} is not allowed; give a uint8 array, a PIL image, a file's name, or a list of these"
            )
        name = "a PIL image" if isinstance(picture, Image.Image) else shown(os.fspath(picture))
        if isinstance(picture, Image.Image) and 0 in picture.size:
            width, height = picture.size
            raise UserError(f"{name} of {width}×{height} pixels is not allowed, since it is empty; give one with pixels")
        try:
            decoded = (
                upright_picture(picture) if isinstance(picture, Image.Image) else open_picture(read_picture(os.fspath(picture)))
            )
            return picture_form(decoded, self.info)
        except Exception as error:  # a picture may hold anything
            raise UserError(f"{name}: {in_one_line(error)}") from None
