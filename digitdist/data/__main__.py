"""The command ``python -m digitdist.data``: what a data set is.

python -m digitdist.data data.name=mnist --plot samples.png
"""

from __future__ import annotations

import io
from pathlib import Path

import torch

from digitdist.config import DataConfig, Parser, load_config, shown
from digitdist.data.datasets import ImageSet, Splits, spread
from digitdist.data.loading import SAMPLE, load_splits
from digitdist.data.transforms import displayable
from digitdist.distributed import make_expendable, run_command
from digitdist.errors import UserError
from digitdist.files import atomic_write

PLOTTED = 20  # classes in a picture of samples


def describe(config: DataConfig, splits: Splits) -> str:
    """Splits, counts, shapes, classes, mean and deviation, as lines of text."""
    classes = splits.info.classes
    lines = [f"{shown(splits.info.name)} in {config.root}: classes {', '.join(map(shown, classes))}"]
    for name, images in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if not len(images):
            continue
        seen = images.sample(spread(len(images), SAMPLE))
        pixels = seen.images.double() / 255
        counts = torch.bincount(seen.labels, minlength=len(classes)).tolist()
        lines.append(
            f"{name:10} {len(images):,} images {tuple(seen.images.shape[1:])}"
            f" {str(seen.images.dtype).removeprefix('torch.')},"
            f" mean {pixels.mean():.4f}, deviation {pixels.std(correction=0):.4f}"
        )
        among = "" if isinstance(images, ImageSet) else f" among {len(seen.labels):,} that were read"
        lines.append(f"{'':10} of each class{among}: {', '.join(map(str, counts))}")
    return "\n".join(lines)


def plot(splits: Splits, file: str) -> None:
    """Writes a picture of ten training images of each class, a row a class.

    Raises:
        UserError: `file` cannot be written.
    """
    from matplotlib.figure import Figure

    info, classes, seen = splits.info, splits.info.classes[:PLOTTED], splits.train.sample(spread(len(splits.train), SAMPLE))
    figure = Figure(figsize=(6.4, 0.64 * len(classes)), layout="constrained")
    axes = figure.subplots(len(classes), 10)
    for label, row in enumerate(axes):
        positions = (seen.labels == label).nonzero().flatten()[: len(row)]
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, image in zip(row, displayable(seen.images[positions]), strict=False):
            axis.imshow(image, cmap="gray_r" if info.image == "mnist" else "gray", vmin=0, vmax=255)
        row[0].set_ylabel(_drawable(classes[label]), rotation=0, ha="right", va="center")
    figure.suptitle(f"{_drawable(info.name)}: {len(splits.train):,} training images, ten of each class", fontsize=10)
    try:
        content = io.BytesIO()
        figure.savefig(content, dpi=120, format=Path(file).suffix[1:] or "png")
        atomic_write(Path(file), content.getvalue())
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {file}: {error}; give a file such as samples.png in a folder you can write to") from None


def _drawable(name: str) -> str:
    """A name, which may be a folder's and so any bytes, as text that matplotlib draws as it is."""
    return shown(name).replace("$", r"\$")


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
    if arguments.plot:
        make_expendable("stdout")  # since its product is a file
    config = load_config(arguments.config, arguments.overrides)
    splits = load_splits(config.data, config.seed)
    if arguments.plot:  # first, since whoever reads what is printed may stop
        plot(splits, arguments.plot)
    print(describe(config.data, splits), flush=True)
    if arguments.plot:
        print(f"{arguments.plot}: samples of each class", flush=True)


if __name__ == "__main__":
    run_command(main)
