"""The page of one run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from digitdist.config import shown
from digitdist.evaluate import share_in_words
from digitdist.report.page import draw, percent, rate, setting, write_page
from digitdist.report.plots import STYLE, Plot, plot_calibration, plot_confusion, plot_curves, plot_mistakes, plot_throughput
from digitdist.report.record import Record, read_record

PACKAGES = ("digitdist", "torch", "accelerate", "python")


def write_report(folder: Path) -> Path:
    """Writes ``plots/*.png`` and ``report.html`` of the run in `folder`; returns the page.

    Raises:
        OSError: a file cannot be written.
    """
    from matplotlib import rc_context

    record = read_record(folder)
    with rc_context(STYLE):
        plots: dict[str, tuple[str, Callable[[], Plot]]] = {
            "curves": ("Curves", lambda: plot_curves([record], [record.name])),
            "throughput": ("Throughput", lambda: plot_throughput(record)),
            "confusion": ("Confusion", lambda: plot_confusion(record)),
            "mistakes": ("Worst mistakes", lambda: plot_mistakes(record)),
            "calibration": ("Calibration", lambda: plot_calibration(record)),
        }
        pictures = {name: draw(title, make, folder / "plots" / f"{name}.png") for name, (title, make) in plots.items()}
    write_page(
        folder / "report.html",
        "run",
        title=record.name,
        notes=record.notes,
        result=_result(record),
        last_step=f"{record.last_step:,}" if record.events else None,
        pictures=pictures,
        classes=_classes(record),
        attempts=[_attempt(record, number) for number in range(len(record.attempts))],
        restarts=_restarts(record),
        settings=[setting(name, value) for name, value in record.config.items()],
    )
    return folder / "report.html"


def _result(record: Record) -> dict[str, Any] | None:
    result = record.result
    if result is None:
        return None
    where = f"world size {result['world_size']}, {result['device']}, {result['precision']}"
    ended = f", ended by {shown(result['ended'])}" if result["ended"] else ""
    facts = {
        "correct": f"{result['test_correct']:,} of {result['test_total']:,} {record.info.name} test images",
        "test loss": f"{result['test_loss']:.4f}",
        "trained": f"{result['steps']:,} steps, {result['epochs']:.4g} epochs{ended}, last on {where}",
        "training time": f"{result['train_seconds']:.1f} s, {rate(result)} images/s",
        "weights SHA-256": result["weights_sha256"],
    }
    return {"score": share_in_words(result["test_correct"], result["test_total"]), "facts": facts}


def _classes(record: Record) -> list[tuple[str, ...]]:
    """Of each class: images, how many of them are right, and what the others are most often taken for."""
    if record.predictions is None:
        return []
    rows = []
    for number, counts in enumerate(record.predictions.confusion):
        count, correct = int(counts.sum()), int(counts[number])
        counts[number] = 0
        other = f"{record.classes[counts.argmax()]} ({counts.max()})" if counts.any() else "none"
        rows.append((record.classes[number], f"{count:,}", f"{correct:,}", percent(correct, count), other))
    total, correct = record.predictions.total, record.predictions.correct
    return [*rows, ("all", f"{total:,}", f"{correct:,}", percent(correct, total), "")]


def _attempt(record: Record, number: int) -> tuple[str, ...]:
    """One row of the table of attempts."""
    attempt = record.attempts[number]
    versions = ", ".join(f"{name}\u00a0{attempt.get(name, '?')}" for name in PACKAGES)
    commit = attempt.get("git_commit")
    instructions = (
        f", {attempt['cpu_instructions']}" if attempt.get("device") == "cpu" and "cpu_instructions" in attempt else ""
    )
    place = f"{attempt.get('host', '?')}, {attempt.get('device', '?')} ({attempt.get('device_name', '?')}{instructions})"
    threads = attempt.get("threads", "?")
    return (
        str(attempt.get("time", "?")).replace("T", " "),
        f"{attempt['step']:,} to {record.reached(number):,}",
        record.ending(number),
        str(attempt["world_size"]),
        f"{place}, {attempt.get('precision', '?')}, {threads} thread{'' if threads == 1 else 's'} a process",
        versions + (f", commit\u00a0{str(commit)[:12]}" if commit else ""),
    )


def _restarts(record: Record) -> str | None:
    """What restarts have cost, in words; None without any."""
    attempts = record.attempts
    if len(attempts) < 2:
        return None
    repeated = sum(max(0, record.reached(i) - later["step"]) for i, later in enumerate(attempts[1:]))
    sizes = ", then ".join(str(attempt["world_size"]) for attempt in attempts)
    return f"{len(attempts)} attempts, on {sizes} processes; restarts cost {repeated:,} steps that were taken again."
