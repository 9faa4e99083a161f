"""The plots of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from digitdist.data import DATA_SETS, AnySet, Batch, displayable, known_info, load_splits, read_mnist
from digitdist.errors import UserError
from digitdist.evaluate import Evaluation, calibration, wilson_interval
from digitdist.report.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_BINS = 15  # of the calibration
NUM_MISTAKES, IMAGES_A_ROW = 36, 6
MAX_LARGE = 14  # characters of an image's title in large letters
MAX_COUNTED = 25  # classes whose counts can be read in the confusion matrix
MAX_NAMED, MAX_PLOTTED = 100, 1000  # classes that it names, each at most some seconds of layout, and that it shows
# Okabe and Ito's colours, which colour-blind people can tell apart, without the yellow that is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
BLUE, VERMILION, GREEN = COLOURS[0], COLOURS[1], COLOURS[2]
GREY = "#555555"
MARKERS = "os^Dvp*"
STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a run's name is a $
}


@dataclass(frozen=True)
class Plot:
    """A figure with its alternative text and its caption; without a figure, the caption says why there is none."""

    title: str
    alt: str
    caption: str
    figure: Figure | None = None


def plot_curves(records: Sequence[Record], names: Sequence[str]) -> Plot:
    """Loss and accuracy over epochs, of one run with all its splits, or of several runs."""
    if not any(record.events for record in records):
        return Plot("Curves", "", "No metrics yet.")
    figure = new_figure(3.1 + 0.18 * len(records))
    loss, accuracy = figure.subplots(1, 2, sharex=True)
    for number, (record, name) in enumerate(zip(records, names, strict=True)):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
        several = len(records) > 1
        loss.plot(*record.points("train/loss", "epoch"), color=colour, lw=0.7, alpha=0.6, label="" if several else "training")
        if several:
            _plot_scores(loss, accuracy, record, "test", color=colour, marker=marker, label=name)
        else:
            _plot_scores(loss, accuracy, record, "validation", color=GREEN, marker=marker, label="held-out")
            _plot_scores(loss, accuracy, record, "test", color=VERMILION, marker=marker, label="test")
    loss.set(xlabel="epoch", ylabel="cross-entropy (nats, log scale)", yscale="log", title="Loss")
    format_log_axis(loss)
    accuracy.set(xlabel="epoch", ylabel="correct (%)", title="Accuracy")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    caption = "Lines: loss of single training batches before their update. Points: whole evaluations, with 95 % intervals."
    return Plot("Curves", f"Two line plots over epochs, loss and accuracy, of {', '.join(names)}.", caption, figure)


def plot_throughput(record: Record) -> Plot:
    """Images a second by step; where a run has several attempts, also the world size of each."""
    step, rate = record.points("train/images_per_second", "step")
    caption = "Training images a second, over all ranks, since the line logged before."
    if not len(step):
        return Plot("Throughput", "", "No throughput logged yet.")
    several = len(record.attempts) > 1
    figure = new_figure(3.6 if several else 2.4)
    panels = figure.subplots(1 + several, 1, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + several])[:, 0]
    panels[0].plot(step, rate, color=BLUE, marker="o" if len(step) < 50 else "", markersize=3)
    panels[0].set(ylabel="images/s", ylim=(0, 1.1 * rate.max()))
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    panels[-1].set_xlabel("step")
    if several:
        caption += " Dashed: restarts. Below: the world size of each attempt, from its first step to the last it reached."
        _plot_attempts(panels, record)
    return Plot("Throughput", "Line plot of images a second by step, restarts marked.", caption, figure)


def plot_confusion(record: Record) -> Plot:
    """How often each class was predicted as each other; only mistakes are coloured, which the diagonal would outshine."""
    if record.predictions is None:
        return Plot("Confusion", "", "No predictions yet.")
    if len(record.classes) > MAX_PLOTTED:
        return Plot("Confusion", "", f"No picture, since there are {len(record.classes):,} classes.")
    counts = record.predictions.confusion
    mistakes = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    figure = new_figure(5.6)
    axis = figure.subplots()
    axis.imshow(mistakes, cmap="Blues", vmin=0, vmax=max(1, 1.15 * mistakes.max()))
    for (row, column), count in np.ndenumerate(counts if len(counts) <= MAX_COUNTED else np.zeros((0, 0), np.int64)):
        dark = mistakes[row, column] > 0.6 * mistakes.max()
        colour = "white" if dark and row != column else "#222222" if count else "#bbbbbb"
        axis.text(column, row, f"{count}", ha="center", va="center", color=colour, weight="bold" if row == column else None)
    named = range(0, len(counts), -(-len(counts) // MAX_NAMED))
    names = [record.classes[number] for number in named]
    long = max(map(len, names)) > 3
    axis.set_xticks(named, names, rotation=45 if long else 0, ha="right" if long else "center")
    axis.set_yticks(named, names)
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.grid(False)
    caption = "Test images by true and predicted class. The darker, the more frequent a mistake; the diagonal is right."
    return Plot("Confusion", "Matrix of counts: true class by predicted class.", caption, figure)


def plot_mistakes(record: Record) -> Plot:
    """The images that were predicted wrong with the highest probability."""
    result = record.predictions
    if result is None:
        return Plot("Worst mistakes", "", "No predictions yet.")
    wrong = np.flatnonzero(result.label != result.prediction)
    worst = wrong[np.argsort(-result.probability[wrong], kind="stable")][:NUM_MISTAKES]
    if not len(worst):
        return Plot("Worst mistakes", "", "There are none: every test image is predicted right.")
    try:
        images = displayable(test_images(record, result, worst).images)
    except UserError as error:
        return Plot("Worst mistakes", "", f"No picture, since the test images are not available here: {error}.")
    labels = [[record.classes[column[row]] for column in (result.label, result.prediction)] for row in worst]
    titles = [f"{a} → {b}\n{result.probability[row]:.3f}" for row, (a, b) in zip(worst, labels, strict=True)]
    figure = draw_images(images, titles, record.info.image == "mnist")
    count = f"{len(worst)} of {len(wrong):,} mistakes" if len(worst) < len(wrong) else f"All {len(wrong)} mistakes"
    caption = f"{count}, the most confident first: label → prediction, and the probability that the network gave it."
    return Plot("Worst mistakes", "Test images that were predicted wrong with the highest probability.", caption, figure)


def plot_calibration(record: Record) -> Plot:
    """Reliability diagram, and how many images each of its bins has."""
    if record.predictions is None:
        return Plot("Calibration", "", "No predictions yet.")
    result = record.predictions
    bins = calibration(result.probability, result.label == result.prediction, NUM_BINS)
    left, width = np.arange(NUM_BINS) / NUM_BINS, 1 / NUM_BINS
    figure = new_figure(4.8)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
    top.bar(left, bins.accuracy, width, align="edge", color=BLUE, alpha=0.35, edgecolor=BLUE, label="share correct")
    top.plot([0, 1], [0, 1], color=GREY, ls="--", label="perfectly calibrated")
    top.plot(bins.probability, bins.accuracy, color=VERMILION, marker="o", ls="", markersize=4, clip_on=False)
    top.set(ylabel="share correct", ylim=(0, 1.02), xlim=(0, 1), title=f"ECE {bins.error:.4f}")
    figure.legend(loc="outside upper right", ncols=2)
    bars = below.bar(left, bins.count, width, align="edge", color=BLUE, alpha=0.35, edgecolor=BLUE)
    below.bar_label(bars, [f"{count:,}" if count else "" for count in bins.count], fontsize=7)
    below.set(xlabel="probability of the predicted class", ylabel="images (log)", yscale="log")
    below.set_ylim(0.7, 6 * bins.count.max())
    below.yaxis.set_major_formatter("{x:,.0f}")
    caption = (
        f"Expected calibration error (ECE) {bins.error:.4f}: the gap between share correct and mean probability, averaged over"
        f" {NUM_BINS} bins of equal width, weighted by their counts (Guo et al., On Calibration of Modern Neural Networks,"
        " ICML 2017). Dots are at a bin's mean probability."
    )
    return Plot("Calibration", "Reliability diagram: share correct by probability, with counts.", caption, figure)


def draw_images(images: np.ndarray, titles: Sequence[str], ink: bool) -> Figure:
    """Images with a title of two lines each, `IMAGES_A_ROW` a row: uint8 [n, h, w], or [n, h, w, 3] in colour; `ink`: they are
    light on dark, and shown dark on light."""
    num_rows, (height, width) = -(-len(images) // IMAGES_A_ROW), images.shape[1:3]
    head, margin = round(0.54 * height), round(0.29 * width)  # room for an image's title, and beside it
    cell_height, cell_width = height + head + 1, width + 2 * margin
    figure = new_figure(1.16 * num_rows)
    # One axis an image would take seconds to lay out.
    shape = (num_rows * cell_height, IMAGES_A_ROW * cell_width, *images.shape[3:])
    canvas = np.full(shape, 0 if ink else 255, np.uint8)
    axis = figure.subplots()
    for number, title in enumerate(titles):
        y, x = number // IMAGES_A_ROW * cell_height, number % IMAGES_A_ROW * cell_width
        canvas[y + head : y + head + height, x + margin : x + margin + width] = images[number]
        size = 9 if max(map(len, title.splitlines())) <= MAX_LARGE else 6.5
        axis.text(x + cell_width / 2, y + head - 1, title, ha="center", va="bottom", fontsize=size)
    axis.imshow(canvas, cmap="gray_r" if ink else "gray", vmin=0, vmax=255)
    axis.set_axis_off()
    return figure


def new_figure(height: float) -> Figure:
    """A figure of so many inches in height, and as wide as a page."""
    from matplotlib.figure import Figure

    return Figure(figsize=(7, height), layout="constrained")  # inches: about 700 pixels wide where it is shown


def format_log_axis(axis: Axes) -> None:
    """Plain numbers at 1, 2 and 5 times each power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _plot_scores(loss: Axes, accuracy: Axes, record: Record, split: str, label: str, **style: Any) -> None:
    """The points of one split's evaluations, if there are any."""
    epoch, value = record.points(f"{split}/loss", "epoch")
    if not len(epoch):
        return
    loss.plot(epoch, value, markersize=4, label=f" {label}", **style)  # matplotlib hides labels that begin with _
    counts = [(e["epoch"], e.get(f"{split}/correct", math.nan), e.get(f"{split}/total", math.nan)) for e in record.events]
    counts = [row for row in counts if 0 <= row[1] <= row[2] and 0 < row[2] < math.inf]
    if not counts:
        return
    epoch, correct, total = np.array(counts).T
    bounds = np.array([wilson_interval(int(c), int(t)) for c, t in zip(correct, total, strict=True)]).reshape(-1, 2).T
    errors = 100 * np.array([correct / total - bounds[0], bounds[1] - correct / total]).clip(0)
    accuracy.errorbar(epoch, 100 * correct / total, errors, markersize=4, capsize=2, **style)


