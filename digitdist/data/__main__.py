"""The command ``python -m digitdist.data``: what a data set is.

python -m digitdist.data data.name=mnist --plot samples.png
"""

from __future__ import annotations

import torch

from digitdist.config import DataConfig, Parser, load_config
from digitdist.data.datasets import DATA_SETS, Splits
from digitdist.data.loading import load_splits
from digitdist.distributed import run_command
from digitdist.errors import UserError


def describe(config: DataConfig, splits: Splits) -> str:
    """Splits, counts, shapes, classes, mean and deviation, as lines of text."""
    classes = DATA_SETS[config.name].classes
    lines = [f"{config.name} in {config.root}: classes {', '.join(classes)}"]
    for name, images in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if not len(images):
            continue
        pixels = images.images.double() / 255
        counts = torch.bincount(images.labels, minlength=len(classes)).tolist()
        lines.append(
            f"{name:10} {len(images):,} images {tuple(images.images.shape[1:])}"
            f" {str(images.images.dtype).removeprefix('torch.')},"
            f" mean {pixels.mean():.4f}, deviation {pixels.std(correction=0):.4f}"
        )
        lines.append(f"{'':10} of each class: {', '.join(map(str, counts))}")
    return "\n".join(lines)


def plot(config: DataConfig, splits: Splits, file: str) -> None:
    """Writes a picture of ten training images of each class, a row a class.

    Raises:
        UserError: `file` cannot be written.
    """
    from matplotlib.figure import Figure

    classes = DATA_SETS[config.name].classes
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.subplots(len(classes), 10)
    for label, row in enumerate(axes):
        positions = (splits.train.labels == label).nonzero().flatten()[: len(row)].tolist()
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, position in zip(row, positions, strict=False):
            axis.imshow(splits.train.images[position], cmap="gray_r", vmin=0, vmax=255)
        row[0].set_ylabel(classes[label], rotation=0, ha="right", va="center")
    figure.suptitle(f"{config.name}: {len(splits.train):,} training images, ten of each class", fontsize=10)
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {file}: {error}; give a file such as samples.png in a folder you can write to") from None


def main() -> None:
    """The command."""
    parser = Parser(
        "python -m digitdist.data",
        "What a data set is: splits, counts, shapes, classes, mean and deviation, and a picture.",
        "data.name=mnist data.validation=5000 --plot samples.png",
    )
    parser.add_config()
    parser.add_argument("--plot", metavar="FILE", help="write a picture of samples to FILE")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    splits = load_splits(config.data, config.seed)
    print(describe(config.data, splits))
    if arguments.plot:
        plot(config.data, splits, arguments.plot)
        print(f"{arguments.plot}: samples of each class")


if __name__ == "__main__":
    run_command(main)
