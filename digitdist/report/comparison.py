"""The page that compares several runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from digitdist.evaluate import SIGNIFICANT, holm, mcnemar, p_in_words, share_in_words
from digitdist.report.page import draw, percent, plain, rate, write_page
from digitdist.report.plots import STYLE, plot_curves
from digitdist.report.record import Record, read_record

METHOD = (
    f"McNemar's exact test on the images that only one of two networks gets right; better means p < {SIGNIFICANT}."
    " It compares these trained networks: how far another seed would move each is not part of it (Dietterich, Approximate"
    " Statistical Tests for Comparing Supervised Classification Learning Algorithms, 1998)."
)
SEVERAL = " With several comparisons p is adjusted (Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979)."


def write_comparison(folders: Sequence[Path], file: Path) -> None:
    """Writes one page on several runs as `file`: curves, results, what differs in their configuration, and McNemar's tests.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib import rc_context

    records = [read_record(folder) for folder in folders]
    short = [record.name for record in records]
    names = [name if short.count(name) == 1 else str(record.folder) for name, record in zip(short, records, strict=True)]
    with rc_context(STYLE):
        curves = draw("Curves", lambda: plot_curves(records, names))
    write_page(
        file,
        "comparison",
        title=f"{len(records)} runs compared",
        notes=[f"{name}: {note}" for name, record in zip(names, records, strict=True) for note in record.notes],
        results=[_result(record, name) for record, name in zip(records, names, strict=True)],
        verdicts=compare_runs(records, names),
        method=METHOD + (SEVERAL if len(records) > 2 else ""),
        curves=curves,
        names=names,
        differences=_differences(records),
    )


def common_images(a: Record, b: Record) -> tuple[np.ndarray, np.ndarray]:
    """Which of the test images that both runs predicted each of them got right: bool [n] both.

    Raises:
        ValueError: the runs cannot be compared, and why.
    """
    if a.predictions is None or b.predictions is None:
        raise ValueError(f"{(b if a.predictions else a).name} has no predictions")
    if a.info.name != b.info.name:
        raise ValueError(f"{a.info.name} and {b.info.name} are different data sets")
    index, in_a, in_b = np.intersect1d(a.predictions.index, b.predictions.index, return_indices=True)
    if not len(index):
        raise ValueError("they have no test image in common")
    if not np.array_equal(a.predictions.label[in_a], b.predictions.label[in_b]):
        raise ValueError("their test images have different labels")
    right_a, right_b = (run.label == run.prediction for run in (a.predictions, b.predictions))
    return right_a[in_a], right_b[in_b]


def compare_runs(records: Sequence[Record], names: Sequence[str]) -> list[str]:
    """The verdict on each pair of runs, in words, by p values adjusted for the number of pairs."""
    obstacles, pairs = [], []
    for (a, name_a), (b, name_b) in itertools.combinations(zip(records, names, strict=True), 2):
        try:
            right_a, right_b = common_images(a, b)
        except ValueError as error:
            obstacles.append(f"{name_a} and {name_b} cannot be compared: {error}.")
            continue
        same = a.result and b.result and a.result["weights_sha256"] == b.result["weights_sha256"]
        pairs.append((name_a, name_b, right_a, right_b, " Their weights are the same, bit for bit." if same else ""))
    p_values = holm([mcnemar(int((a & ~b).sum()), int((b & ~a).sum())) for _, _, a, b, _ in pairs])
    adjusted = f" (Holm, {len(pairs)} comparisons)" if len(pairs) > 1 else ""
    return [
        _verdict(name_a, name_b, a, b, p, adjusted) + remark
        for (name_a, name_b, a, b, remark), p in zip(pairs, p_values, strict=True)
    ] + obstacles


def _verdict(name_a: str, name_b: str, right_a: np.ndarray, right_b: np.ndarray, p: float, adjusted: str) -> str:
    better = name_a if right_a.sum() > right_b.sum() else name_b
    finding = f"{better} is better" if p < SIGNIFICANT else "no difference shown"
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    shares = f"{name_a} {percent(right_a.sum(), len(right_a))} and {name_b} {percent(right_b.sum(), len(right_b))}"
    counts = f"Of {len(right_a):,} images, {only_a:,} only {name_a} got right, {only_b:,} only {name_b}."
    return f"{shares}: {finding}, {p_in_words(p)}{adjusted}. {counts}"


def _result(record: Record, name: str) -> tuple[str, ...]:
    """A row of the table of results."""
    result = record.result
    if result is None:
        return (name, "not finished", *[""] * 6)
    correct, total = result["test_correct"], result["test_total"]
    return (
        name,
        f"{correct:,}/{total:,} = {share_in_words(correct, total)}",
        f"{result['test_loss']:.4f}",
        f"{result['steps']:,}",
        str(result["world_size"]),
        f"{result['train_seconds']:.1f} s",
        rate(result),
        result["weights_sha256"][:12],
    )


def _differences(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The keys whose values differ between the runs, but for the run's name, each with all values."""
    keys = dict.fromkeys(key for record in records for key in record.config if key != "run.name")
    values = {key: [plain(record.config[key]) if key in record.config else "not set" for record in records] for key in keys}
    return [(key, *row) for key, row in values.items() if len(set(row)) > 1]