def _plot_attempts(panels: Any, record: Record) -> None:
    """One artist for all attempts, of which a file may name thousands."""
    attempts = record.attempts
    first, size = [a["step"] for a in attempts], [a["world_size"] for a in attempts]
    last = [record.reached(number) for number in range(len(attempts))]
    panels[1].hlines(size, first, last, color=GREEN, lw=3)
    panels[1].plot([*first, *last], [*size, *size], color=GREEN, ls="", marker="|")
    for panel in panels:
        panel.vlines(first[1:], 0, 1, transform=panel.get_xaxis_transform(), color=GREY, ls="--", lw=1)
    ticks = sorted({*size})
    panels[1].set(ylabel="world size", ylim=(0, ticks[-1] + 1))
    if len(ticks) <= MAX_COUNTED:
        panels[1].set_yticks(ticks)


def test_images(record: Record, result: Evaluation, rows: np.ndarray) -> Batch:
    """The test images of some rows of a result.

    Raises:
        UserError: the data set is not available, or is another one here.
    """
    data = record.data
    if record.made_here:
        test: AnySet = load_splits(dataclasses.replace(data, validation=0), record.seed).test
    elif known_info(data) == DATA_SETS["mnist"]:
        test = read_mnist(None, "test")  # from the package, since where to look for data is not for the run to say
    else:
        raise UserError("they are read for a run alone that a training of yours is known to have made here")
    if result.index.max() < len(test):
        images = test.read(torch.from_numpy(result.index[rows]))
        if np.array_equal(images.labels.numpy(), result.label[rows]):
            return images
    raise UserError(f"the {record.info.name} in {data.root} is not what this run was tested on")
