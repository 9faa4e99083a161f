"""What belongs to a data set and travels with a run: class names, the shape of an image, mean and deviation of its pixels."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from digitdist.files import parse_json

DIGITS = tuple("0123456789")
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ImageForm = Literal["mnist", "resize"]  # how a picture is brought to the form of a data set
MAX_CLASSES, MAX_SIDE, MAX_LENGTH = 10_000, 10_000, 1000  # that a file may name; a name's length


@dataclass(frozen=True)
class DataSetInfo:
    """A data set's name, class names, height and width of an image, and mean and deviation of a training pixel / 255 in each
    channel.

    `image` says how a picture from elsewhere is brought to this form: ``mnist`` (a digit cut out, scaled and centred) or
    ``resize``.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = DIGITS
    height: int = 28
    width: int = 28
    image: ImageForm = "mnist"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The shape of a raw image: height and width, with the channels before them where there are several."""
        return self.image_shape if self.channels > 1 else self.image_shape[1:]

    @property
    def image_size(self) -> int | tuple[int, int]:
        """The side of a square image, else height and width."""
        return self.height if self.height == self.width else (self.height, self.width)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> DataSetInfo:
        """What `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in parse_json(text).items()}
            info = cls(**values)
            info._check()
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"it is not the form of a data set: {error}") from None
        return info

    def _check(self) -> None:
        """Refuses what no data set has, as a file that anybody may have written can hold anything.

        Raises:
            ValueError, TypeError: naming what.
        """
        texts = isinstance(self.name, str) and isinstance(self.classes, tuple) and all(isinstance(c, str) for c in self.classes)
        if not texts or not 2 <= len(self.classes) <= MAX_CLASSES or max(map(len, (self.name, *self.classes))) > MAX_LENGTH:
            raise ValueError(f"it takes a name, and 2 to {MAX_CLASSES:,} classes, as text of at most {MAX_LENGTH:,} characters")
        sides = self.height, self.width
        if not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
            raise ValueError(f"it takes height and width of 1 to {MAX_SIDE:,}")
        if len(self.mean) != len(self.std) or self.channels not in (1, 3):
            raise ValueError("it takes a mean and a deviation for 1 or 3 channels")
        if not all(math.isfinite(value) for value in self.mean + self.std) or min(self.std) <= 0:
            raise ValueError("it takes finite means, and deviations above 0")
        if self.image not in get_args(ImageForm):
            raise ValueError(f"it takes one of {', '.join(get_args(ImageForm))} as image")


DATA_SETS = {
    info.name: info
    for info in (
        DataSetInfo("mnist", (0.1307,), (0.3081,)),
        DataSetInfo("fashion_mnist", (0.2860,), (0.3530,), FASHION),
        DataSetInfo("kmnist", (0.1918,), (0.3483,), KUZUSHIJI),
        DataSetInfo("qmnist", (0.1307,), (0.3081,)),
        DataSetInfo("emnist_digits", (0.1722,), (0.3309,)),
        DataSetInfo("usps", (0.1380,), (0.2580,)),
        DataSetInfo("svhn", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), DIGITS, 32, 32, "resize"),
        DataSetInfo("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), CIFAR, 32, 32, "resize"),
    )
}
