"""A user's own map-style data set, in torchvision's convention."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from digitdist.config import DataConfig, import_target
from digitdist.data.forms import to_image
from digitdist.data.randomness import derive_seed, seed_generators
from digitdist.errors import UserError, in_one_line


class UserItems:
    """Reads items of a user's data set; what it draws while it reads one follows from (seed, split, epoch, index).

    A worker process makes its own data set in the same way, since not every one can be pickled.
    """

    def __init__(self, data_set: Any, config: DataConfig, seed: int, split: str):
        self.data_set, self.config, self.seed, self.split = data_set, config, seed, split

    def __reduce__(self) -> tuple[Any, ...]:
        return open_user_set, (self.config, self.seed, self.split)

    def __len__(self) -> int:
        return len(self.data_set)

    def __call__(self, index: int, epoch: int) -> tuple[Tensor, int]:
        """The image, uint8 [h, w] or [3, h, w], and the label at `index`.

        Raises:
            ValueError: it is no image with a label.
        """
        seed_generators(derive_seed("item", self.seed, self.split, epoch, index), torch.device("cpu"))
        item = self.data_set[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(f"an item that is a {type(item).__name__} is not allowed; give (image, label)")
        return to_image(item[0]), int(item[1])


def open_user_set(config: DataConfig, seed: int, split: str) -> UserItems:
    """The ``train`` or ``test`` split of the class that `data.target` names.

    Its constructor gets ``train=True/False`` or ``split="train"/"test"``, whichever it takes, ``root`` if it takes that, and
    `data.args`; what it draws follows from the seed.

    Raises:
        UserError: the class cannot be imported or made, or is not a map-style data set with items in it.
    """
    kind = import_target("data.target", str(config.target))
    try:
        parameters: Any = inspect.signature(kind).parameters
    except (TypeError, ValueError):  # not every callable tells
        parameters = {}
    options: dict[str, Any] = {"root": config.root} if "root" in parameters else {}
    if "train" in parameters or "split" in parameters:
        options |= {"train": split == "train"} if "train" in parameters else {"split": split}
    else:
        raise UserError(f"data.target={config.target} takes neither train=True/False nor split='train'/'test'; add one of them")
    try:
        seed_generators(derive_seed("data set", seed, split), torch.device("cpu"))
        items = UserItems(kind(**options | config.args), config, seed, split)
        count = len(items)
    except Exception as error:  # a user's class may raise anything
        raise UserError(
            f"data.target={config.target} with data.args={dict(config.args)} does not work: {in_one_line(error)}"
        ) from error
    if not count:
        raise UserError(f"data.target={config.target} has no {split} images")
    return items
