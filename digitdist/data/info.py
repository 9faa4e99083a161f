"""What belongs to a data set and travels with a run: class names, the shape of an image, mean and deviation of its pixels."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from digitdist.files import parse_json

DIGITS = tuple("0123456789")
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


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
    image: Literal["mnist", "resize"] = "mnist"

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
    def from_json(cls, text: str) -> DataSetInfo:
        """What `to_json` wrote.

        Raises:
            ValueError, TypeError: it is something else.
        """
        values = parse_json(text.encode())
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
        whole: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**whole)


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
