"""The plots of a study."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from digitdist.data import displayable
from digitdist.errors import UserError
from digitdist.evaluate import Evaluation, mean_interval
from digitdist.report.plots import (
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    Plot,
    draw_images,
    format_log_axis,
    new_figure,
    test_images,
)
from digitdist.report.record import Record
from digitdist.report.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_IMAGES, MAX_SAID = 36, 2  # that many seeds get wrong, and the classes that are named of each
TITLE = "Images that most seeds get wrong"


def plot_seeds(study: Study) -> Plot:
    """The accuracy of each run, and their mean with its interval, on test and held-out images."""
    rows = {"test": (study.accuracies, VERMILION), "held-out": (study.held_out, GREEN)}
    shown = {name: row for name, row in rows.items() if row[0]}
    figure = new_figure(0.9 + 0.7 * len(shown))
    axis = figure.subplots()
    for number, (values, colour) in enumerate(shown.values()):
        mean, percent = mean_interval(values), 100 * np.array(values)
        axis.plot(percent, number + np.array(_spread(percent)), "o", color=colour, alpha=0.6, markersize=5, markeredgewidth=0)
        if mean.count > 1:
            axis.plot([100 * mean.low, 100 * mean.high], [number, number], color=GREY, lw=6, alpha=0.5, solid_capstyle="butt")
        axis.plot([100 * mean.mean] * 2, [number - 0.3, number + 0.3], color="black", lw=1.5)
    axis.set_yticks(range(len(shown)), list(shown))
    axis.set(xlabel="correct (%)", ylim=(len(shown) - 0.5, -0.5))
    axis.grid(axis="y", visible=False)
    caption = "Dots: one run each. Line: their mean. Grey: the 95 % interval of that mean (Student's t); runs spread wider."
    return Plot("Seeds", "Strip plot of the accuracy of each run with mean and interval.", caption, figure)


def plot_bands(study: Study) -> Plot:
    """Loss and accuracy over epochs: mean of the runs, and a band from the least to the greatest."""
    if not any(record.events for record in study.records):
        return Plot("Curves", "", "No metrics yet.")
    figure = new_figure(3.3)
    loss, accuracy = figure.subplots(1, 2, sharex=True)
    _plot_band(loss, study.records, "train/loss", BLUE, "training")
    for split, colour, label in (("validation", GREEN, "held-out"), ("test", VERMILION, "test")):
        _plot_band(loss, study.records, f"{split}/loss", colour, label)
        _plot_band(accuracy, study.records, f"{split}/accuracy", colour, label, 100)
    loss.set(xlabel="epoch", ylabel="cross-entropy (nats, log scale)", yscale="log", title="Loss")
    format_log_axis(loss)
    accuracy.set(xlabel="epoch", ylabel="correct (%)", title="Accuracy")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    caption = "Lines: means over the runs. Bands and bars: from the least to the greatest of them. Training: single batches."
    return Plot("Curves", "Two line plots over epochs, loss and accuracy, with bands.", caption, figure)


def plot_hard_images(study: Study) -> Plot:
    """The test images that most runs predict wrong, with how many do and what they say."""
    found = common_predictions(study.records)
    if isinstance(found, str):
        return Plot(TITLE, "", found)
    first, predictions = found
    wrong = (predictions != first.label).sum(0)
    hardest = np.argsort(-wrong, kind="stable")[: min(NUM_IMAGES, int((wrong > 0).sum()))]
    if not len(hardest):
        return Plot(TITLE, "", "There are none: every run predicts every test image right.")
    record, count = study.records[0], len(predictions)
    try:
        images = displayable(test_images(record, first, hardest).images)
    except UserError as error:
        return Plot(TITLE, "", f"No picture, since the test images are not available here: {error}.")
    titles = [_said(record, int(first.label[image]), predictions[:, image]) for image in hardest]
    caption = (
        f"Each: the true class, how many of {count} runs get it wrong, and what they say most often. All {count} get"
        f" {int((wrong == count).sum()):,} images wrong, at least one of them {int((wrong > 0).sum()):,} of {first.total:,}."
    )
    figure = draw_images(images, titles, record.info.image == "mnist")
    return Plot(TITLE, "Test images that most runs predict wrong, with their predictions.", caption, figure)


def common_predictions(records: Sequence[Record]) -> tuple[Evaluation, np.ndarray] | str:
    """The predictions of the first run, and those of all, int64 [runs, images]; else why there are none, in words."""
    found = [record.predictions for record in records]
    saved = [one for one in found if one is not None]
    if len(saved) < len(found) or not saved:
        return f"No picture, since {len(found) - len(saved)} of {len(found)} runs have no predictions."
    first = saved[0]
    if any(not (np.array_equal(one.index, first.index) and np.array_equal(one.label, first.label)) for one in saved):
        return "No picture, since the runs were tested on different images."
    return first, np.stack([one.prediction for one in saved])


def _said(record: Record, label: int, predictions: np.ndarray) -> str:
    """The title of an image: its class, how many runs get it wrong, and what they say."""
    wrong = Counter(predictions[predictions != label].tolist())
    most = wrong.most_common(MAX_SAID)
    said = ", ".join(f"{record.classes[number]} ×{times}" for number, times in most)
    return f"{record.classes[label]}: {wrong.total()} of {len(predictions)}\n{said}{', …' if len(wrong) > len(most) else ''}"


def _plot_band(axis: Axes, records: Sequence[Record], metric: str, colour: str, label: str, scale: float = 1) -> None:
    """A metric where every run has it: the mean of the runs, and a band from the least to the greatest."""
    points = [record.points(metric, "epoch") for record in records]
    epochs = functools.reduce(np.intersect1d, [epoch for epoch, _ in points])
    if not len(epochs):
        return
    values = scale * np.stack([value[np.searchsorted(epoch, epochs)] for epoch, value in points])
    mean, least, greatest = values.mean(0), values.min(0), values.max(0)
    if len(epochs) > 1:
        axis.plot(epochs, mean, color=colour, label=label)
        axis.fill_between(epochs, least, greatest, color=colour, alpha=0.2, lw=0)
    else:
        axis.errorbar(
            epochs,
            mean,
            np.array([mean - least, greatest - mean]).clip(0),
            color=colour,
            label=label,
            marker="o",
            ms=4,
            capsize=3,
        )


def _spread(values: np.ndarray) -> list[float]:
    """How far each dot of a strip lies from its middle, within a third, so that nearly equal ones can be told apart."""
    near, gap = max(float(np.ptp(values)), 1e-9) / 60, min(0.09, 0.66 / len(values))
    placed: dict[int, float] = {}
    for number in np.argsort(values, kind="stable").tolist():
        taken = {placed[other] for other in placed if abs(values[other] - values[number]) < near}
        placed[number] = next(gap * place for place in _outward() if gap * place not in taken)
    return [placed[number] for number in range(len(values))]


def _outward() -> Iterator[int]:
    """0, 1, -1, 2, -2, …"""
    yield 0
    for number in itertools.count(1):
        yield number
        yield -number
