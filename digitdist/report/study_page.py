"""The page of a study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from digitdist.evaluate import mean_interval
from digitdist.report.page import draw, percent, rate, setting, write_page
from digitdist.report.plots import STYLE, Plot
from digitdist.report.study import Study, interval, read_study, summary_row
from digitdist.report.study_plots import TITLE, plot_bands, plot_hard_images, plot_seeds


def write_study_report(folder: Path) -> Path:
    """Writes ``plots/*.png`` and ``report.html`` of the study in `folder`; returns the page.

    Raises:
        OSError: a file cannot be written.
    """
    from matplotlib import rc_context

    study = read_study(folder)
    plots: dict[str, tuple[str, Callable[[], Plot]]] = {}
    if study.records:
        plots["seeds"] = ("Seeds", lambda: plot_seeds(study))
        plots["curves"] = ("Curves", lambda: plot_bands(study))
        plots["hard"] = (TITLE, lambda: plot_hard_images(study))
    with rc_context(STYLE):
        pictures = [draw(title, make, folder / "plots" / f"{name}.png") for name, (title, make) in plots.items()]
    write_page(
        folder / "report.html",
        "study",
        title=study.name,
        notes=study.notes,
        score=_score(study) if study.records else None,
        facts=_facts(study).items(),
        pictures=pictures,
        seeds=_seeds(study),
        settings=_settings(study),
    )
    return folder / "report.html"


def _score(study: Study) -> str:
    mean = mean_interval(study.accuracies)
    runs = f"{mean.count} run{'' if mean.count == 1 else 's'}"
    spread = f" (95 % interval {interval(mean)} %)" if mean.count > 1 else ""
    return f"{100 * mean.mean:.3f} %{spread}, the mean of {runs} that differ in their seed alone"


def _facts(study: Study) -> dict[str, str]:
    if not study.records:
        return {}
    facts = {"test images": _in_words(study, study.accuracies)}
    if study.held_out:
        facts["held-out images"] = _in_words(study, study.held_out)
    seconds = study.train_seconds
    *_, median = summary_row(study.accuracies, seconds)
    return facts | {"train_seconds": f"{median} in the median, {min(seconds):.2f} to {max(seconds):.2f}"}


def _in_words(study: Study, values: list[float]) -> str:
    mean, deviation, between, least, greatest, _ = summary_row(values, study.train_seconds)
    return f"mean {mean}, 95 % interval {between}, deviation {deviation}, least {least}, greatest {greatest}"


def _seeds(study: Study) -> list[tuple[str, ...]]:
    """A row of each run."""
    rows: list[tuple[str, ...]] = []
    for number, record in enumerate(study.records):
        result = record.result or {}
        held_out = f"{100 * study.held_out[number]:.2f} %" if study.held_out else "none"
        correct, total = result["test_correct"], result["test_total"]
        rows.append(
            (
                str(record.seed),
                f"{correct:,} of {total:,}",
                percent(correct, total),
                held_out,
                f"{result['test_loss']:.4f}",
                f"{result['train_seconds']:.2f}",
                rate(result),
                result["weights_sha256"][:12],
            )
        )
    return rows


def _settings(study: Study) -> list[dict[str, str | None]]:
    """What of their configuration the runs have in common."""
    configs = [record.config for record in study.records]
    common = (
        {name: value for name, value in configs[0].items() if all(c.get(name) == value for c in configs)} if configs else {}
    )
    return [setting(name, value) for name, value in common.items()]
