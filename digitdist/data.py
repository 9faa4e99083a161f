"""Data sets as uint8 tensors, the order in which a training goes through them, and each rank's share of its batches.

Position is the step alone: the permutation of an epoch depends on `(seed, epoch)`, a global batch is the next stretch of
it, and a rank's share is the next stretch of that; a focused order depends on the losses too. Nothing here needs a process
group.

    python -m digitdist.data data.name=mnist --plot samples.png
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import lzma
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from digitdist.checkpoint import weights_sha256
from digitdist.config import AugmentConfig, Config, DataConfig, Parser, TrainConfig, UserError, load
from digitdist.runtime import run_command

Batch = tuple[Tensor, Tensor, Tensor]  # images uint8 [n, 28, 28], labels int64 [n], indices int64 [n]


@dataclass(frozen=True)
class Spec:
    """What is known of a data set: torchvision's class for it, its classes, mean and deviation of a training pixel / 255."""

    torchvision_class: str
    mean: float
    std: float
    classes: tuple[str, ...] = tuple("0123456789")


SPECS = {
    "mnist": Spec("MNIST", 0.1307, 0.3081),
    "fashion_mnist": Spec(
        "FashionMNIST",
        0.2860,
        0.3530,
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "kmnist": Spec("KMNIST", 0.1918, 0.3483, ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
    "qmnist": Spec("QMNIST", 0.1307, 0.3081),
    "emnist_digits": Spec("EMNIST", 0.1722, 0.3309),
    "usps": Spec("USPS", 0.1380, 0.2580),
}

MNIST_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")} | {
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
}


class ImageSet(Dataset[Batch]):
    """Labelled images, all in memory: `images` uint8 [n, 28, 28], `labels` int64 [n], `indices` int64 [n].

    An index is an image's place in the split as it is published, so that it names one image for good.
    """

    def __init__(self, images: Tensor, labels: Tensor, indices: Tensor | None = None):
        self.images, self.labels = images, labels
        self.indices = torch.arange(len(images)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Batch:
        return self.images[place], self.labels[place], self.indices[place]

    def __getitems__(self, places: Tensor) -> Batch:
        """A whole batch at once; `places` is int64 [n], on the device of the images."""
        images, labels, indices = self.images, self.labels, self.indices
        return images.index_select(0, places), labels.index_select(0, places), indices.index_select(0, places)

    def subset(self, places: Tensor) -> ImageSet:
        return ImageSet(*self.__getitems__(places))

    def to(self, device: torch.device) -> ImageSet:
        """The same images resident on `device`: a batch is then fetched there, with no copy a step."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.indices.to(device))


@dataclass(frozen=True)
class Splits:
    """The training images, those of them held out for choosing, and the test images."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    def to(self, device: torch.device) -> Splits:
        return Splits(self.train.to(device), self.validation.to(device), self.test.to(device))

    def sha256(self) -> str:
        """Over all images, labels and indices: two hosts with the same one train on the same data."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return weights_sha256(
            {f"{name}.{field}": tensor for name, part in parts.items() for field, tensor in vars(part).items()}
        )


def load_splits(config: DataConfig, seed: int) -> Splits:
    """The configured data set; every process may call it at any time, without a process group.

    Raises:
        UserError: the data cannot be had, or `data.validation` leaves nothing to train on.
    """
    read = _read_mnist if config.name == "mnist" else _read_torchvision
    train, test = read(config, "train"), read(config, "test")
    if config.validation >= len(train):
        raise UserError(
            f"data.validation={config.validation} leaves no image to train on; {config.name} takes at most {len(train) - 1}"
        )
    order = permutation(len(train), seed, "validation")
    held_out, rest = order[: config.validation].sort().values, order[config.validation :].sort().values
    return Splits(train.subset(rest) if config.validation else train, train.subset(held_out), test)


def normalise(images: Tensor, spec: Spec) -> Tensor:
    """uint8 [n, 28, 28] to float32 [n, 1, 28, 28] of about zero mean and unit deviation, on the images' device."""
    return images.unsqueeze(1).float().sub_(255 * spec.mean).mul_(1 / (255 * spec.std))


def augment(images: Tensor, config: AugmentConfig, background: float) -> Tensor:
    """Each image of float32 [n, 1, 28, 28] shifted, rotated, scaled and sheared at random, drawn from torch's generator."""
    if not (config.shift or config.rotate or config.scale or config.shear) or not len(images):
        return images
    drawn = 2 * torch.rand(5, len(images), 1) - 1  # on the CPU everywhere
    angle, scale, shear, shift_x, shift_y = sent(drawn, images.device)
    angle, scale = torch.deg2rad(config.rotate * angle), 1 + config.scale * scale
    cos, sin, shear = angle.cos() / scale, angle.sin() / scale, config.shear * shear
    size = images.shape[-1]
    pixel = 2 / size  # in grid_sample's units, where an image reaches from -1 to 1
    along = (torch.arange(size, device=images.device) - (size - 1) / 2) * pixel
    # Where a pixel comes from, [[cos, -sin], [sin, cos]] @ [[1, shear], [0, 1]] @ (x, y) + shift, as two sums a pixel:
    # F.affine_grid's product of matrices is a third of the whole time.
    from_x, from_y = cos * along + config.shift * pixel * shift_x, sin * along + config.shift * pixel * shift_y
    grid = torch.empty(len(images), size, size, 2, device=images.device)
    torch.add(from_x[:, None], ((cos * shear - sin) * along)[..., None], out=grid[..., 0])
    torch.add(from_y[:, None], ((sin * shear + cos) * along)[..., None], out=grid[..., 1])
    return F.grid_sample(images - background, grid, align_corners=False).add_(background)


def key_of(*parts: object) -> int:
    """A 63-bit number that is a fixed function of `parts`: the seed of a generator that nothing else shares."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def permutation(count: int, *parts: object) -> Tensor:
    """A permutation of 0..count-1, int64 [count], a fixed function of `parts` alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(key_of("permutation", *parts)))


def cut(count: int, parts: int) -> list[int]:
    """Bounds of `parts` stretches of 0..count-1, as equal as can be, longer ones first: parts + 1 numbers."""
    quotient, longer = divmod(count, parts)
    return [i * quotient + min(i, longer) for i in range(parts + 1)]


@dataclass(frozen=True)
class Sharding:
    """How a global batch is cut: into `parts` parts, of which this rank runs the consecutive `mine`, one at a time.

    The parts of a batch are stretches of it, as equal as can be; the tail batch may leave some of them empty.
    """

    parts: int
    mine: range

    @classmethod
    def of(cls, parts: int, rank: int, world_size: int) -> Sharding:
        bounds = cut(parts, world_size)
        return cls(parts, range(bounds[rank], bounds[rank + 1]))

    def share(self, count: int) -> tuple[int, int]:
        """Where this rank's images begin and end in a global batch of `count`."""
        bounds = cut(count, self.parts)
        return bounds[self.mine.start], bounds[self.mine.stop]

    def slices(self, count: int) -> Iterator[tuple[int, slice]]:
        """Each part of this rank: its number, and where its images lie in the rank's share of a batch of `count`."""
        bounds = cut(count, self.parts)
        first = bounds[self.mine.start]
        for part in self.mine:
            yield part, slice(bounds[part] - first, bounds[part + 1] - first)


def focused(hardest: Tensor, size: int, *parts: object) -> Tensor:
    """A pass over `size` of all images, int64 [size], a fixed function of the arguments: three quarters of it are the first of
    `hardest`, int64 [count], one quarter is drawn from the others."""
    hard, others = hardest.split([3 * size // 4, len(hardest) - 3 * size // 4])
    drawn = permutation(len(others), *parts, "drawn")[: size - len(hard)]
    both = torch.cat([hard, others[sent(drawn, hardest.device)]])
    return both[sent(permutation(size, *parts), hardest.device)]


@dataclass(frozen=True)
class Order:
    """The order of a training: which images make up the global batch of each step, and which of them are a rank's."""

    count: int
    batch_size: int
    seed: int
    focus: int = 1

    @classmethod
    def of(cls, config: Config, images: ImageSet) -> Order:
        """The configured order of the training images."""
        return cls(len(images), config.data.batch_size, config.seed, config.data.focus)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.count // self.batch_size)

    def batch_count(self, step: int) -> int:
        """Images in the global batch of the step that follows `step`; the tail batch of an epoch is smaller."""
        return min(self.batch_size, self.count - step % self.steps_per_epoch * self.batch_size)

    def images_seen(self, step: int) -> int:
        """Images of the first `step` global batches."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.count + min(rest * self.batch_size, self.count)

    def total_steps(self, epochs: float) -> int:
        """Steps of `epochs` passes, a fraction of one rounded to whole steps, and one at least."""
        return max(1, round(epochs * self.steps_per_epoch))

    def last_step(self, config: TrainConfig) -> int:
        """The step after which a training ends: when its epochs are over, or before."""
        total = self.total_steps(config.epochs)
        return min(total, config.max_steps or total)

    def stretch(self, step: int) -> tuple[int, int]:
        """The steps, from the first to before the last, of the stretch in which the step after `step` lies: the first epoch is
        one, later ones are cut into `focus` of them."""
        epoch, number = divmod(step, self.steps_per_epoch)
        bounds = cut(self.steps_per_epoch, self.focus if epoch else 1)
        place = bisect.bisect_right(bounds, number)
        return step - number + bounds[place - 1], step - number + bounds[place]

    def batches(self, images: ImageSet, step: int, sharding: Sharding, hardest: Tensor | None = None) -> Iterator[Batch]:
        """This rank's share of each global batch, from the one after `step` to the end of its stretch, fetched whole.

        A stretch is a pass over all images, or, where `hardest` names their order by falling loss, a focused one.
        """
        start, stop = self.stretch(step)
        before = self.images_seen(start)
        if hardest is None:
            order = sent(permutation(self.count, self.seed, start // self.steps_per_epoch), images.images.device)
        else:
            order = focused(hardest, self.images_seen(stop) - before, self.seed, "focused", start)
        for number in range(step, stop):
            at = self.images_seen(number) - before
            first, last = sharding.share(self.batch_count(number))
            yield images.__getitems__(order[at + first : at + last])


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, made on the CPU, on `device`: to a GPU from pinned memory, so that the host does not wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _read_mnist(config: DataConfig, split: str) -> ImageSet:
    sums = {name: sha256 for sha256, name in map(str.split, _packaged("SHA256SUMS").decode().splitlines())}
    folder = Path(config.root) / "MNIST" / "raw"
    images, labels = (_unpacked(folder / name, sums[name]) for name in MNIST_FILES[split])
    pixels = torch.frombuffer(images, dtype=torch.uint8, offset=16).view(-1, 28, 28)
    return ImageSet(pixels, torch.frombuffer(labels, dtype=torch.uint8, offset=8).long())


def _unpacked(path: Path, sha256: str) -> bytearray:
    """The content of one MNIST file, which is put there, or put right, from the package where need be."""

    def right() -> bytearray | None:
        try:
            content = bytearray(path.read_bytes())
        except FileNotFoundError:
            return None
        return content if hashlib.sha256(content).hexdigest() == sha256 else None

    try:
        content = right()
        if content is not None:
            return content
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".digitdist.lock"):
            content = right()  # another process may have been here first
            if content is None:
                if path.exists():
                    print(f"{path} is not MNIST's file (its SHA-256 differs): replaced", flush=True)
                content = bytearray(lzma.decompress(_packaged(f"{path.name}.xz")))
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise UserError(f"the package's own {path.name}.xz is damaged; install digitdist again")
                temporary = path.with_name(f".{path.name}.tmp")
                temporary.write_bytes(content)
                os.replace(temporary, path)
            return content
    except OSError as error:
        raise UserError(f"data.root: {error.filename or path}: {error.strerror}; give a folder you can write to") from None


def _packaged(name: str) -> bytes:
    return (resources.files("digitdist") / "mnist" / name).read_bytes()


def _read_torchvision(config: DataConfig, split: str) -> ImageSet:
    """One of torchvision's data sets, downloaded by the first process of a host, brought to uint8 [n, 28, 28]."""
    import torchvision  # 2 s, so only here

    kind = getattr(torchvision.datasets, SPECS[config.name].torchvision_class)
    options: dict[str, Any] = {"train": split == "train"} | ({"split": "digits"} if config.name == "emnist_digits" else {})
    root = Path(config.root) / "USPS" if config.name == "usps" else Path(config.root)
    heard = io.StringIO()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".digitdist.lock"), contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            data = kind(str(root), download=True, **options)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, EOFError, zipfile.BadZipFile) as error:
        addresses, files, folder = _sources(kind, root)
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.name={config.name} cannot be had ({reason}); tried {', '.join(addresses)};"
            f" put {', '.join(files)} into {folder}"
        ) from None
    images, labels = torch.as_tensor(np.asarray(data.data)), torch.as_tensor(data.targets).long()
    if config.name == "qmnist":
        labels = labels[:, 0].contiguous()  # the class; the other columns tell who wrote it, and where
    if config.name == "emnist_digits":
        images = images.transpose(1, 2).contiguous()  # EMNIST is published transposed
    if config.name == "usps":
        # 16×16 there; MNIST's digits fill a 20×20 box in the middle of 28×28.
        images = F.pad(F.interpolate(images.unsqueeze(1).float(), size=(20, 20), mode="bilinear"), (4, 4, 4, 4))
        images = images.squeeze(1).round().to(torch.uint8)
    return ImageSet(images, labels)


