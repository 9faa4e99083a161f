"""What a person looks at: plots and one HTML page of a run, and a page that compares several runs.

A page is one file that needs no network and no script, and every text in it is escaped. It is made from the files in the
run's folder, and from the test images where they can be had; what is missing or damaged is said, and the rest is shown.

    python -m digitdist.report RUN...
"""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import yaml

from digitdist import config as configuration
from digitdist import runtime, tracking
from digitdist.checkpoint import write_whole
from digitdist.config import KEYS, DataConfig, Parser, UserError
from digitdist.data import SPECS, ImageSet, load_splits
from digitdist.evaluate import Evaluation, find_run, wilson_interval
from digitdist.models import NUM_CLASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_BINS = 15
NUM_MISTAKES = 36
SIGNIFICANT = 0.05
# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow that is faint on white.
BLUE, VERMILION, GREEN, *_ = COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dvp*"
LOOK: dict[Any, Any] = {"figure.dpi": 150, "font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left"}
LOOK |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.2}
LOOK |= {"legend.frameon": False, "text.parse_math": False}  # a $ in a run's name is a $
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 54rem; margin: 0 auto; padding: 0 1rem 3rem; }
h1, h2, li, p { overflow-wrap: anywhere; } td { overflow-wrap: break-word; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ccc; font-size: 1.2rem; }
.score { font-size: 1.25rem; } .note { background: #fff4d6; padding: .4rem .8rem; } small, figcaption { color: #555; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { white-space: nowrap; } .numbers td + td, .numbers th + th { text-align: right; }
.facts td { overflow-wrap: anywhere; } .facts td:first-child { white-space: nowrap; }
@media (max-width: 500px) { th { white-space: normal; } }
figure { margin: 0; } img { width: 100%; max-width: 700px; height: auto; display: block; } figcaption { font-size: .85rem; }
.keys { columns: 16rem; list-style: none; padding: 0; font-size: .85rem; } .keys li { break-inside: avoid; padding: 0 .2rem; }
.keys .changed { background: #e3f0fa; font-weight: bold; } .keys small { font-weight: normal; }
@media print { body { font-size: 11px; max-width: none; } figure, tr { break-inside: avoid; } td { overflow-wrap: anywhere; } }
"""
T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """What a run's folder holds: None or empty where it is not there yet; `notes` tell what is damaged.

    `config` is flat, dotted key to value; `predictions` has no losses, since they are not stored.
    """

    folder: Path
    config: dict[str, Any]
    data: DataConfig
    starts: list[dict[str, Any]]
    events: list[dict[str, float]]
    result: dict[str, Any] | None
    predictions: Evaluation | None
    notes: list[str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def classes(self) -> tuple[str, ...]:
        return SPECS[self.data.name].classes

    @property
    def last_step(self) -> int:
        return int(self.events[-1]["step"]) if self.events else 0

    def points(self, name: str, by: str) -> tuple[np.ndarray, np.ndarray]:
        """Where (`by` step or epoch) a metric was logged, and its finite values: float64 [n] both."""
        pairs = [(event[by], event[name]) for event in self.events if math.isfinite(event.get(name, math.nan))]
        return np.array([x for x, _ in pairs]), np.array([y for _, y in pairs])

    def reached(self, number: int) -> int:
        """The step to which a start came: told by its heartbeats, else where the next one began or the last line logged."""
        start, later = self.starts[number], self.starts[number + 1 :]
        return max(start["step"], start.get("reached") or (later[0]["step"] if later else self.last_step))

    def ending(self, number: int) -> str:
        """How a start ended, in words."""
        start = self.starts[number]
        if start.get("stopped"):
            return "stopped on request"
        if start.get("fault"):
            return str(start["fault"])
        if number + 1 < len(self.starts):
            return "no fault noted"
        return "finished" if self.result else "still running, or ended without a word"


def read_run(folder: Path) -> Record:
    """What there is of a run; it never fails for what a file holds."""
    notes: list[str] = []

    def read(name: str, reader: Callable[[Path], T], without: T) -> T:
        try:
            return reader(folder / name)
        except FileNotFoundError:
            return without
        except Exception as error:  # whatever damage raises, the other files are worth a page
            notes.append(f"{name} is damaged and left out ({type(error).__name__}: {' '.join(str(error).split())}).")
            return without

    flat: dict[str, Any] = read("config.yaml", lambda file: _flat(yaml.safe_load(file.read_text())), {})
    config, _ = configuration.read([str(folder / "config.yaml")], [])
    starts: list[dict[str, Any]] = read("environment.json", _read_starts, [])
    events: list[dict[str, float]] = read("metrics.jsonl", _read_events, [])
    result = read("result.json", _read_result, None)
    predictions = read("predictions.npz", _read_predictions, None)
    if predictions and result and (predictions.correct, predictions.total) != (result["test_correct"], result["test_total"]):
        notes.append(f"predictions.npz has {predictions.correct:,}/{predictions.total:,} correct, result.json says otherwise.")
    if predictions and not result:
        notes.append("There is no result.json beside predictions.npz, which may be of an earlier end of this run.")
    return Record(folder, flat, config.data, starts, events, result, predictions, notes)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for part, value in tree.items():
        flat |= _flat(value, f"{prefix}{part}.") if isinstance(value, dict) and value else {f"{prefix}{part}": value}
    return flat


def _read_starts(file: Path) -> list[dict[str, Any]]:
    starts = json.loads(file.read_text())["starts"]
    return [start | {name: int(start[name]) for name in ("step", "world_size")} for start in starts]


def _read_events(file: Path) -> list[dict[str, float]]:
    events = [{name: float(value) for name, value in event.items()} for event in tracking.read_metrics(file.parent)]
    if not all({"step", "epoch"} <= event.keys() for event in events):
        raise ValueError("a line has no step or no epoch")
    return events


def _read_result(file: Path) -> dict[str, Any]:
    result = json.loads(file.read_text())
    names = ("test_correct", "test_total", "test_loss", "steps", "epochs", "world_size", "device", "precision")
    return {name: result[name] for name in (*names, "images_per_second", "train_seconds", "weights_sha256")}


def _read_predictions(file: Path) -> Evaluation:
    with np.load(file, allow_pickle=False) as saved:
        index, label, prediction = (saved[name].astype(np.int64) for name in ("index", "label", "prediction"))
        probability = saved["probability"].astype(np.float64)
    for column in (index, label, prediction, probability):
        if column.shape != index.shape or not column.size:
            raise ValueError("its columns are empty or of unequal length")
    if not all(column.min() >= 0 and column.max() < NUM_CLASSES for column in (label, prediction)):
        raise ValueError("it holds a class that is none")
    return Evaluation(index, label, prediction, probability, np.full(len(index), np.nan))


@dataclass(frozen=True)
class Calibration:
    """Each bin's number of images, mean probability and accuracy (NaN where it has none), and the expected error."""

    count: np.ndarray
    probability: np.ndarray
    accuracy: np.ndarray
    error: float


def calibration(probability: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS) -> Calibration:
    """Bins of equal width, open below, over the probability of the predicted class, float [n]; `correct` is bool [n].

    `error` is the expected calibration error, sum over bins of count/n · |accuracy - mean probability|
    (C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3).
    """
    place = np.digitize(probability, np.linspace(0, 1, num_bins + 1)[1:-1], right=True)
    count = np.bincount(place, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, weights=probability, minlength=num_bins) / count
        accuracy = np.bincount(place, weights=correct, minlength=num_bins) / count
    return Calibration(count, mean, accuracy, float(np.nansum(count * abs(accuracy - mean)) / count.sum()))


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of `only_a` against `only_b` images that just one of two networks predicts right.

    Under the null hypothesis they fall to either side like a fair coin (Q. McNemar, Psychometrika 12, 1947).
    """
    count, ways, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):
        tail += ways
        ways = ways * (count - k) // (k + 1)
    return min(1.0, 2 * tail / 2**count)  # whole numbers until here: nothing is rounded away


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


@dataclass(frozen=True)
class Plot:
    """A picture with its alternative text and its caption; without a figure, the caption says why there is none."""

    title: str
    alt: str
    caption: str
    figure: Figure | None = None


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(7, height), layout="constrained")  # inches: about 700 pixels wide where it is shown


def plot_curves(records: Sequence[Record], names: Sequence[str]) -> Plot:
    """Loss and accuracy over epochs, of one run with all its splits, or of several runs."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    caption = "Lines: loss of single training batches before their update. Points: whole evaluations, with 95 % intervals."
    if not any(record.events for record in records):
        return Plot("Curves", "", "No metrics yet.")
    figure = _figure(3.1 + 0.18 * len(records))
    loss, accuracy = figure.subplots(1, 2, sharex=True)
    for number, (record, name) in enumerate(zip(records, names, strict=True)):
        own, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
        several = len(records) > 1
        loss.plot(*record.points("train/loss", "epoch"), color=own, lw=0.7, alpha=0.6, label="" if several else "training")
        kinds = [("test", own, name)] if several else [("validation", GREEN, "held-out"), ("test", VERMILION, "test")]
        for split, colour, label in kinds:
            _scores(loss, accuracy, record, split, colour, marker, f" {label}")  # matplotlib hides labels that begin with _
    loss.set(xlabel="epoch", ylabel="cross-entropy (nats, log scale)", yscale="log", title="Loss")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    loss.yaxis.set_minor_formatter(NullFormatter())
    accuracy.set(xlabel="epoch", ylabel="correct (%)", title="Accuracy")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return Plot("Curves", f"Two line plots over epochs, loss and accuracy, of {', '.join(names)}.", caption, figure)


def _scores(loss: Axes, accuracy: Axes, record: Record, split: str, colour: str, marker: str, label: str) -> None:
    """The points of one split's evaluations, where there are any."""
    epoch, value = record.points(f"{split}/loss", "epoch")
    if not len(epoch):
        return
    loss.plot(epoch, value, color=colour, marker=marker, markersize=4, label=label)
    epoch, correct = record.points(f"{split}/correct", "epoch")
    _, total = record.points(f"{split}/total", "epoch")
    bounds = np.array([wilson_interval(int(c), int(t)) for c, t in zip(correct, total, strict=True)]).reshape(-1, 2).T
    below, above = correct / total - bounds[0], bounds[1] - correct / total
    accuracy.errorbar(
        epoch,
        100 * correct / total,
        100 * np.array([below, above]).clip(0),
        color=colour,
        marker=marker,
        markersize=4,
        capsize=2,
    )


def plot_throughput(record: Record) -> Plot:
    """Images a second by step; where a run was started again, also the world size of each start."""
    step, rate = record.points("train/images_per_second", "step")
    caption = "Training images a second, over all ranks, since the line logged before."
    if not len(step):
        return Plot("Throughput", "", "No throughput logged yet.")
    several = len(record.starts) > 1
    figure = _figure(3.6 if several else 2.4)
    panels = figure.subplots(1 + several, 1, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + several])[:, 0]
    panels[0].plot(step, rate, color=BLUE, marker="o" if len(step) < 50 else "", markersize=3)
    panels[0].set(ylabel="images/s", ylim=(0, 1.1 * rate.max()))
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    panels[-1].set_xlabel("step")
    if several:
        caption += " Dashed: restarts. Below: the world size of each start, from its first step to the last that it reached."
        for number, start in enumerate(record.starts):
            panels[1].plot([start["step"], record.reached(number)], [start["world_size"]] * 2, color=GREEN, lw=3, marker="|")
            for panel in panels if number else ():
                panel.axvline(start["step"], color="#555555", ls="--", lw=1)
        sizes = sorted({start["world_size"] for start in record.starts})
        panels[1].set(ylabel="world size", yticks=sizes, ylim=(0, sizes[-1] + 1))
    return Plot("Throughput", "Line plot of images a second by step, restarts marked.", caption, figure)


def plot_confusion(record: Record) -> Plot:
    """How often each class was predicted as each other; colour for the mistakes alone, which the diagonal would drown."""
    if record.predictions is None:
        return Plot("Confusion", "", "No predictions yet.")
    counts = record.predictions.confusion
    mistakes = np.where(np.eye(NUM_CLASSES, dtype=bool), 0, counts)
    figure = _figure(5.6)
    axis = figure.subplots()
    axis.imshow(mistakes, cmap="Blues", vmin=0, vmax=max(1, 1.15 * mistakes.max()))
    for (row, column), count in np.ndenumerate(counts):
        dark = mistakes[row, column] > 0.6 * mistakes.max()
        colour = "white" if dark and row != column else "#222222" if count else "#bbbbbb"
        axis.text(column, row, f"{count}", ha="center", va="center", color=colour, weight="bold" if row == column else None)
    long = max(map(len, record.classes)) > 3
    axis.set_xticks(range(NUM_CLASSES), record.classes, rotation=45 if long else 0, ha="right" if long else "center")
    axis.set_yticks(range(NUM_CLASSES), record.classes)
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.grid(False)
    caption = "Test images by true and predicted class. The shade tells how frequent a mistake is; the diagonal is right."
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
        images = _test_images(record.data, result).images.numpy()
    except UserError as error:
        return Plot("Worst mistakes", "", f"No picture, since the test images cannot be had here: {error}.")
    rows, wide, high = -(-len(worst) // 6), 44, 44  # pixels of an image with its title and margins
    figure = _figure(1.16 * rows)
    canvas = np.zeros((rows * high, 6 * wide), np.uint8)  # one axis: one an image would take seconds to lay out
    axis = figure.subplots()
    for number, place in enumerate(worst):
        y, x = number // 6 * high, number % 6 * wide
        canvas[y + 15 : y + 43, x + 8 : x + 36] = images[result.index[place]]
        label, prediction = (record.classes[column[place]] for column in (result.label, result.prediction))
        size = 9 if len(label + prediction) < 12 else 6.5
        title = f"{label} → {prediction}\n{result.probability[place]:.3f}"
        axis.text(x + wide / 2, y + 14, title, ha="center", va="bottom", fontsize=size)
    axis.imshow(canvas, cmap="gray_r", vmin=0, vmax=255)
    axis.set_axis_off()
    count = f"{len(worst)} of {len(wrong):,} mistakes" if len(worst) < len(wrong) else f"All {len(wrong)} mistakes"
    caption = f"{count}, the most confident first: label → prediction, and the probability that the network gave it."
    return Plot("Worst mistakes", "Test images that were predicted wrong with the highest probability.", caption, figure)


def _test_images(data: DataConfig, result: Evaluation) -> ImageSet:
    """The test images of a result.

    Raises:
        UserError: the data set cannot be had, or is another one here.
    """
    test = load_splits(dataclasses.replace(data, validation=0), seed=0).test
    if result.index.max() >= len(test) or not np.array_equal(test.labels.numpy()[result.index], result.label):
        raise UserError(f"the {data.name} in {data.root} is not what this run was tested on")
    return test


def plot_calibration(record: Record) -> Plot:
    """Reliability diagram, and how many images each of its bins has."""
    if record.predictions is None:
        return Plot("Calibration", "", "No predictions yet.")
    result = record.predictions
    bins = calibration(result.probability, result.label == result.prediction)
    left, width = np.arange(NUM_BINS) / NUM_BINS, 1 / NUM_BINS
    figure = _figure(4.8)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
    top.bar(left, bins.accuracy, width, align="edge", color=BLUE, alpha=0.35, edgecolor=BLUE, label="share correct")
    top.plot([0, 1], [0, 1], color="#555555", ls="--", label="perfectly calibrated")
    top.plot(bins.probability, bins.accuracy, color=VERMILION, marker="o", ls="", markersize=4, clip_on=False)
    top.set(ylabel="share correct", ylim=(0, 1.02), xlim=(0, 1), title=f"ECE {bins.error:.4f}")
    figure.legend(loc="outside upper right", ncols=2)
    bars = below.bar(left, bins.count, width, align="edge", color=BLUE, alpha=0.35, edgecolor=BLUE)
    below.bar_label(bars, [f"{count:,}" if count else "" for count in bins.count], fontsize=7)
    below.set(
        xlabel="probability of the predicted class", ylabel="images (log)", yscale="log", ylim=(0.7, 6 * bins.count.max())
    )
    below.yaxis.set_major_formatter("{x:,.0f}")
    caption = (
        f"Expected calibration error (ECE) {bins.error:.4f}: the gap between share correct and mean probability, averaged over"
        f" {NUM_BINS} bins of equal width by their counts (Guo et al., On Calibration of Modern Neural Networks,"
        " ICML 2017). Dots are at a bin's mean probability."
    )
    return Plot("Calibration", "Reliability diagram: share correct by probability, with counts.", caption, figure)


def _page(title: str, *parts: str) -> str:
    """One HTML file, which may load nothing whatever it holds."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = [f'<meta http-equiv="Content-Security-Policy" content="{policy}">', f"<title>{escape(title)}</title>"]
    head += ['<meta name="viewport" content="width=device-width, initial-scale=1">', f"<style>{STYLE}</style>"]
    lines = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        *head,
        "</head><body>",
        f"<h1>{escape(title)}</h1>",
    ]
    return "\n".join([*lines, *parts, "</body></html>\n"])


def _text(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>'


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], style: str = "") -> str:
    """A table of texts; with `style` numbers, all columns but the first are set right."""
    lines = [f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows]
    header = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    return f'<div class="wide"><table class="{style}">{header}{"".join(lines)}</table></div>'


def _draw(plot: Plot, file: Path | None) -> str:
    """A plot as a part of a page, and as `file` too; a file of a plot that is no more is removed."""
    if plot.figure is None:
        if file:
            file.unlink(missing_ok=True)
        return f"<h2>{escape(plot.title)}</h2>" + _text(plot.caption)
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format="png")
    if file:
        file.parent.mkdir(exist_ok=True)
        write_whole(file, buffer.getvalue())
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    image = f'<img alt="{escape(plot.alt)}" src="{source}">'
    return f"<h2>{escape(plot.title)}</h2><figure>{image}<figcaption>{escape(plot.caption)}</figcaption></figure>"


def _score(correct: int, total: int) -> str:
    low, high = wilson_interval(correct, total)
    return f"{100 * correct / total:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f} %)"


def _rate(result: dict[str, Any]) -> str:
    return f"{result['images_per_second']:,.0f}" if result["images_per_second"] else "none"


def _result(record: Record) -> str:
    result = record.result
    if result is None:
        step = f"step {record.last_step:,} is the last one logged" if record.events else "nothing is logged yet"
        return _text(f"Not finished: {step}.", "note")
    correct, total = result["test_correct"], result["test_total"]
    where = f"world size {result['world_size']}, {result['device']}, {result['precision']}"
    rows = [
        ("correct", f"{correct:,} of {total:,} {record.data.name} test images"),
        ("test loss", f"{result['test_loss']:.4f}"),
        ("trained", f"{result['steps']:,} steps, {result['epochs']:.4g} epochs, last on {where}"),
        ("training time", f"{result['train_seconds']:.1f} s, {_rate(result)} images/s"),
        ("weights SHA-256", result["weights_sha256"]),
    ]
    return _text(_score(correct, total), "score") + _table([], rows, "facts")


def _starts(record: Record) -> str:
    """One row a start of the run, and what the restarts have cost."""
    if not record.starts:
        return "<h2>Starts</h2>" + _text("None noted.")
    starts, rows = record.starts, []
    for number, start in enumerate(starts):
        versions = ", ".join(f"{name}\u00a0{start.get(name, '?')}" for name in ("digitdist", "torch", "accelerate", "python"))
        place = f"{start.get('host', '?')}, {start.get('device', '?')} ({start.get('device_name', '?')})"
        told = [start.get("precision", "?"), start.get("threads", "?"), versions, str(start.get("git_commit") or "none")[:12]]
        time = str(start.get("time", "?")).replace("T", " ")
        steps = f"{start['step']:,} to {record.reached(number):,}"
        rows.append([time, steps, record.ending(number), start["world_size"], place, *told])
    again = sum(max(0, record.reached(i) - later["step"]) for i, later in enumerate(starts[1:]))
    sizes = ", then ".join(str(start["world_size"]) for start in starts)
    summary = f"{len(starts)} starts, on {sizes} processes; restarts cost {again:,} steps that were taken again."
    head = ("time", "steps", "end", "world size", "host, device", "precision", "threads", "versions", "git commit")
    return "<h2>Starts</h2>" + (_text(summary) if len(starts) > 1 else "") + _table(head, rows)


def _settings(record: Record) -> str:
    """Every key of the configuration, with its default where it differs."""
    items = []
    for name, value in record.config.items():
        default = KEYS[name].default if name in KEYS else None
        text = f"{escape(name)} = {escape(_plain(value))}"
        differs = f'<li class="changed">{text} <small>(default {escape(_plain(default))})</small></li>'
        items.append(f"<li>{text}</li>" if value == default else differs)
    return f'<h2>Configuration</h2><ul class="keys">{"".join(items)}</ul>'


def _plain(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _classes(record: Record) -> str:
    """Of each class: images, how many of them are right, and what the others are most often taken for."""
    if record.predictions is None:
        return ""
    rows = []
    for number, counts in enumerate(record.predictions.confusion):
        count, correct = int(counts.sum()), int(counts[number])
        counts[number] = 0
        other = f"{record.classes[counts.argmax()]} ({counts.max()})" if counts.any() else "none"
        rows.append((record.classes[number], f"{count:,}", f"{correct:,}", _percent(correct, count), other))
    total, correct = record.predictions.total, record.predictions.correct
    rows.append(("all", f"{total:,}", f"{correct:,}", _percent(correct, total), ""))
    head = ("class", "images", "correct", "accuracy", "often taken for")
    return "<h2>Classes</h2>" + _table(head, rows, "numbers")


def _percent(correct: int, total: int) -> str:
    return f"{100 * correct / total:.2f} %" if total else "none"


def write_report(folder: Path) -> Path:
    """Writes ``plots/*.png`` and ``report.html`` of the run in `folder`; returns the page.

    Raises:
        OSError: a file cannot be written.
    """
    from matplotlib import rc_context

    record = read_run(folder)
    with rc_context(LOOK):
        plots = {
            "curves": plot_curves([record], [record.name]),
            "throughput": plot_throughput(record),
            "confusion": plot_confusion(record),
            "mistakes": plot_mistakes(record),
            "calibration": plot_calibration(record),
        }
        drawn = {name: _draw(plot, folder / "plots" / f"{name}.png") for name, plot in plots.items()}
    notes = [_text(note, "note") for note in record.notes]
    parts = [drawn["curves"], drawn["confusion"], _classes(record), drawn["mistakes"], drawn["calibration"]]
    page = _page(record.name, _result(record), *notes, *parts, drawn["throughput"], _starts(record), _settings(record))
    write_whole(folder / "report.html", page.encode())
    return folder / "report.html"


def common_verdicts(a: Record, b: Record) -> tuple[np.ndarray, np.ndarray]:
    """Which of the test images that both runs predicted each of them got right: bool [n] both.

    Raises:
        ValueError: the runs cannot be compared, and why.
    """
    if a.predictions is None or b.predictions is None:
        raise ValueError(f"{(b if a.predictions else a).name} has no predictions")
    if a.data.name != b.data.name:
        raise ValueError(f"{a.data.name} and {b.data.name} are different data sets")
    index, in_a, in_b = np.intersect1d(a.predictions.index, b.predictions.index, return_indices=True)
    if not len(index):
        raise ValueError("they have no test image in common")
    if not np.array_equal(a.predictions.label[in_a], b.predictions.label[in_b]):
        raise ValueError("their test images have different labels")
    right_a, right_b = (run.label == run.prediction for run in (a.predictions, b.predictions))
    return right_a[in_a], right_b[in_b]


def compare(records: Sequence[Record], names: Sequence[str]) -> list[str]:
    """The verdict on each pair of runs, in words, by p values adjusted for the number of pairs."""
    obstacles, pairs = [], []
    for (a, name_a), (b, name_b) in itertools.combinations(zip(records, names, strict=True), 2):
        try:
            right_a, right_b = common_verdicts(a, b)
        except ValueError as error:
            obstacles.append(f"{name_a} and {name_b} cannot be compared: {error}.")
            continue
        same = a.result and b.result and a.result["weights_sha256"] == b.result["weights_sha256"]
        pairs.append((name_a, name_b, right_a, right_b, " Their weights are the same, bit for bit." if same else ""))
    p_values = holm([mcnemar(int((a & ~b).sum()), int((b & ~a).sum())) for _, _, a, b, _ in pairs])
    return [_verdict(*two, p, len(pairs)) for two, p in zip(pairs, p_values, strict=True)] + obstacles


def _verdict(a: str, b: str, right_a: np.ndarray, right_b: np.ndarray, remark: str, p: float, pairs: int) -> str:
    better = a if right_a.sum() > right_b.sum() else b
    finding = f"{better} is better" if p < SIGNIFICANT else "no difference shown"
    value = f"p = {p:.2g}" if p >= 0.0001 else "p < 0.0001"
    adjusted = f" (Holm, {pairs} comparisons)" if pairs > 1 else ""
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    shares = f"{a} {_percent(right_a.sum(), len(right_a))} and {b} {_percent(right_b.sum(), len(right_b))}"
    counts = f"Of {len(right_a):,} images, {only_a:,} only {a} got right, {only_b:,} only {b}."
    return f"{shares}: {finding}, {value}{adjusted}. {counts}{remark}"


def write_comparison(folders: Sequence[Path], file: Path) -> None:
    """Writes one page on several runs as `file`: curves, results, what differs in their configuration, and McNemar's tests.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib import rc_context

    records = [read_run(folder) for folder in folders]
    short = [record.name for record in records]
    names = [name if short.count(name) == 1 else str(record.folder) for name, record in zip(short, records, strict=True)]
    with rc_context(LOOK):
        curves = _draw(plot_curves(records, names), None)
    method = (
        f"McNemar's exact test on the images that one of two networks alone gets right; better means p < {SIGNIFICANT}."
        " It compares these trained networks: how far another seed would move each is not in it (Dietterich, Approximate"
        " Statistical Tests for Comparing Supervised Classification Learning Algorithms, 1998)."
    )
    if len(records) > 2:
        method += (
            " With several comparisons p is adjusted (Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979)."
        )
    verdicts = "".join(f"<li>{escape(verdict)}</li>" for verdict in compare(records, names))
    parts = [f"<h2>Results</h2>{_results(records, names)}", f"<h2>Differences</h2><ul>{verdicts}</ul>{_text(method)}", curves]
    notes = [_text(f"{name}: {note}", "note") for name, record in zip(names, records, strict=True) for note in record.notes]
    write_whole(file, _page(f"{len(records)} runs compared", *notes, *parts, _differing(records, names)).encode())


def _results(records: Sequence[Record], names: Sequence[str]) -> str:
    rows: list[list[object]] = []
    for record, name in zip(records, names, strict=True):
        rows.append([name, "not finished", *[""] * 6])
        if result := record.result:
            correct, total = result["test_correct"], result["test_total"]
            rows[-1][1:5] = (
                f"{correct:,}/{total:,} = {_score(correct, total)}",
                f"{result['test_loss']:.4f}",
                f"{result['steps']:,}",
                result["world_size"],
            )
            rows[-1][5:] = f"{result['train_seconds']:.1f} s", _rate(result), result["weights_sha256"][:12]
    head = ("run", "test images correct", "test loss", "steps", "world size", "training", "images/s", "weights SHA-256")
    return _table(head, rows)


def _differing(records: Sequence[Record], names: Sequence[str]) -> str:
    """The keys whose values are not the same in all runs, but for the run's name."""
    keys = dict.fromkeys(key for record in records for key in record.config if key != "run.name")
    values = {key: [_plain(record.config[key]) if key in record.config else "not there" for record in records] for key in keys}
    rows = [(key, *row) for key, row in values.items() if len(set(row)) > 1]
    return "<h2>Configuration</h2>" + (_table(("key", *names), rows) if rows else _text("No key differs."))


def main() -> None:
    parser = Parser(
        prog="python -m digitdist.report",
        description="Plots and one HTML page of each run, and of several runs a page that compares them.",
        epilog="example: python -m digitdist.report quick other --output comparison.html",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="[sync] RUN", help="folders or names of runs; after sync, runs to send to W&B"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the comparison of several runs (default: comparison.html)")
    arguments = parser.parse_args()
    if arguments.runs[0] == "sync" and len(arguments.runs) > 1:
        for run in arguments.runs[1:]:
            tracking.sync(find_run(run), print)
        return
    folders = list({folder.resolve(): folder for folder in map(find_run, arguments.runs)}.values())
    if arguments.output and len(folders) < 2:
        parser.error("--output names the comparison of several runs; one run's page is report.html in its folder")
    try:
        for folder in folders:
            print(write_report(folder), flush=True)
        if len(folders) > 1:
            output = arguments.output or Path("comparison.html")
            write_comparison(folders, output)
            print(output)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give a place that you can write to") from None


if __name__ == "__main__":
    runtime.run_command(main)