def _sources(kind: Any, root: Path) -> tuple[list[str], list[str], Path]:
    """Addresses that torchvision tries for a data set, the files it wants, and the folder where it looks for them."""
    folder = root / kind.__name__ / "raw"
    match kind.__name__:
        case "USPS":
            return [part[0] for part in kind.split_list.values()], [part[1] for part in kind.split_list.values()], root
        case "EMNIST":
            return [kind.url], [kind.url.rpartition("/")[2]], folder
        case "QMNIST":
            addresses = [address for part in ("train", "test") for address, _ in kind.resources[part]]
            return addresses, [address.rpartition("/")[2] for address in addresses], folder
    files = [name for name, _ in kind.resources]
    return [mirror + name for mirror in kind.mirrors for name in files], files, folder


def _describe(config: DataConfig, splits: Splits) -> str:
    spec = SPECS[config.name]
    lines = [f"{config.name} in {config.root}: classes {', '.join(spec.classes)}"]
    for name, part in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if not len(part):
            continue
        pixels = part.images.double() / 255
        counts = torch.bincount(part.labels, minlength=len(spec.classes)).tolist()
        lines.append(
            f"{name:10} {len(part):,} images {tuple(part.images.shape[1:])} {str(part.images.dtype).removeprefix('torch.')},"
            f" mean {pixels.mean():.4f}, deviation {pixels.std(correction=0):.4f}"
        )
        lines.append(f"{'':10} of each class: {', '.join(map(str, counts))}")
    return "\n".join(lines)


def _plot(config: DataConfig, splits: Splits, file: str) -> None:
    """Ten training images of each class, a row a class."""
    from matplotlib.figure import Figure

    classes = SPECS[config.name].classes
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.subplots(len(classes), 10)
    for digit, row in enumerate(axes):
        places = (splits.train.labels == digit).nonzero().flatten()[: len(row)].tolist()
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, place in zip(row, places, strict=False):
            axis.imshow(splits.train.images[place], cmap="gray_r", vmin=0, vmax=255)
        row[0].set_ylabel(classes[digit], rotation=0, ha="right", va="center")
    figure.suptitle(f"{config.name}: {len(splits.train):,} training images, ten of each class", fontsize=10)
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {file}: {error}; give a file such as samples.png in a folder you can write to") from None


def main() -> None:
    parser = Parser(
        prog="python -m digitdist.data",
        description="What a data set is: splits, counts, shapes, classes, mean and deviation, and a picture.",
        epilog="example: python -m digitdist.data data.name=mnist data.validation=5000 --plot samples.png",
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="a YAML file; may be repeated")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, such as data.root=data")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of samples to FILE")
    arguments = parser.parse_args()
    config: Config = load(arguments.config, arguments.overrides)
    splits = load_splits(config.data, config.seed)
    print(_describe(config.data, splits))
    if arguments.plot:
        _plot(config.data, splits, arguments.plot)
        print(f"{arguments.plot}: samples of each class")


if __name__ == "__main__":
    run_command(main)
